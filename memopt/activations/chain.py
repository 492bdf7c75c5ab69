"""The native way between a CUDA device and SSD: no Python, and no thread that waits, between copy and disk.

Out: the copy to a staging buffer is queued on the stream out, and behind it a host function of the storage engine that
queues the write. In: the read is given to the disk together with a word in page-locked memory; on a stream of its own
the device waits for that word and copies. So a fetch is queued as a whole, before a byte of it has been read, and the
host goes on. Tensors travel in pieces through a bounded ring of staging buffers: a piece's copy runs while the next
piece is on the disk's side, and a tensor may be larger than the ring. A piece that is wanted back while its write still
holds the staging buffer (backward begins where forward ended) comes from there and not from the disk.

Why nothing waits for ever. Every wait of the machinery is for something that was *submitted before it*:
- a host function waits for its copy; the copy for kernels queued before it; those, at most, for fetches queued earlier;
- the stream in waits for a word only after its read was accepted by the disk's thread, which needs nothing of CUDA and
  sets the word however the read ends (an engine that closes or breaks ends its reads too);
- a read is submitted only when the write of its piece is over, so it never waits for a host function: CUDA may run
  streams one after the other in the order of submission, and even then each wait is behind what it waits for;
- a staging buffer is held by a write (ends after its copy) or by a read whose wait and copy are queued already (a read
  without its copy queued holds none): whoever waits for staging waits for such a chain, never for another waiter. What
  fetches ahead does not wait at all: where there is no buffer it leaves the rest for later (`later`, `pump`);
- a host function is not called where the device is lost. Whoever waits for such a write asks the copy's event now and
  then, which raises, and the write is cancelled with that as its reason.

Errors. The word says that a read is over, not that it went well: the copy then moves what is in the buffer. So `take`
raises what is known by then, and the rest is asked for when backward ends (a callback of autograd's engine), before
`backward()` returns: no gradient that was made of such bytes can reach an optimizer unseen.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from typing import Any, Protocol

import torch
from torch.autograd import Variable

from memopt.activations.spill import StagedWrite
from memopt.io import ExtentStore, RawBuffer
from memopt.memory.pinned import HostBuffer, HostPool
from memopt.memory.streams import StreamCalls, Words, open_stream_calls
from memopt.types.errors import MemoptError

_MAX_PIECE_BYTES = 16 << 20
_MIN_PIECES = 4
_NUM_WORDS = 1024
WORDS_BYTES = 64 * _NUM_WORDS
"""Page-locked memory of a chain beside the staging buffers."""
_ALIGN_BYTES = 1 << 20


class Advancing(Protocol):
    """A tensor whose way in was asked for and could not be queued as a whole."""

    def advance(self, *, wait: bool) -> bool:
        """Queue what there is room for; return whether that was the rest."""


class Chain:
    """The streams, words and reads under way of one device and one extent store.

    Args:
        device: the device.
        store: on an engine that defers.
        calls: stream calls.
        words: for reads.
        staging_bytes: the cap of the staging buffers; pieces are at most a quarter of it.
    """

    def __init__(
        self,
        device: torch.device,
        store: ExtentStore,
        calls: StreamCalls,
        words: Words,
        staging_bytes: int,
    ) -> None:
        self.store = store
        self.in_stream = torch.cuda.Stream(device)
        self.release_stream = torch.cuda.Stream(device)
        share = staging_bytes // _MIN_PIECES // _ALIGN_BYTES * _ALIGN_BYTES
        self.piece_bytes = max(store.unit_bytes, min(_MAX_PIECE_BYTES, share))
        self._calls = calls
        self._words = words
        self._reads: deque[Any] = deque()
        self._waiting: deque[weakref.ref[Any]] = deque()
        self.is_dry = False
        """Whether staging was all in use when it was asked last: asking for the next tensor would cost time only."""
        self._task = -1

    # - Out

    def copy(self, stream: Any, destination: int, source: int, nbytes: int) -> None:
        """Queue a copy between the device and page-locked memory.

        Raises:
            MemoptError: CUDA refused it.
        """
        error = self._calls.copy(stream.cuda_stream, destination, source, nbytes)
        if error:
            raise MemoptError(f"a copy of {nbytes:,} bytes was refused by CUDA: {error}")

    def record(self, stream: Any) -> Any:
        """Return an event behind what one of memopt's own streams was asked so far."""
        return self._calls.record(stream)

    def write(self, copied: Any, extent: Any, buffer: HostBuffer, offset: int) -> Any:
        """Write a buffer to the extent at `offset` once `copied` (of :meth:`record`) has passed; return the ticket."""
        ticket = self.store.prepare_write(
            extent, buffer.memoryview, offset=offset, alive=copied.query
        )
        function, argument = ticket.release_call()
        self._calls.wait_event(self.release_stream, copied)
        error = self._calls.launch_host_function(
            self.release_stream.cuda_stream, function, argument
        )
        if error:
            try:
                copied.synchronize()
            except BaseException:
                ticket.cancel()
                raise
            finally:
                ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)
        return ticket

    # - In

    @property
    def can_queue(self) -> bool:
        """Whether a read can be queued without the host waiting for it."""
        return self._words.has_free

    def read(self, extent: Any, buffer: HostBuffer, offset: int, destination: int) -> Any:
        """Queue the way of one piece to the device address `destination`; return the event of its end.

        The buffer goes back to its pool with that event. Without a free word, or where the driver refuses to wait for
        one, the host waits for the disk here.
        """
        word = self._words.take() if buffer.is_locked else None
        when_over = None
        if word is not None:
            when_over = RawBuffer(address=word.address, nbytes=4, owner=word.owner)
        try:
            ticket = self.store.read(extent, buffer.memoryview, offset=offset, when_over=when_over)
        except BaseException:
            buffer.release()
            if word is not None:
                self._words.give(word)
            raise
        stream = self.in_stream
        try:
            if word is None or self._calls.wait_for_word(stream.cuda_stream, word.device_address):
                ticket.wait()
            else:
                self._reads.append(ticket)
            self.copy(stream, destination, buffer.address, buffer.nbytes)
        finally:
            event = self._calls.record(stream)
            buffer.release(event)
            if word is not None:
                self._words.give(word, event)
        return event

    def begin_in(self, compute: Any) -> Any:
        """Order the stream in behind what the program's stream was asked so far; return the event of that."""
        allocated = self._calls.record(compute, is_own=False)
        self._calls.wait_event(self.in_stream, allocated)
        return allocated

    def fetch_staged(self, write: StagedWrite, copied: Any, destination: int) -> Any:
        """Queue the way in of a piece that is still in its staging buffer; return the event of its end."""
        assert write.buffer is not None
        self._calls.wait_event(self.in_stream, copied)
        try:
            self.copy(self.in_stream, destination, write.buffer.address, write.buffer.nbytes)
        finally:
            write.fetched = self._calls.record(self.in_stream)
        return write.fetched

    def later(self, waiting: Advancing) -> None:
        """Remember a tensor that could not be fetched as a whole."""
        self._waiting.append(weakref.ref(waiting))

    def pump(self) -> None:
        """Go on with the tensors that found no staging, in the order of asking."""
        kept: list[weakref.ref[Any]] = []
        self.is_dry = False
        try:
            while self._waiting and not self.is_dry:
                reference = self._waiting.popleft()
                waiting = reference()
                if waiting is not None and not waiting.advance(wait=False):
                    kept.append(reference)
        finally:
            self._waiting.extendleft(reversed(kept))

    # - Errors and the end

    def poll(self) -> None:
        """Raise the first read that is known to have failed."""
        self._retire(only_done=True)

    def check(self) -> None:
        """Wait for the disk's part of every read; raise the first that failed."""
        self._retire(only_done=False)

    def _retire(self, *, only_done: bool) -> None:
        """Ask for reads in order; of several that failed together only the first is raised."""
        first: OSError | None = None
        while self._reads and (not only_done or self._reads[0].done()):
            try:
                self._reads.popleft().wait()
            except OSError as error:
                first = first or error
        if first is not None:
            raise first

    def check_when_backward_ends(self) -> None:
        """Let the backward that runs now raise what reads still under way turn out to be; outside of one, wait now."""
        if not self._reads:
            return
        task = torch._C._current_graph_task_id()
        if task == -1:
            self.check()
        elif task != self._task:
            self._task = task
            Variable._execution_engine.queue_callback(self.check)

    def synchronize(self) -> None:
        """Wait for both streams."""
        self.release_stream.synchronize()
        self.in_stream.synchronize()

    def close(self) -> None:
        """Give the words back; the streams are idle."""
        self._waiting.clear()
        self._reads.clear()
        self._words.close()


def open_chain(
    device: torch.device, store: ExtentStore, staging_bytes: int
) -> tuple[Chain | None, str]:
    """Return the native way, or None and why transfers must be driven from Python."""
    engine = store.engine
    if not engine.defers:
        return None, f"the {engine.name} engine cannot be driven by CUDA streams"
    calls, reason = open_stream_calls(device)
    if calls is None:
        return None, reason
    pool = HostPool(WORDS_BYTES, register=True, num_threads=1)
    words = Words(pool, calls, num_words=_NUM_WORDS)
    if words.reason:
        words.close()
        return None, words.reason
    return Chain(device, store, calls, words, staging_bytes), ""
