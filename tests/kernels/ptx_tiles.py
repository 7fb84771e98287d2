"""Tiles of ptx_machine.py: how copies and the tensor cores lay them out.

Offsets are those of an array of bytes, the shared memory of a program. Its
addresses begin at SHARED. Lane t of a warp has row t / 4 and columns 2 (t % 4)
and the next of an 8 x 8 tile, as the two halves of a register.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

SHARED = 0x400  # the first address of shared memory
WARP = 32
_LANE = np.arange(WARP)
_ROW, _COLUMN = _LANE // 4, _LANE % 4 * 2

Copy = Callable[[list[int], np.ndarray, int], int]


def to_float32(bits: np.ndarray, dtype: str) -> np.ndarray:
  """Numbers of 16 bits. dtype: its name in PTX, such as bf16."""
  type_ = jnp.bfloat16 if dtype.startswith("b") else np.float16
  return np.ascontiguousarray(bits, np.uint16).view(type_).astype(np.float32)


def to_16_bits(numbers: np.ndarray, dtype: str) -> np.ndarray:
  """The bits of numbers that are rounded to a dtype of 16 bits."""
  type_ = jnp.bfloat16 if dtype.startswith("b") else np.float16
  return np.asarray(numbers, np.float32).astype(type_).view(np.uint16)


def swizzled(address: Any) -> Any:
  """Where the copy engine puts the byte of an address, by 128 bytes."""
  return address ^ ((address >> 7 & 7) << 4)


def tiles(array: np.ndarray, rows: int, columns: int) -> Copy:
  """The copies of blocks from an array (n, m) of 16 bits, for Machine.

  A block lies in tiles of 8 x 64 numbers, each of which is swizzled. Rows
  beyond the last become zeros. rows, columns: of a block.
  """

  def copy(coordinates, memory, offset):
    first_row = coordinates[-1] * 8 if len(coordinates) == 4 else coordinates[1]
    first_column = coordinates[2] * 64
    block = np.zeros((rows, columns), np.uint16)
    found = array[
      first_row : first_row + rows, first_column : first_column + columns
    ]
    block[: len(found)] = found
    of_tiles = block.reshape(rows // 8, 8, columns // 64, 64).swapaxes(1, 2)
    numbers = np.ascontiguousarray(of_tiles).reshape(-1).view(np.uint8)
    places = swizzled(np.arange(numbers.size) + offset + SHARED) - SHARED
    memory[places] = numbers
    return numbers.size

  return copy


def boxes(array: np.ndarray, box: Sequence[int]) -> Copy:
  """The copies of boxes from an array of 16 bits, without a swizzle.

  The copy engine knows no sides of 1.
  """
  box = [n for n, side in zip(box, array.shape, strict=True) if side > 1]
  array = array.squeeze()

  def copy(coordinates, memory, offset):
    begin = coordinates[::-1]
    place = tuple(slice(x, x + n) for x, n in zip(begin, box, strict=True))
    numbers = np.ascontiguousarray(array[place]).reshape(-1).view(np.uint8)
    assert numbers.size == 2 * np.prod(box), "beyond the end of an array"
    memory[offset : offset + numbers.size] = numbers
    return numbers.size

  return copy


def products_of_warpgroup(
  memory: np.ndarray, left: int, right: int, columns: int, dtype: str
) -> list[np.ndarray]:
  """What wgmma adds to each register: left (64, 16) times right (columns, 16)'.

  left, right: descriptors of factors in shared memory.
  """

  def factor(descriptor, rows):
    assert descriptor >> 62 == 1, "not swizzled by 128 bytes"
    first, apart = ((descriptor >> x & 0x3FFF) << 4 for x in (0, 32))
    row = np.arange(rows)[:, None]
    place = first + row // 8 * apart + row % 8 * 128 + 2 * np.arange(16)
    place = swizzled(place) - SHARED
    low, high = (memory[place + i].astype(np.uint16) for i in range(2))
    return to_float32(low | high << 8, dtype)

  with np.errstate(all="ignore"):
    products = factor(left, 64) @ factor(right, columns).T
  of_warps = products.reshape(4, 16, columns)
  return [
    of_warps[:, _ROW + 8 * (i // 2), 8 * j + _COLUMN + i % 2].reshape(-1)
    for j in range(columns // 8)
    for i in range(4)
  ]


def products_of_warps(
  left: Sequence[np.ndarray], right: Sequence[np.ndarray], dtype: str
) -> list[np.ndarray]:
  """What mma.m16n8k16 adds to each register.

  left, right: the four and two registers of its factors.
  """
  warps = left[0].size // WARP
  a = np.zeros((warps, 16, 16), np.float32)
  b = np.zeros((warps, 16, 8), np.float32)
  for half in range(2):
    for i, register in enumerate(left):
      numbers = _half(register, half, dtype)
      a[:, _ROW + 8 * (i % 2), _COLUMN + half + 8 * (i // 2)] = numbers
    for i, register in enumerate(right):
      b[:, _COLUMN + half + 8 * i, _ROW] = _half(register, half, dtype)
  with np.errstate(all="ignore"):
    products = a @ b
  return [
    products[:, _ROW + 8 * (i // 2), _COLUMN + i % 2].reshape(-1)
    for i in range(4)
  ]


def _half(register, half, dtype):
  bits = (register >> np.uint32(16 * half)).astype(np.uint16)
  return to_float32(bits, dtype).reshape(-1, WARP)


def load_matrices(
  memory: np.ndarray, places: np.ndarray, count: int, transposed: bool
) -> list[np.ndarray]:
  """The registers that ldmatrix sets. places: the offset that each lane has."""
  rows = _rows_of_matrices(places, count)
  found = memory[rows[..., None] + np.arange(16)].view(np.uint16)
  if transposed:
    found = found.swapaxes(2, 3)
  low, high = (
    found[:, :, _ROW, _COLUMN + i].astype(np.uint32) for i in range(2)
  )
  return list((low | high << 16).swapaxes(0, 1).reshape(count, -1))


def store_matrices(
  memory: np.ndarray, places: np.ndarray, registers: Sequence[np.ndarray]
) -> None:
  """What stmatrix writes, the reverse of load_matrices."""
  rows = _rows_of_matrices(places, len(registers))
  for i, register in enumerate(registers):
    numbers = np.ascontiguousarray(register.reshape(-1, 8, 4)).view(np.uint8)
    memory[rows[:, i, :, None] + np.arange(16)] = numbers


def _rows_of_matrices(places, count):
  """The offsets of the rows, (warps, count, 8)."""
  return places.reshape(-1, WARP)[:, : 8 * count].reshape(-1, count, 8)
