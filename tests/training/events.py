"""Reads event files as TensorBoard does."""

import pathlib
import struct

from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c


def records(content):
  """Yields the records of a file. A kill may have cut off the last one."""
  while len(content) >= 12:
    [length] = struct.unpack("<Q", content[:8])
    data = content[12 : 12 + length]
    if len(content) < 16 + length:
      return
    checksums = content[8:12] + content[12 + length : 16 + length]
    expected = (masked_crc32c(content[:8]), masked_crc32c(data))
    assert struct.unpack("<II", checksums) == expected
    yield data
    content = content[16 + length :]


def events(folder):
  """[(step, tag, value)] of all scalars of a run, in the order of the files.

  If the run was started again at a step, older scalars of this step and of
  later ones do not count.
  """
  found = []
  for path in sorted(pathlib.Path(folder).glob("events.out.tfevents.*")):
    for data in records(path.read_bytes()):
      event = event_pb2.Event.FromString(data)
      if event.session_log.status == event_pb2.SessionLog.START:
        found = [x for x in found if x[0] < event.step]
      for value in event.summary.value:
        found.append((event.step, value.tag, value.simple_value))
  return found
