from __future__ import annotations

import torch

from memopt.ops.counter_rng import key_of
from memopt.ops.rounding import stochastic_bits, store_kahan, store_stochastic


def test_stochastic_rounding_has_the_right_mean_and_only_two_neighbours():
    value = torch.full((200_000,), 1.0 + 0.3 * 2**-7)
    target = torch.empty(200_000, dtype=torch.bfloat16)
    store_stochastic(target, value, key_of("x"), 0)
    assert set(target.float().unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(float((target.float() - 1.0).mean() / 2**-7) - 0.3) < 0.005


def test_exact_numbers_and_non_numbers_stay():
    value = torch.tensor([1.0, -2.5, 0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3e38])
    for bits in (0, 1, 0xFFFF):
        result = stochastic_bits(value, torch.full(value.shape, bits))
        assert torch.equal(result[:6].float(), value[:6])
        assert result[6].isnan()


def test_stochastic_rounding_depends_on_key_and_position_only():
    value = torch.randn(1000)
    one, two, three = (torch.empty(1000, dtype=torch.bfloat16) for _ in range(3))
    store_stochastic(one, value, 7, 0)
    store_stochastic(two[:400], value[:400], 7, 0)
    store_stochastic(two[400:], value[400:], 7, 400)
    store_stochastic(three, value, 8, 0)
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_kahan_keeps_what_rounding_loses():
    """A thousand additions of an eighth of a unit in the last place."""
    small, steps = 2.0**-10, 1000
    weight = torch.ones(4, dtype=torch.bfloat16)
    compensation = torch.zeros_like(weight)
    plain = torch.ones(4, dtype=torch.bfloat16)
    for _ in range(steps):
        store_kahan(weight, compensation, weight.float() + compensation.float() + small)
        plain += small
    assert torch.equal(plain, torch.ones(4, dtype=torch.bfloat16))
    total = weight.float() + compensation.float()
    torch.testing.assert_close(total, torch.full((4,), 1 + steps * small), rtol=2**-8, atol=0)
