"""Transfers of a CUDA device: a stream out, a stream in, a bounded window, landing buffers.

Ordering, the field's worst bug, in four rules:
1. Out: the copy stream waits for the compute stream at the point of `store`. The source stays
   referenced until the compute stream has waited for the copy, or the copy is seen finished; so
   the caching allocator (which is ordered by the compute stream) never hands its memory to a
   kernel that runs before the copy has read it. No `record_stream`.
2. In: landing buffers are allocated while the compute stream is current, and the copy stream
   waits for that point: whatever used this memory before has finished by then.
3. A landing is a value, `Landing(tensor, event)`. Whoever takes it makes the compute stream wait;
   one that is dropped without being taken makes the compute stream wait first.
4. A host block returns to the pool with the event of the copy that last touched it.
Streams are looked up when used, never cached across devices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from memopt.activations.batch import LARGE_BYTES, CopiesIn, can_batch
from memopt.activations.chain import WORDS_BYTES, Chain, open_chain
from memopt.activations.spill import SpillArea
from memopt.activations.stored import Label, Stored
from memopt.activations.tensors import flat_elements, nbytes_of, shared_alias, version_of
from memopt.activations.transfers import LinkDirection, Moved
from memopt.memory.pinned import HostBuffer, HostPool
from memopt.types.errors import SavedOutputChangedError
from memopt.types.plan import Placement

_WAITS_A_POLL = 8
_MOST_WAITS = 1024
"""That many are kept to be added up, in pairs of events: a step may have more of them than polls can add up."""


class Landing:
    """A tensor on its way to the device: `(tensor, event)`; dropping it frees the memory."""

    __slots__ = ("_stream", "event", "tensor")

    def __init__(self, tensor: Tensor, event: Any, stream: Any) -> None:
        self.tensor: Tensor | None = tensor
        self.event = event
        self._stream = stream

    def take(self) -> Tensor:
        """Make the current stream wait for the copy and return the tensor."""
        tensor = self.tensor
        assert tensor is not None, "a landing is taken once"
        self.tensor = None
        torch.cuda.current_stream(tensor.device).wait_event(self.event)
        return tensor

    def __del__(self) -> None:
        """Keep the memory from being reused before the copy into it has ended."""
        if self.tensor is not None:
            self._stream.wait_event(self.event)


class Outgoing:
    """A copy out that may still read its source."""

    __slots__ = ("done", "label", "nbytes", "source", "version")

    def __init__(self, source: Tensor, done: Any, label: Label) -> None:
        self.source: Any = source
        self.version: int | None = version_of(source)
        self.done = done
        self.nbytes = nbytes_of(source)
        self.label = label


class CudaTransfers:
    """Transfers of one CUDA device.

    Args:
        device: the device.
        host: page-locked blocks; their cap is the host budget.
        spill: SSD area, or None.
        window_bytes: at most this much source memory is held by copies out.
    """

    def __init__(
        self, device: torch.device, host: HostPool, spill: SpillArea | None, window_bytes: int
    ) -> None:
        self.device = device
        self.host = host
        self.moved = Moved()
        self.window_bytes = window_bytes
        self.spill = spill
        self.chain, self.chain_reason = self._open_chain(device, spill)
        """The native way to SSD, or None and why transfers are driven from Python ("": there is no SSD)."""
        self.out_stream = torch.cuda.Stream(device)
        self.in_stream = torch.cuda.Stream(device)
        self._copies_in: CopiesIn | None = None
        self._outgoing: deque[Outgoing] = deque()
        self._outgoing_bytes = 0
        self._waits: deque[tuple[Any, Any, str]] = deque()
        self.exposed_by: dict[str, float] = {}

    @staticmethod
    def _open_chain(device: torch.device, spill: SpillArea | None) -> tuple[Chain | None, str]:
        if spill is None:
            return None, ""
        return open_chain(device, spill.store, spill.staging.cap_bytes)

    def store(
        self, tensor: Tensor, placement: Placement, label: Label, *, clone_first: bool, wait: bool
    ) -> Stored | None:
        """Start the copy out; see the protocol."""
        stored: Stored | None
        if placement == "ssd" and self.chain is not None:
            from memopt.activations.chain_stored import ChainStored

            stored = ChainStored.begin(tensor, self, label, clone=clone_first)
        elif placement == "ssd":
            from memopt.activations.cuda_spill import CudaSpillStored

            stored = CudaSpillStored.begin(tensor, self, label, clone=clone_first)
        else:
            buffer = self.host.try_take(nbytes_of(tensor), wait=wait)
            stored = None
            if buffer is None and not wait and self.host.is_locking:
                self.moved.num_early += 1
                return None
            if buffer is not None:
                source = tensor.clone() if clone_first else shared_alias(tensor)
                stored = HostStored(source, buffer, self.copy_out(source, buffer, label), self)
        return stored

    def full(self, placement: Placement) -> str:
        """Host memory, or extents or staging."""
        if placement == "ssd" and self.spill is not None:
            return self.spill.full
        return self.host.stats().shortage or "the host budget was full"

    def copy_out(self, source: Tensor, buffer: HostBuffer, label: Label) -> Outgoing:
        """Copy `source` into `buffer` on the outgoing stream, inside the window."""
        stream, nbytes = self.begin_out(nbytes_of(source)), nbytes_of(source)
        begin = self._copy_begins(stream, nbytes)
        with torch.cuda.stream(stream):
            host = buffer.tensor(source.dtype, (source.numel(),))
            host.copy_(flat_elements(source), non_blocking=True)
        self._copy_ends(stream, nbytes, "d2h", begin)
        return self.end_out(source, label)

    def _copy_begins(self, stream: torch.cuda.Stream, nbytes: int) -> Any:
        """Mark the time on a copy's stream where copies are timed; small ones would time the gaps between them."""
        if self.moved.on_copy is None or nbytes < LARGE_BYTES:
            return None
        return stream.record_event(torch.cuda.Event(enable_timing=True))

    def _copy_ends(
        self, stream: torch.cuda.Stream, nbytes: int, direction: LinkDirection, begin: Any
    ) -> None:
        if begin is not None and self.moved.on_copy is not None:
            end = stream.record_event(torch.cuda.Event(enable_timing=True))
            self.moved.on_copy(direction, nbytes, begin, end)

    def begin_out(self, nbytes: int) -> torch.cuda.Stream:
        """Make room in the window; return the outgoing stream, ordered behind what the program asked so far."""
        while self._outgoing and self._outgoing_bytes + nbytes > self.window_bytes:
            self._retire(self._outgoing.popleft(), "window")
        self.out_stream.wait_event(torch.cuda.current_stream(self.device).record_event())
        return self.out_stream

    def end_out(self, source: Tensor, label: Label) -> Outgoing:
        """Hold `source` until the copies queued for it since `begin_out` have read it."""
        outgoing = Outgoing(source, self.out_stream.record_event(), label)
        self._outgoing.append(outgoing)
        self._outgoing_bytes += outgoing.nbytes
        self.moved.d2h_bytes += outgoing.nbytes
        return outgoing

    def copy_in(self, shape: Any, stride: Any, buffer: HostBuffer, dtype: torch.dtype) -> Landing:
        """Start a copy to the device into a new tensor."""
        compute = torch.cuda.current_stream(self.device)
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device=self.device)
        nbytes = nbytes_of(tensor)
        if self._copies_in is not None:
            if buffer.is_locked and nbytes < LARGE_BYTES:
                self.moved.h2d_bytes += nbytes
                event = self._copies_in.add(tensor.data_ptr(), buffer.address, nbytes)
                return Landing(tensor, event, compute)
            self._copies_in.flush()  # in the order of asking
        self.in_stream.wait_event(compute.record_event())
        begin = self._copy_begins(self.in_stream, nbytes)
        with torch.cuda.stream(self.in_stream):
            flat = flat_elements(tensor)
            flat.copy_(buffer.tensor(dtype, (flat.numel(),)), non_blocking=True)
            event = self.in_stream.record_event()
        self._copy_ends(self.in_stream, nbytes, "h2d", begin)
        self.moved.h2d_bytes += nbytes
        return Landing(tensor, event, compute)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Queue the small copies in that are started inside as batches; nothing may be taken inside."""
        if self._copies_in is not None or not can_batch():
            yield
            return
        batches = self._copies_in = CopiesIn(
            self.in_stream, lambda: torch.cuda.current_stream(self.device)
        )
        try:
            yield
        finally:
            self._copies_in = None
            batches.flush()

    def wait_timed(self, event: Any, cause: str) -> None:
        """Make the compute stream wait for `event` and note how long it did, and why."""
        compute = torch.cuda.current_stream(self.device)
        if event.query():
            return
        before = torch.cuda.Event(enable_timing=True)
        after = torch.cuda.Event(enable_timing=True)
        before.record(compute)
        compute.wait_event(event)
        after.record(compute)
        self._waits.append((before, after, cause))
        if len(self._waits) > _MOST_WAITS:
            self._add_waits(2)
        if self.moved.on_wait is not None:
            self.moved.on_wait(before, after)

    def protect(self, outgoing: Outgoing) -> None:
        """The program writes to the source next: the compute stream waits for the copy out."""
        self.wait_timed(outgoing.done, "write")
        outgoing.version = None

    def drain(self) -> None:
        """Let go of every source: compute waits for the copies that are still on their way.

        The host queues kernels far ahead of the device, so without this a full window would stay
        allocated through the whole backward.
        """
        if self._outgoing and self._outgoing[-1].done.query():  # the last of its stream
            while self._outgoing:
                self._drop(self._outgoing.popleft())
        while self._outgoing:
            self._retire(self._outgoing.popleft(), "drain")

    def poll(self) -> None:
        """Drop sources whose copy has ended; add up the waits that are over."""
        while self._outgoing and self._outgoing[0].done.query():
            self._drop(self._outgoing.popleft())
        self._add_waits(_WAITS_A_POLL)
        if self.spill is not None:
            self.spill.poll()
        if self.chain is not None:
            self.chain.poll()
            self.chain.pump()

    def _add_waits(self, at_most: int) -> None:
        """Add up waits that are over. All of a backward's at once would be 2 ms in which nothing is queued."""
        for _ in range(min(at_most, len(self._waits))):
            before, after, cause = self._waits[0]
            if not after.query():
                return
            self._waits.popleft()
            seconds = before.elapsed_time(after) / 1e3
            self.moved.exposed_s += seconds
            self.exposed_by[cause] = self.exposed_by.get(cause, 0.0) + seconds

    def check(self) -> None:
        """Wait for the disk's part of every fetch under way; see the protocol."""
        self.poll()
        if self.chain is not None:
            self.chain.check()

    def finish(self) -> None:
        """Wait for every copy and write."""
        self.out_stream.synchronize()
        self.in_stream.synchronize()
        if self.chain is not None:
            self.chain.synchronize()
        self.poll()
        self._add_waits(len(self._waits))
        if self.spill is not None:
            self.spill.finish()

    def exposed_s(self) -> float:
        """Seconds of the device's time."""
        self._add_waits(len(self._waits))
        return self.moved.exposed_s

    def host_bytes(self) -> tuple[int, int]:
        """Mapped now and at most, staging included."""
        stats = self.host.stats()
        now, peak = stats.mapped_bytes, stats.peak_mapped_bytes
        if self.spill is not None:
            staging = self.spill.staging_bytes()
            words = WORDS_BYTES if self.chain is not None else 0
            return now + staging[0] + words, peak + staging[1] + words
        return now, peak

    def ssd_bytes(self) -> tuple[int, int]:
        """Extent bytes."""
        return self.spill.extent_bytes() if self.spill is not None else (0, 0)

    def close(self) -> None:
        """Wait, then free every block and file."""
        try:
            self.finish()
        finally:
            self._outgoing.clear()
            torch.cuda.synchronize(self.device)
            self.host.close()
            if self.chain is not None:
                self.chain.close()
            if self.spill is not None:
                self.spill.close()

    def _retire(self, outgoing: Outgoing, cause: str) -> None:
        self.wait_timed(outgoing.done, cause)
        self._drop(outgoing)

    def _drop(self, outgoing: Outgoing) -> None:
        self._outgoing_bytes -= outgoing.nbytes
        source, outgoing.source = outgoing.source, None
        if outgoing.version is not None and version_of(source) != outgoing.version:
            raise SavedOutputChangedError(
                f"{outgoing.label} was modified in place while it was copied to host memory; "
                "write to a copy (tensor.clone()), or use plan='recompute'"
            )


class HostStored:
    """One tensor in page-locked host memory."""

    def __init__(
        self, source: Tensor, buffer: HostBuffer, outgoing: Outgoing, transfers: CudaTransfers
    ) -> None:
        self.nbytes = self.fetch_bytes = nbytes_of(source)
        self._shape = source.shape
        self._stride = source.stride()
        self._dtype = source.dtype
        self._buffer: HostBuffer | None = buffer
        self._outgoing: Outgoing | None = outgoing
        self._done = outgoing.done
        self._last_event = outgoing.done
        self._transfers = transfers
        self._landing: Landing | None = None

    def prefetch(self) -> int:
        """Start the copy in."""
        if self._landing is None and self._buffer is not None:
            self._transfers.in_stream.wait_event(self._done)
            self._landing = self._transfers.copy_in(
                self._shape, self._stride, self._buffer, self._dtype
            )
        return self.nbytes

    def protect(self) -> None:
        """Order the program's write after the copy out."""
        if self._outgoing is not None:
            self._transfers.protect(self._outgoing)
            self._outgoing = None

    def settle(self) -> None:
        """Nothing: the block lives until the graph dies."""

    def take(self, *, keep: bool) -> Tensor:
        """Wait (on the device) for the copy in and return the tensor.

        The block is kept until the graph lets go of this object: another backward through the
        same region may ask again.
        """
        del keep
        self.prefetch()
        landing, self._landing = self._landing, None
        assert landing is not None, "a host copy is taken once unless it is kept"
        self._transfers.wait_timed(landing.event, "fetch")
        self._last_event = landing.event
        return landing.take()

    def __del__(self) -> None:
        """Give the block back; a copy may still be writing or reading it."""
        if self._buffer is not None:
            event = self._landing.event if self._landing is not None else self._last_event
            self._buffer.release(event)
