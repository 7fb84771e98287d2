"""Runs the PTX of a kernel on NumPy arrays, all programs of it, without a GPU.

Interpreters run what a kernel says. This machine runs what the compiler makes
of it: the numbers that each thread has, addresses and swizzles in shared
memory, barriers, the copy engine, the tensor cores, and programs that wait for
each other. Pallas's interpreter knows nothing of the instructions that
kernels/mosaic/grid.py and row_registers.py write, and the products of two tiles
in Triton's are wrong in bfloat16.

It knows the instructions of a token's kernels, and raises an error at others.
All threads see each write at once, so it finds no race, and it knows nothing of
time. A warpgroup is an array of up to 128 lanes. If they part, those that are
furthest behind go on first.
"""

import dataclasses
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.kernels import ptx_tiles
from tests.kernels.ptx_tiles import SHARED, WARP, to_16_bits, to_float32

_DESCRIPTORS = 0x70_0000_0000  # where the descriptors of the copy engine begin
_OF_DESCRIPTOR = 128
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_WAIT = re.compile(
  r"\{\s*\.reg \.pred\s+P1;\s*LAB_WAIT:\s*mbarrier\.try_wait\.parity\.shared"
  r"\.b64 P1, (\[%r\d+\]), (%r\d+), %r\d+;\s*@P1 bra\.uni DONE;\s*bra\.uni\s+"
  r"LAB_WAIT;\s*DONE:\s*\}"
)
_SPIN = re.compile(
  r"\{ \.reg \.pred missing; \.reg \.s32 n; again: ld\.acquire\.gpu\.global"
  r"\.s32 n, (\[%rd\d+\]); setp\.lt\.s32 missing, n, (%r\d+); @missing bra"
  r" again; \}"
)
_STORE_IF_LESS = re.compile(
  r"\{ \.reg \.pred less; setp\.lt\.s32 less, (%r\d+), (\d+); @less (st\S+)"
  r" (\[\S+\]), (%\w+); \}"
)
_PRODUCT = re.compile(
  r"\{ \.reg \.pred p; setp\.ne\.b32 p, 1, 0; (wgmma\.mma_async[^;]*); \}"
)


@dataclasses.dataclass
class _Instruction:
  name: str
  operands: list[str]
  predicate: str = ""  # the lanes that take part, "" for all
  negated: bool = False


@dataclasses.dataclass
class _Barrier:
  """An mbarrier. missing: arrivals; expected: bytes."""

  count: int
  missing: int
  expected: int = 0
  phase: int = 0

  def change(self, arrivals: int, expected: int) -> None:
    self.missing -= arrivals
    self.expected += expected
    assert self.missing >= 0, "more arrivals than a phase has"
    if self.missing == self.expected == 0:
      self.phase, self.missing = self.phase + 1, self.count


class _Program:
  """What the warpgroups of a program share."""

  def __init__(self, number, warpgroups):
    self.number = number
    self.memory = np.zeros(228 * 1024, np.uint8)
    self.barriers = {}
    self.met = [0] * warpgroups  # barriers of all threads, by warpgroup


class Machine:
  """A kernel and its arrays. `run` changes the arrays in place."""

  def __init__(
    self,
    ptx: str,
    arguments: Sequence[np.ndarray | None],
    programs: int,
    copies: Sequence[ptx_tiles.Copy] = (),
  ):
    """ptx: the text of a kernel.

    Args:
      ptx: see above.
      arguments: an array for each parameter, None for the descriptors.
      programs: their number.
      copies: for each descriptor, what the copy engine does: a function of
        coordinates, shared memory and an offset in it that returns the number
        of bytes written, see ptx_tiles.tiles.
    """
    self.code, self.labels = _parsed(ptx)
    self.arguments, self.copies = list(arguments), copies
    self.programs = programs
    threads = int(re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", ptx)[1])
    self.lanes = min(threads, 4 * WARP)
    self.warpgroups = threads // self.lanes

  def run(self) -> None:
    """Lets each warpgroup run until it waits, by turns, until all have ended.

    Raises:
      RuntimeError: if all of them wait.
    """
    programs = [_Program(i, self.warpgroups) for i in range(self.programs)]
    running = [
      _Warpgroup(self, program, i)
      for program in programs
      for i in range(self.warpgroups)
    ]
    while running:
      ran = [warpgroup.go() for warpgroup in running]
      if not any(ran):
        where = {(x.program.number, x.number): x.here() for x in running[:6]}
        raise RuntimeError(f"all warpgroups wait: {where}")
      running = [x for x in running if x.here() is not None]

  def address(self, parameter: int) -> int:
    if self.arguments[parameter] is None:
      return _DESCRIPTORS
    return (parameter + 1) << 32

  def global_memory(self, address: int) -> tuple[np.ndarray, int]:
    """(the bytes of an array, an offset in it)."""
    parameter = (int(address) >> 32) - 1
    assert parameter >= 0, "not the address of an array"
    array = self.arguments[parameter]
    return array.reshape(-1).view(np.uint8), int(address) & 0xFFFFFFFF


def _parsed(ptx):
  """(instructions, the number of the instruction at each label)."""
  ptx = re.sub(r"//.*|\.loc[^\n]*|\.file[^\n]*", "", ptx)
  ptx = _WAIT.sub(r"wait \1, \2;", ptx)
  ptx = _SPIN.sub(r"spin \1, \2;", ptx)
  ptx = _STORE_IF_LESS.sub(r"\3.if_less \4, \5, \1, \2;", ptx)
  ptx = _PRODUCT.sub(r"\1;", ptx)
  body = ptx[ptx.index("{", re.search(r"\.(max|req)ntid", ptx).end()) + 1 :]
  code, labels = [], {}
  for line in re.split(r"[;\n]", body[: body.rindex("ret;") + 4]):
    line = line.strip()
    while label := re.match(r"(\$?\w+):\s*", line):
      labels[label[1]] = len(code)
      line = line[label.end() :]
    if not line or line.startswith((".", "{", "}")):
      continue
    predicate = re.match(r"@(!?)(%p\d+)\s+", line)
    name, _, rest = line[predicate.end() if predicate else 0 :].partition(" ")
    name, _, first = name.partition("\t")
    operands = re.findall(r"\[[^\]]*\]|\{[^}]*\}|[^\s,]+", first + " " + rest)
    instruction = _Instruction(name, operands)
    if predicate:
      instruction.negated = bool(predicate[1])
      instruction.predicate = predicate[2]
    code.append(instruction)
  return code, labels


class _Warpgroup:
  """Up to 128 threads. Registers hold bits, as arrays of unsigned numbers."""

  def __init__(self, machine, program, number):
    self.machine, self.program, self.number = machine, program, number
    self.registers, self.lanes = {}, machine.lanes
    self.place = np.zeros(self.lanes, np.int64)  # each lane's instruction
    self.active = None  # the lanes that take part in an instruction
    self.has_arrived = False  # at the barrier of all threads

  def here(self):
    """The instruction of the lanes that are furthest behind, or None."""
    place = self.place.min()
    code = self.machine.code
    return code[place] if place < len(code) else None

  def go(self) -> bool:
    """Runs until the warpgroup waits or ends; whether it ran at all."""
    ran = False
    while (instruction := self.here()) is not None:
      place = self.place.min()
      lanes = self.place == place
      active = lanes
      if instruction.predicate:
        chosen = self.registers[instruction.predicate]
        active = lanes & (chosen ^ instruction.negated)
      self.active = active
      target = self._run(instruction.name, instruction.operands)
      if target is _WAITS:
        return ran
      self.place[lanes] = place + 1
      if target is not None:
        self.place[active] = target
      ran = True
    return ran

  # Operands.

  def bits(self, name: str, width: int = 32) -> np.ndarray:
    """The operand of each lane, as an unsigned number."""
    if name in self.registers:
      return self.registers[name]
    if name == "%tid.x":
      first = self.number * self.lanes
      return np.arange(first, first + self.lanes, dtype=np.uint32)
    if name == "%ctaid.x":
      value = self.program.number
    elif name.startswith("0f"):
      value = int(name[2:], 16)
    elif name.startswith(("__dynamic_shmem__", "global_smem")):
      value = SHARED
    elif "_param_" in name:
      value = self.machine.address(int(name.rpartition("_")[2]))
    else:
      value = int(name, 0) % (1 << width)
    return np.full(self.lanes, value, _UNSIGNED[width])

  def signed(self, name, width=32):
    return self.bits(name, width).view(_SIGNED[width])

  def floats(self, name):
    return self.bits(name).view(np.float32)

  def set(self, name: str, value: Any, width: int = 32) -> None:
    """Sets the register of the active lanes."""
    type_ = np.bool_ if name.startswith("%p") else _UNSIGNED[width]
    value = np.asarray(value)
    value = value.view(type_) if value.dtype.kind in "fi" else value
    before = self.registers.get(name, np.zeros(self.lanes, type_))
    self.registers[name] = np.where(self.active, value.astype(type_), before)

  def addresses(self, operand):
    name, _, offset = operand.strip("[]").replace(" ", "").partition("+")
    width = 32 if re.match(r"%r\d", name) else 64
    return self.bits(name, width).astype(np.int64) + int(offset or 0)

  def one(self, values):
    """What all active lanes have."""
    [value] = set(values[self.active].tolist())
    return value

  def barrier(self, operand):
    return self.program.barriers[self.one(self.addresses(operand))]

  def bytes_at(self, space, address, size):
    """The bytes at an address of global or shared memory, a view of them."""
    if space == "shared":
      memory, at = self.program.memory, int(address) - SHARED
    else:
      assert space == "global", space
      memory, at = self.machine.global_memory(address)
    assert 0 <= at <= memory.size - size, "beyond the end of an array"
    return memory[at : at + size]

  @staticmethod
  def names(operand):
    """The registers of a vector, or of one number."""
    return operand.strip("{} ").replace(" ", "").split(",")

  # Instructions. They return the number of the next one, if the active lanes
  # go on elsewhere.

  def _run(self, name, operands):
    first, *rest = name.split(".")
    if name in ("wait", "spin"):
      return getattr(self, f"_{name}")(*operands)
    if first in ("prefetch", "fence", "setmaxnreg"):
      return None
    if first == "bra":
      return self.machine.labels[operands[0]]
    if first == "ret":
      return len(self.machine.code)
    if first in _METHODS:
      return getattr(self, f"_{first}")(rest, operands)
    return self._compute(first, rest, operands)

  def _wait(self, barrier, parity):
    if self.barrier(barrier).phase % 2 == self.one(self.bits(parity)):
      return _WAITS
    return None

  def _spin(self, count, least):
    address = self.one(self.addresses(count))
    [count] = self.bytes_at("global", address, 4).view(np.int32)
    return _WAITS if count < self.one(self.signed(least)) else None

  def _bar(self, _, operands):
    assert self.active.all()
    if len(operands) == 2:  # The threads of this warpgroup run together.
      return None
    met = self.program.met
    if not self.has_arrived:
      self.has_arrived = True
      met[self.number] += 1
    if min(met) < met[self.number]:
      return _WAITS
    self.has_arrived = False
    return None

  def _mbarrier(self, kind, operands):
    if kind[0] == "init":
      if self.active.any():
        count = self.one(self.bits(operands[1]))
        address = self.one(self.addresses(operands[0]))
        self.program.barriers[address] = _Barrier(count, count)
      return
    threads = int(self.active.sum())
    if kind[1] == "expect_tx":
      expected = int(self.bits(operands[2])[self.active].sum())
      self.barrier(operands[1]).change(threads, expected)
    else:
      self.barrier(operands[1]).change(threads * int(operands[2]), 0)

  def _cp(self, kind, operands):
    if kind[1] == "bulk":
      self._copy_by_engine(*operands)
    elif kind[1] == "cg":
      self._copy_by_threads(*operands)
    else:  # Copies have ended when they begin.
      assert kind[1] in ("commit_group", "wait_group"), kind

  def _copy_by_engine(self, to, source, barrier):
    """One lane starts it."""
    descriptor, coordinates = re.fullmatch(
      r"\[(%rd\d+), \{(.*)", source
    ).groups()
    coordinates = re.findall(r"%r\d+", coordinates)
    for lane in np.nonzero(self.active)[0]:
      which = int(self.bits(descriptor)[lane]) - _DESCRIPTORS
      copied = self.machine.copies[which // _OF_DESCRIPTOR](
        [int(self.signed(x)[lane]) for x in coordinates],
        self.program.memory,
        int(self.addresses(to)[lane]) - SHARED,
      )
      self.barrier(barrier).change(0, -copied)

  def _copy_by_threads(self, to, source, size, given=None):
    """given: how many bytes are copied; the others become zeros."""
    size, to, source = int(size, 0), self.addresses(to), self.addresses(source)
    given = self.bits(given or str(size))
    for lane in np.nonzero(self.active)[0]:
      numbers, count = np.zeros(size, np.uint8), int(given[lane])
      if count:
        numbers[:count] = self.bytes_at("global", source[lane], count)
      self.bytes_at("shared", to[lane], size)[:] = numbers

  def _wgmma(self, kind, operands):
    if kind[0] != "mma_async":
      return
    results = self.names(operands[0])
    products = ptx_tiles.products_of_warpgroup(
      self.program.memory,
      *(self.one(self.bits(name)) for name in operands[1:3]),
      2 * len(results), kind[-1],
    )  # fmt: skip
    self._add(results, results, products)

  def _mma(self, kind, operands):
    results, left, right, start = map(self.names, operands)
    factors = ([self.bits(x) for x in names] for names in (left, right))
    self._add(results, start, ptx_tiles.products_of_warps(*factors, kind[-2]))

  def _add(self, results, start, products):
    assert self.active.all()
    with np.errstate(all="ignore"):
      sums = [
        self.floats(name) + x for name, x in zip(start, products, strict=True)
      ]
    for name, x in zip(results, sums, strict=True):
      self.set(name, x)

  def _ldmatrix(self, kind, operands):
    names = self.names(operands[0])
    registers = ptx_tiles.load_matrices(
      self.program.memory, self.addresses(operands[1]) - SHARED, len(names),
      "trans" in kind,
    )  # fmt: skip
    for name, x in zip(names, registers, strict=True):
      self.set(name, x)

  def _stmatrix(self, _, operands):
    registers = [self.bits(name) for name in self.names(operands[1])]
    places = self.addresses(operands[0]) - SHARED
    ptx_tiles.store_matrices(self.program.memory, places, registers)

  def _atom(self, kind, operands):
    """Adds, and returns what was there before."""
    assert "add" in kind, kind
    before = np.zeros(self.lanes, np.uint32)
    addresses, added = self.addresses(operands[1]), self.bits(operands[2])
    for lane in np.nonzero(self.active)[0]:
      number = self.bytes_at("global", addresses[lane], 4).view(np.uint32)
      before[lane] = number[0]
      number += added[lane]
    self.set(operands[0], before)

  def _red(self, kind, operands):
    assert "add" in kind, kind
    for lane in np.nonzero(self.active)[0]:
      address = self.addresses(operands[0])[lane]
      self.bytes_at("global", address, 4).view(np.int32)[:] += int(operands[1])

  def _ld(self, kind, operands):
    if kind[0].startswith("param"):
      self.set(operands[0], self.bits(operands[1].strip("[]"), 64), 64)
      return
    width, names = int(kind[-1][1:]), self.names(operands[0])
    addresses = self.addresses(operands[1])
    numbers = np.zeros((len(names), self.lanes), _UNSIGNED[width])
    size = numbers[:, 0].nbytes
    for lane in np.nonzero(self.active)[0]:
      found = self.bytes_at(kind[0], addresses[lane], size)
      numbers[:, lane] = found.view(numbers.dtype)
    for name, number in zip(names, numbers, strict=True):
      self.set(name, number, width)

  def _st(self, kind, operands):
    active = self.active
    if kind[-1] == "if_less":
      kind, bound = kind[:-1], int(operands[3])
      active = active & (self.signed(operands[2]) < bound)
    width = int(kind[-1][1:])
    numbers = np.stack([self.bits(x, width) for x in self.names(operands[1])])
    addresses = self.addresses(operands[0])
    for lane in np.nonzero(active)[0]:
      number = np.ascontiguousarray(numbers[:, lane]).view(np.uint8)
      self.bytes_at(kind[0], addresses[lane], number.size)[:] = number

  def _mov(self, kind, operands):
    if kind[0] == "pred":
      source = self.registers.get(operands[1], operands[1] != "0")
      self.set(operands[0], np.broadcast_to(source, self.lanes))
      return
    to, source = map(self.names, operands)
    width = int(kind[0][1:])
    if len(source) == 1:
      number = self.bits(source[0], width)
    else:
      number = np.zeros(self.lanes, _UNSIGNED[width])
      part = width // len(source)
      for i, name in enumerate(source):
        number |= self.bits(name, part).astype(number.dtype) << i * part
    part = width // len(to)
    for i, name in enumerate(to):
      if name != "_":
        cut = number >> number.dtype.type(i * part)
        self.set(name, cut.astype(_UNSIGNED[part]), part)

  def _shfl(self, kind, operands):
    assert self.active.all()
    assert kind[1] in ("bfly", "idx"), kind
    lane, other = np.arange(self.lanes), self.bits(operands[2]).astype(int)
    first = lane // WARP * WARP
    source = lane ^ other if kind[1] == "bfly" else first + other % WARP
    self.set(operands[0], self.bits(operands[1])[source])

  def _elect(self, _, operands):
    self.set(operands[0].split("|")[1], np.arange(self.lanes) % WARP == 0)

  def _cvta(self, _, operands):
    self.set(operands[0], self.bits(operands[1], 64), 64)

  def _cvt(self, kind, operands):
    to, source = kind[-2:]
    if (to, source) == ("f32", "s32"):
      self.set(operands[0], self.signed(operands[1]).astype(np.float32))
    elif re.fullmatch(r"[sub]\d+ [sub]\d+", f"{to} {source}"):
      width = max(int(to[1:]), 16)
      number = self.bits(operands[1], max(int(source[1:]), 16))
      number = number.astype(_UNSIGNED[int(source[1:])])
      if source[0] == "s":
        number = number.view(_SIGNED[int(source[1:])])
      self.set(operands[0], number.astype(_UNSIGNED[width]), width)
    elif to in ("f16x2", "bf16x2"):  # The first number is the upper half.
      high, low = (to_16_bits(self.floats(x), to) for x in operands[1:])
      self.set(operands[0], high.astype(np.uint32) << 16 | low)
    elif to == "f32" and source in ("f16", "bf16"):
      self.set(operands[0], to_float32(self.bits(operands[1], 16), source))
    else:
      assert to in ("f16", "bf16"), kind
      assert source == "f32", kind
      self.set(operands[0], to_16_bits(self.floats(operands[1]), to), 16)

  def _setp(self, kind, operands):
    width = int(kind[1][1:])
    read = {"s": self.signed, "f": lambda x, _: self.floats(x)}.get(
      kind[1][0], self.bits
    )
    x, y = (read(name, width) for name in operands[1:])
    self.set(operands[0], getattr(operator, kind[0])(x, y))

  def _selp(self, kind, operands):
    width = int(kind[0][1:])
    x, y = (self.bits(name, width) for name in operands[1:3])
    self.set(operands[0], np.where(self.bits(operands[3]), x, y), width)

  def _compute(self, name, kind, operands):
    to, *names = operands
    type_ = kind[-1]
    with np.errstate(all="ignore"):
      if type_ == "pred":
        self.set(to, _LOGIC[name](*(self.registers[x] for x in names)))
      elif type_ == "f32":
        self.set(to, _FLOATS[name](*map(self.floats, names)))
      elif "f" in type_:
        self._halves(name, to, names, type_)
      else:
        self._integers(name, kind, to, names)

  def _halves(self, name, to, names, type_):
    """Numbers of 16 bits, or pairs of them."""
    pair = type_.endswith("x2")
    numbers = [self.bits(x, 32 if pair else 16) for x in names]
    parts = [
      to_16_bits(
        _FLOATS[name](
          *(to_float32((x >> shift).astype(np.uint16), type_) for x in numbers)
        ),
        type_,
      )
      for shift in ((0, 16) if pair else (0,))
    ]
    found = parts[0].astype(np.uint32)
    if pair:
      found |= parts[1].astype(np.uint32) << 16
    self.set(to, found, 32 if pair else 16)

  def _integers(self, name, kind, to, names):
    """Exact integers of Python, of which the register keeps the lower bits."""
    width, is_signed = int(kind[-1][1:]), kind[-1][0] == "s"
    read = self.signed if is_signed else self.bits
    widths = [width] * len(names)
    if name in ("shl", "shr", "bfe"):
      widths[1:] = [32] * (len(names) - 1)
    if kind[0] == "wide":  # The result and what is added are twice as wide.
      width *= 2
      widths[2:] = [width] * (len(names) - 2)
    columns = [read(x, y).tolist() for x, y in zip(names, widths, strict=True)]
    if name == "mul" and kind[0] == "hi":
      found = [x * y >> width for x, y in zip(*columns, strict=True)]
    elif name == "bfe":
      found = [_field(*x, is_signed) for x in zip(*columns, strict=True)]
    else:
      found = [_INTEGERS[name](*x) for x in zip(*columns, strict=True)]
    if kind[0] == "relu":
      found = [max(x, 0) for x in found]
    numbers = [x % (1 << width) for x in found]
    self.set(to, np.array(numbers, _UNSIGNED[width]), width)


_WAITS = object()
_METHODS = (
  "atom", "bar", "cp", "cvt", "cvta", "elect", "ld", "ldmatrix", "mbarrier",
  "mma", "mov", "red", "selp", "setp", "shfl", "st", "stmatrix", "wgmma",
)  # fmt: skip
_LOGIC: Mapping[str, Any] = {
  "and": operator.and_, "or": operator.or_, "not": operator.invert,
  "xor": operator.xor,
}  # fmt: skip
_FLOATS: Mapping[str, Any] = {
  "add": operator.add, "sub": operator.sub, "mul": operator.mul,
  "div": operator.truediv, "rsqrt": lambda x: 1 / np.sqrt(x),
  "ex2": np.exp2, "neg": operator.neg, "abs": np.abs, "max": np.fmax,
  "min": np.fmin,
  "fma": lambda x, y, z: (x.astype(np.float64) * y + z).astype(np.float32),
}  # fmt: skip
_INTEGERS: Mapping[str, Any] = {
  "add": operator.add, "sub": operator.sub, "mul": operator.mul,
  "mad": lambda x, y, z: x * y + z, "neg": operator.neg,
  "and": operator.and_, "or": operator.or_, "xor": operator.xor,
  "shl": operator.lshift, "shr": operator.rshift, "min": min, "max": max,
  "abs": abs,
}  # fmt: skip


def _field(x, first, length, is_signed):
  """The bits of x from `first` on."""
  found = (x >> first) % (1 << length)
  if is_signed and found >> length - 1:
    found -= 1 << length
  return found
