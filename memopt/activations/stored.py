"""Where a tensor waits between forward and backward: the `Stored` protocol and its device form.

A `Stored` owns one tensor's bytes. Dropping the last reference to it frees them; nothing else
keeps them alive. Transfers to host memory and SSD are in `cuda.py` and `spill.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from memopt.activations.tensors import digest, nbytes_of, shared_alias, version_of
from memopt.types.errors import RoundTripError, SavedOutputChangedError


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """What a stored tensor is, for messages."""

    region: str
    what: str

    def __str__(self) -> str:
        return f"{self.what} of region {self.region!r}" if self.region else self.what


class Stored(Protocol):
    """One tensor waiting for backward."""

    nbytes: int

    @property
    def fetch_bytes(self) -> int:
        """Device bytes that fetching it takes: none for what is there."""

    def prefetch(self) -> int:
        """Start bringing the tensor to the device; return the device bytes this took."""

    def take(self, *, keep: bool) -> Tensor:
        """Return the tensor on the device.

        Without `keep`, what it holds of the device is given up: it may not be there again.
        """

    def protect(self) -> None:
        """The program is about to write to the source: save the value as it is now."""

    def settle(self) -> None:
        """Become independent of files: the session closes while a graph still lives."""


@runtime_checkable
class LateFailing(Protocol):
    """A Stored whose `take` returns before it is known whether the bytes arrived."""

    def check(self) -> None:
        """Wait until it is known; raise what went wrong."""


class DeviceStored:
    """A tensor kept on the device as an alias of the program's own (no bytes of its own).

    The program may go on to write to it. Writes that the dispatcher shows call `protect` first
    (copy on write); any other shows in the version counter, which the alias shares.
    """

    def __init__(self, tensor: Tensor, label: Label, *, clone_first: bool = False) -> None:
        self.nbytes = nbytes_of(tensor)
        self._label = label
        self._private = clone_first
        self._tensor: Tensor | None = tensor.clone() if clone_first else shared_alias(tensor)
        self._version = version_of(self._tensor)

    fetch_bytes = 0

    def prefetch(self) -> int:
        """Return 0: it is on the device."""
        return 0

    def protect(self) -> None:
        """Copy on write."""
        if not self._private and self._tensor is not None:
            self._check()
            self._tensor = self._tensor.clone()
            self._private = True

    def settle(self) -> None:
        """Nothing: no file is involved."""

    def take(self, *, keep: bool) -> Tensor:
        """Return the tensor; a private copy is copied again where it must serve twice."""
        tensor = self._tensor
        assert tensor is not None, f"{self._label} was given up before"
        if not self._private:
            self._check()
        if not keep:
            self._tensor = None
            return tensor.detach()
        return tensor.clone() if self._private else tensor.detach()

    def _check(self) -> None:
        assert self._tensor is not None
        if version_of(self._tensor) != self._version:
            raise SavedOutputChangedError(
                f"{self._label} is kept for backward and was modified in place after the region "
                f"returned (version {version_of(self._tensor)}, saved at {self._version}); write to "
                "a copy (tensor.clone()), or place it elsewhere (plan='recompute')"
            )


class Hollow:
    """Stands for an op output that nothing needs."""

    nbytes = fetch_bytes = 0

    def __init__(self, tensor: Tensor) -> None:
        self._shape, self._stride = tensor.shape, tensor.stride()
        self._dtype, self._device = tensor.dtype, tensor.device

    @property
    def key(self) -> tuple[Any, ...]:
        """What a proof holds for."""
        return tuple(self._shape), self._stride, self._dtype

    def prefetch(self) -> int:
        """Return 0: there is nothing to bring."""
        return 0

    def protect(self) -> None:
        """Nothing."""

    def settle(self) -> None:
        """Nothing."""

    def take(self, *, keep: bool) -> Tensor:
        """Return NaN in the right shape: whoever reads it shows."""
        del keep
        empty = torch.empty_strided(
            self._shape, self._stride, dtype=self._dtype, device=self._device
        )
        return empty.fill_(float("nan"))


class Checked:
    """A Stored whose bytes are compared, on their return, with what left (`strict=True`)."""

    def __init__(self, inner: Stored, source: Tensor, label: Label) -> None:
        self.nbytes = inner.nbytes
        self._inner = inner
        self._label = label
        self._digest = digest(source)

    @property
    def fetch_bytes(self) -> int:
        """Pass on."""
        return self._inner.fetch_bytes

    def prefetch(self) -> int:
        """Pass on."""
        return self._inner.prefetch()

    def protect(self) -> None:
        """Pass on."""
        self._inner.protect()

    def settle(self) -> None:
        """Pass on."""
        self._inner.settle()

    def take(self, *, keep: bool) -> Tensor:
        """Return the tensor or raise RoundTripError."""
        tensor = self._inner.take(keep=keep)
        if not torch.equal(digest(tensor), self._digest):
            if isinstance(self._inner, LateFailing):
                self._inner.check()
            raise RoundTripError(
                f"{self._label}: {self.nbytes:,} bytes came back different from what was stored; "
                "the memory or disk it went through, or a write that PyTorch does not see, "
                "changed them"
            )
        return tensor
