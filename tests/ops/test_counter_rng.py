from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.ops.counter_rng import bits_at, key_of, random_bits, random_subset, random_subsets

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=100)
@given(key=st.integers(0, 2**64 - 1), index=st.integers(0, 2**40))
def test_tensor_and_integer_agree(key, index):
    assert int(random_bits(key, torch.tensor([index]))[0]) == bits_at(key, index)


def test_bits_look_random():
    bits = random_bits(key_of("a"), torch.arange(1 << 16))
    assert bits.min() >= 0
    assert bits.max() < 2**32
    for position in (0, 7, 15, 16, 31):
        mean = (bits.bitwise_right_shift(position) & 1).double().mean()
        assert abs(float(mean) - 0.5) < 0.01
    assert bits.unique().numel() > 65_500
    low, high = (bits & 0xFFFF).double(), bits.bitwise_right_shift(16).double()
    assert abs(float(torch.corrcoef(torch.stack([low, high]))[0, 1])) < 0.02


@settings(deadline=None, max_examples=50)
@given(key=st.integers(0, 2**64 - 1), size=st.integers(1, 300), data=st.data())
def test_subset_is_exact_ascending_and_the_same_in_a_batch(key, size, data):
    count = data.draw(st.integers(0, size))
    one = random_subset(key, size, count, CPU)
    assert one.numel() == count == one.unique().numel()
    assert torch.equal(one, one.sort().values)
    assert count == 0 or (one.min() >= 0 and one.max() < size)
    batch = random_subsets([key, key ^ 5, key], size, count, CPU)
    assert torch.equal(batch[0], one)
    assert torch.equal(batch[2], one)


def test_keys_tell_parts_apart():
    assert key_of(1, 23) != key_of(12, 3)
    assert key_of(0, 1, "a") != key_of(0, 1, "b")


@pytest.mark.parametrize(
    "parts", [("w",), (3,), ("", "w"), (1, 1, "w"), (True, 1, "w"), (1.0, "1", "w")]
)
def test_a_key_is_the_hash_of_its_parts_texts(parts):
    text = "\x1f".join(str(part) for part in parts).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    assert key_of(*parts) == int.from_bytes(digest, "little")


def test_the_draw_is_fixed_for_ever():
    """A checkpoint of today must find its selection tomorrow."""
    assert key_of(0, 0, "w") == 10017517081798492175
    assert random_subset(key_of(0, 0, "w"), 10, 5, CPU).tolist() == [3, 5, 6, 7, 9]
