"""Random numbers that are a pure function of (key, index).

Selections and stochastic rounding must give the same bits on every rank, in every process, after
every resume, on every device, in PyTorch and in the CUDA kernel, and must never touch a global
generator. So there is no generator at all: a 64-bit key is hashed from text such as
(seed, round, parameter name), and the number at position i is an integer hash of the key and i.
The mixer is the 32-bit `lowbias32` of Chris Wellons' hash prospector
(https://nullprogram.com/blog/2018/07/31/).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from memopt.ops.transfer import to_device

MASK32 = 0xFFFFFFFF
_FIRST, _SECOND, _HIGH = 0x7FEB352D, 0x846CA68B, 0x9E3779B9


def key_of(*parts: object) -> int:
    """Return a 64-bit key of the parts' texts, e.g. `key_of(seed, round, name)`."""
    *head, last = parts
    hasher = _begun(*head).copy()
    hasher.update(str(last).encode())
    return int.from_bytes(hasher.digest(), "little")


@lru_cache(maxsize=64, typed=True)  # a switch needs the keys of many names for one (seed, round)
def _begun(*parts: object) -> hashlib.blake2b:
    return hashlib.blake2b("".join(f"{part}\x1f" for part in parts).encode(), digest_size=8)


def mix32(value: int) -> int:
    """Hash one unsigned 32-bit integer to another (a bijection)."""
    value &= MASK32
    value = ((value ^ (value >> 16)) * _FIRST) & MASK32
    value = ((value ^ (value >> 15)) * _SECOND) & MASK32
    return value ^ (value >> 16)


def bits_at(key: int, index: int) -> int:
    """Return the 32 random bits of `key` at one position; equal to `random_bits` there."""
    low, high = key & MASK32, (key >> 32) & MASK32
    mixed = mix32((index & MASK32) ^ low)
    return mix32(mixed ^ high ^ (((index >> 32) * _HIGH) & MASK32))


def _mix32_tensor(value: Tensor) -> Tensor:
    # int64 products wrap modulo 2**64, whose low 32 bits are those of the unsigned product.
    value = value.bitwise_xor(value.bitwise_right_shift(16)).mul_(_FIRST).bitwise_and_(MASK32)
    value = value.bitwise_xor(value.bitwise_right_shift(15)).mul_(_SECOND).bitwise_and_(MASK32)
    return value.bitwise_xor(value.bitwise_right_shift(16))


def random_bits(key: int, index: Tensor) -> Tensor:
    """Return 32 random bits (int64, in [0, 2**32)) for each position of `index` (int64)."""
    low, high = key & MASK32, (key >> 32) & MASK32
    mixed = _mix32_tensor(index.bitwise_and(MASK32).bitwise_xor_(low))
    mixed.bitwise_xor_(high)
    mixed.bitwise_xor_(index.bitwise_right_shift(32).mul_(_HIGH).bitwise_and_(MASK32))
    return _mix32_tensor(mixed)


def random_subsets(keys: Sequence[int], size: int, count: int, device: torch.device) -> Tensor:
    """Return `random_subset` of every key: (len(keys), count), in a few launches for all."""
    halves = [[key & MASK32 for key in keys], [(key >> 32) & MASK32 for key in keys]]
    low, high = to_device(halves, torch.int64, device).unsqueeze(2)
    position = torch.arange(size, device=device)
    rank = _mix32_tensor(_mix32_tensor(position.bitwise_xor(low)).bitwise_xor_(high))
    rank = rank.bitwise_right_shift_(1).bitwise_left_shift_(32).bitwise_or_(position)
    chosen = rank.sort(dim=1).values[:, :count].bitwise_and(MASK32)
    return chosen.sort(dim=1).values


def random_subset(key: int, size: int, count: int, device: torch.device) -> Tensor:
    """Return `count` distinct positions of `range(size)`, uniformly drawn, ascending (int64).

    The positions with the smallest (hash, position) win, so the draw is the same on all devices.
    """
    return random_subsets([key], size, count, device)[0]
