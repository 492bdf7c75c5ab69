"""Many small copies between device and host as one: what a page-locked link needs to reach its speed.

A copy of 256 KiB takes the link 5 microseconds, and a Python call for each takes longer. CUDA 12.8 has a call for a
whole batch (``cudaMemcpyBatchAsync``); where the driver is older, the native part loops in C. The reference is a loop
of ``Tensor.copy_``.

The copies of a batch have no order among themselves: none may read what another writes.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from memopt.ops.native import cuda_status
from memopt.types.errors import NativeUnavailable

__all__ = ["Copies", "copies_status", "copy_batch"]

Impl = Literal["auto", "native", "loop", "reference"]


class _CCopies(ctypes.Structure):
    """memopt_copies in csrc/cuda/launchers.h."""

    _fields_ = (
        ("destinations", ctypes.c_void_p),
        ("sources", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
    )


@lru_cache(maxsize=1)
def _native() -> tuple[Any, bool, str]:
    """Return the library (or None), whether it can batch, and why either is not so."""
    status = cuda_status()
    if not status.available:
        return None, False, status.reason
    library = ctypes.CDLL(status.path)
    try:
        has_batches = bool(library.memopt_copy_has_batches())
    except AttributeError:
        return None, False, f"{status.path} was built before batched copies; build it again"
    library.memopt_copy.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    reason = "" if has_batches else "the CUDA driver is older than 12.8: copies are looped over"
    return library, has_batches, reason


def copies_status() -> tuple[bool, str]:
    """Return whether copies are native, and what that lacks ("" when they are batched)."""
    library, _, reason = _native()
    return library is not None, reason


class Copies:
    """Copies by address that are to be queued together: the fast path, without a check of what the addresses are."""

    __slots__ = ("destinations", "nbytes", "sizes", "sources")

    def __init__(self) -> None:
        self.destinations: list[int] = []
        self.sources: list[int] = []
        self.sizes: list[int] = []
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self.sizes)

    def add(self, destination: int, source: int, nbytes: int) -> None:
        """Add one copy of ``nbytes`` (more than 0) between device and page-locked memory."""
        self.destinations.append(destination)
        self.sources.append(source)
        self.sizes.append(nbytes)
        self.nbytes += nbytes

    def queue(self, stream: int, *, batched: bool = True) -> None:
        """Queue the copies on a ``cudaStream_t`` whose device is the current one.

        Raises:
            NativeUnavailable: the library is not there.
            RuntimeError: CUDA refused a copy.
        """
        library, has_batches, reason = _native()
        if library is None:
            raise NativeUnavailable(reason)
        count = len(self)
        pointers = ctypes.c_void_p * count
        destinations, sources = pointers(*self.destinations), pointers(*self.sources)
        sizes = (ctypes.c_size_t * count)(*self.sizes)
        copies = _CCopies(
            ctypes.addressof(destinations),
            ctypes.addressof(sources),
            ctypes.addressof(sizes),
            count,
        )
        use_batch = batched and has_batches and stream != 0
        code = library.memopt_copy(ctypes.byref(copies), int(use_batch), stream)
        if code:
            raise RuntimeError(f"CUDA refused a batch of {count} copies: error {code}")


def copy_batch(
    destinations: Sequence[Tensor],
    sources: Sequence[Tensor],
    stream: torch.cuda.Stream | None = None,
    *,
    impl: Impl = "auto",
) -> None:
    """Copy each source to its destination, asynchronously, in no order among the copies.

    ``for d, s in zip(destinations, sources): d.copy_(s, non_blocking=True)`` on ``stream``.

    Args:
        destinations: contiguous tensors of one CUDA device, or contiguous host tensors; no two overlap.
        sources: as many, with the same dtypes and shapes, on the other side. Host tensors must be page-locked for
            native copies.
        stream: where to queue; the current one when omitted.
        impl: "native" batches and raises where that is not built; "loop" is the native loop; "reference" is PyTorch;
            "auto" is native where it can be.

    Raises:
        ValueError: counts, shapes, dtypes or devices that do not match, or tensors that are not contiguous.
        NativeUnavailable: ``impl`` asks for native copies that this machine cannot do.
    """
    device = _check(destinations, sources, impl)
    if impl != "reference" and not (
        impl == "auto" and not _can_be_native(device, destinations, sources)
    ):
        _copy_native(device, destinations, sources, stream, batched=impl != "loop")
        return
    with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
        for destination, source in zip(destinations, sources, strict=True):
            destination.copy_(source, non_blocking=True)


def _copy_native(
    device: torch.device | None,
    destinations: Sequence[Tensor],
    sources: Sequence[Tensor],
    stream: torch.cuda.Stream | None,
    *,
    batched: bool,
) -> None:
    library, _, reason = _native()
    if library is None or device is None:
        raise NativeUnavailable(reason or "native copies are between a CUDA device and the host")
    if not _is_locked(destinations, sources):
        raise ValueError(
            "native copies need page-locked host tensors; use pin_memory or impl='auto'"
        )
    copies = Copies()
    for destination, source in zip(destinations, sources, strict=True):
        if source.nbytes:
            copies.add(destination.data_ptr(), source.data_ptr(), source.nbytes)
    if copies:
        with torch.cuda.device(device):
            queue = stream if stream is not None else torch.cuda.current_stream(device)
            copies.queue(queue.cuda_stream, batched=batched)


def _can_be_native(
    device: torch.device | None, destinations: Sequence[Tensor], sources: Sequence[Tensor]
) -> bool:
    return device is not None and _native()[0] is not None and _is_locked(destinations, sources)


def _is_locked(destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> bool:
    host = (t for t in (*destinations, *sources) if t.device.type == "cpu" and t.nbytes)
    return all(tensor.is_pinned() for tensor in host)


def _check(
    destinations: Sequence[Tensor], sources: Sequence[Tensor], impl: str
) -> torch.device | None:
    """Raise where the lists do not match; return the CUDA device of the batch, or None without one."""
    if impl not in ("auto", "native", "loop", "reference"):
        raise ValueError(
            f"impl={impl!r} is unknown; choose 'auto', 'native', 'loop' or 'reference'"
        )
    if len(destinations) != len(sources):
        raise ValueError(f"{len(destinations)} destinations for {len(sources)} sources")
    for i, (to, by) in enumerate(zip(destinations, sources, strict=True)):
        if to.shape != by.shape or to.dtype != by.dtype:
            raise ValueError(
                f"copy {i}: {tuple(by.shape)} of {by.dtype} does not fit {tuple(to.shape)} of {to.dtype}"
            )
        if not to.is_contiguous() or not by.is_contiguous():
            raise ValueError(f"copy {i}: only contiguous tensors are copied; call .contiguous()")
    places = {(d.device, s.device) for d, s in zip(destinations, sources, strict=True)}
    if len(places) > 1:
        raise ValueError(
            f"the copies of a batch must have one direction, these have {len(places)}: "
            + ", ".join(sorted(f"{s} to {d}" for d, s in places))
        )
    pair = next(iter(places), (torch.device("cpu"),) * 2)
    cuda = [device for device in pair if device.type == "cuda"]
    return cuda[0] if len(cuda) == 1 else None
