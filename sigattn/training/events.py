"""Writes TensorBoard's event files from the calling thread.

tensorboardX's own writer leaves events in a queue. They are lost when the
process is killed. If the disk is full, the thread that empties the queue ends,
and the process waits for ever.
"""

import os
import pathlib
import socket
import struct
import time
from collections.abc import Mapping

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

from sigattn.training import files


class EventFile:
  """A new event file in a run's folder.

  A run has one for each start. TensorBoard reads them in the order of their
  names, and drops from earlier files the steps that this one repeats.
  """

  def __init__(self, folder: str | os.PathLike[str], start: int) -> None:
    """Creates the file.

    Args:
      folder: of the run.
      start: the step that the run resumes from; 0 for a new run.
    """
    now = int(time.time())
    for path in pathlib.Path(folder).glob("events.out.tfevents.*"):
      stamp = path.name.split(".")[3]
      if stamp.isdecimal():  # the clock may be behind that of the last start
        now = max(now, int(stamp) + 1)
    name = f"events.out.tfevents.{now:010d}.{socket.gethostname()}"
    self._path = pathlib.Path(folder) / name
    with files.naming(self._path):
      self._file = self._path.open("xb", buffering=0)
    self._write(event_pb2.Event(file_version="brain.Event:2"))
    # A run that was killed before its first checkpoint starts from 0 again.
    purge = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(event_pb2.Event(step=start + 1, session_log=purge))

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes the scalars {"train/loss": 1.5, ...} of a step as one event.

    Afterwards the operating system has the event, so that a kill does not lose
    it. Raises OSError if it cannot be written.
    """
    values = [
      summary_pb2.Summary.Value(tag=name, simple_value=value)
      for name, value in scalars.items()
    ]
    summary = summary_pb2.Summary(value=values)
    self._write(event_pb2.Event(step=step, summary=summary))

  def _write(self, event):
    event.wall_time = time.time()
    data = event.SerializeToString()
    header = struct.pack("<Q", len(data))
    record = header + struct.pack("<I", masked_crc32c(header))
    record += data + struct.pack("<I", masked_crc32c(data))
    with files.naming(self._path):
      files.append(self._file, record)

  def close(self) -> None:
    """Closes the file."""
    self._file.close()
