from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.ops.quantize import BLOCK, dequantize, num_blocks, quantize


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 1000), signed=st.booleans(), exponent=st.integers(-30, 20))
def test_round_trip_error(size, signed, exponent):
    torch.manual_seed(size)
    value = torch.randn(size) * 2.0**exponent
    value = value if signed else value.square()
    codes, scales = quantize(value, signed=signed)
    assert codes.shape == (size,)
    assert codes.dtype == torch.uint8
    assert scales.shape == (num_blocks(size),)
    back = dequantize(codes, scales, signed=signed)
    scale = scales.repeat_interleave(BLOCK)[:size]
    unit = (value.abs() / scale).clamp(0, 1)
    # half a level, in the companded domain: d(unit) = 2 sqrt(unit)/254 or 4 unit^(3/4)/510
    bound = (
        unit.sqrt() / 127 + 1 / 127**2 if signed else 4 * unit**0.75 / 510 + 2e-4 * unit**0.5 + 1e-9
    )
    assert ((back - value).abs() <= bound * scale * 1.01 + 1e-45).all()


def test_zero_is_exact_and_fresh_memory_is_zero():
    for signed in (True, False):
        value = torch.zeros(300)
        value[7] = 3.0
        codes, scales = quantize(value, signed=signed)
        back = dequantize(codes, scales, signed=signed)
        assert torch.equal(back, value)
        fresh = dequantize(torch.zeros(256, dtype=torch.uint8), torch.ones(1), signed=signed)
        assert not fresh.any()


def test_a_second_moment_never_becomes_zero():
    value = torch.tensor([1.0] + [1e-30] * 255)
    codes, scales = quantize(value, signed=False)
    assert (dequantize(codes, scales, signed=False) > 0).all()


def test_largest_number_of_a_block_is_kept():
    torch.manual_seed(0)
    value = torch.randn(BLOCK * 4)
    codes, scales = quantize(value, signed=True)
    back = dequantize(codes, scales, signed=True)
    for block in range(4):
        run = slice(block * BLOCK, (block + 1) * BLOCK)
        at = value[run].abs().argmax()
        assert back[run][at] == pytest.approx(float(value[run][at]), rel=1e-6)


def test_stochastic_codes_have_the_right_mean():
    """In the companded domain: the level's mean is the level."""
    torch.manual_seed(0)
    value = torch.full((BLOCK,), 0.3141)
    value[0] = 1.0
    levels = []
    for _ in range(300):
        codes, _ = quantize(value, signed=True, random=torch.rand(BLOCK))
        levels.append(codes.view(torch.int8)[1:].float().mean())
    exact = 0.3141**0.5 * 127
    assert torch.stack(levels).mean() == pytest.approx(exact, abs=0.02)
    nearest, _ = quantize(value, signed=True)
    assert abs(float(nearest[1]) - exact) > 0.05


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_number_breaks_its_block_and_no_other(bad, signed, random):
    value = torch.rand(3 * BLOCK - 5) + 0.1
    value[BLOCK + 7] = bad
    noise = torch.rand(value.numel()) if random else None
    codes, scales = quantize(value, signed=signed, random=noise)
    back = dequantize(codes, scales, signed=signed)
    assert back[BLOCK : 2 * BLOCK].isnan().all()
    assert scales.isnan().tolist() == [False, True, False]
    assert not codes[BLOCK : 2 * BLOCK].any()  # the same bytes on every machine
    finite = torch.cat([back[:BLOCK], back[2 * BLOCK :]])
    torch.testing.assert_close(
        finite, torch.cat([value[:BLOCK], value[2 * BLOCK :]]), rtol=0.1, atol=0
    )
