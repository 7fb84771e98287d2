"""Tables equal their formulas, and rotations have their defining property."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigattn import positions


def test_sincos_1d_is_its_formula():
  table = positions.sincos_1d(5, 6)
  assert table.dtype == np.float32
  for t in range(5):
    angles = [t / 10000 ** (i / 3) for i in range(3)]
    expected = [*np.sin(angles), *np.cos(angles)]
    np.testing.assert_allclose(table[t], expected, atol=1e-6)


def test_sincos_2d_has_the_row_first_and_runs_in_raster_order():
  table = positions.sincos_2d(3, 4, 8).reshape(3, 4, 8)
  one = positions.sincos_1d(4, 4)
  for row in range(3):
    for column in range(4):
      expected = [*one[row], *one[column]]
      np.testing.assert_array_equal(table[row, column], expected)


def heads(length, width=8):
  keys = jax.random.split(jax.random.key(0))
  return (jax.random.normal(k, (2, length, 3, width)) for k in keys)


def test_rope_multiplies_complex_numbers_of_the_two_halves():
  x_BTNH, _ = heads(5)
  found = positions.rope(x_BTNH, np.arange(5), base=100.0)
  number = np.asarray(x_BTNH[..., :4]) + 1j * np.asarray(x_BTNH[..., 4:])
  angle = np.arange(5)[:, None] * 100.0 ** (-2 * np.arange(4) / 8)
  number = number * np.exp(1j * angle)[None, :, None, :]
  expected = np.concatenate([number.real, number.imag], axis=-1)
  np.testing.assert_allclose(found, expected, atol=1e-6)


def scores(rotate, q_position, k_position):
  """The products q . k of two fixed vectors at the given positions."""
  q_BTNH, k_BTNH = heads(1)
  q_BTNH = rotate(q_BTNH, np.array([q_position]))
  k_BTNH = rotate(k_BTNH, np.array([k_position]))
  return jnp.einsum("BTNH,BTNH->BTN", q_BTNH, k_BTNH)


def test_rope_scores_depend_on_the_offset_alone():
  start = scores(positions.rope, 7, 3)
  moved = scores(positions.rope, 107, 103)
  np.testing.assert_allclose(moved, start, atol=1e-4)
  assert abs(scores(positions.rope, 8, 3) - start).min() > 1e-3


def test_rope_2d_scores_depend_on_both_offsets_alone():
  start = scores(positions.rope_2d, (5, 2), (3, 4))
  moved = scores(positions.rope_2d, (25, 12), (23, 14))
  np.testing.assert_allclose(moved, start, atol=1e-4)
  for other in [(6, 2), (5, 3), (2, 5)]:
    assert abs(scores(positions.rope_2d, other, (3, 4)) - start).min() > 1e-3


def test_rope_leaves_position_0_and_the_half_of_the_other_axis():
  x_BTNH, _ = heads(3)
  found = positions.rope(x_BTNH, np.array([0, 1, 2]))
  np.testing.assert_array_equal(found[:, 0], x_BTNH[:, 0])
  place = np.array([(0, 0), (4, 0), (0, 4)])
  found = positions.rope_2d(x_BTNH, place)
  np.testing.assert_array_equal(found[:, 0], x_BTNH[:, 0])
  np.testing.assert_array_equal(found[:, 1, :, 4:], x_BTNH[:, 1, :, 4:])
  np.testing.assert_array_equal(found[:, 2, :, :4], x_BTNH[:, 2, :, :4])
  assert abs(found[:, 1, :, :4] - x_BTNH[:, 1, :, :4]).max() > 0.1


def test_rope_in_bfloat16_rounds_once():
  x_BTNH = next(heads(5)).astype(jnp.bfloat16)
  found = positions.rope(x_BTNH, np.arange(5) + 1000)
  exact = positions.rope(x_BTNH.astype(jnp.float32), np.arange(5) + 1000)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_alibi_slopes_are_the_published_ones():
  eight = [2.0**-i for i in range(1, 9)]
  np.testing.assert_allclose(positions.alibi_slopes(8), eight)
  twelve = [*eight, *(2.0**-i for i in (0.5, 1.5, 2.5, 3.5))]
  np.testing.assert_allclose(positions.alibi_slopes(12), twelve, rtol=1e-6)
  np.testing.assert_allclose(positions.alibi_slopes(1), [2.0**-8])
  assert positions.alibi_slopes(3).shape == (3,)


@pytest.mark.parametrize(
  ("make", "said"),
  [
    (lambda: positions.sincos_1d(3, 5), "width=5"),
    (lambda: positions.sincos_2d(3, 3, 6), "width=6"),
    (lambda: positions.rope(jnp.ones((1, 2, 1, 3)), np.arange(2)), "1, 3"),
    (
      lambda: positions.rope_2d(jnp.ones((1, 2, 1, 6)), np.ones((2, 2))),
      "1, 6",
    ),
  ],
)
def test_width_that_does_not_divide_is_refused(make, said):
  with pytest.raises(ValueError, match=said):
    make()
