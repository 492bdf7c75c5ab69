"""Stream calls that PyTorch does not offer: a host function, a wait for a word in host memory, a copy by address.

A CUDA *host function* runs when everything before it in its stream is over; memopt's storage engine has one in C that
queues a prepared write, so no Python thread waits for copies. A *wait for a word* (``cuStreamWaitValue32``) holds a
stream up until a 32-bit word in page-locked memory is 1; the storage engine sets it when a read is over, so the copy to
the device is queued before the bytes are there. CUDA does not see that dependency, so two rules keep it from deadlock:
the read is in the disk's queue before the wait is in the stream's, and nothing that CUDA does can hold the read up.

These calls keep Python's lock: each takes a microsecond, and a thread that spins in bytecode would have the lock for
5 ms (the switch interval) whenever one lets go of it. They queue on memopt's own streams, whose queues stay short
because every copy in them holds a staging buffer; and nothing that those streams wait for needs Python's lock. What
does wait (``synchronize``), and what queues on the program's streams, which may be full, lets go of it.

The driver's call is probed with a real wait: it must hold the stream, and let go of it.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from typing import Any, Protocol

import numpy as np
import torch

from memopt.memory._cudart import LoadedCudart, load_cudart
from memopt.memory.pinned import HostPool
from memopt.types.errors import MemoptError

__all__ = ["CudaEvent", "CudaStreamCalls", "StreamCalls", "Word", "Words", "open_stream_calls"]

_COPY_BY_ADDRESS = 4  # cudaMemcpyDefault: the direction follows from the addresses
_WAIT_UNTIL_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
_WORD_STRIDE_BYTES = (
    64  # a cache line each: the GPU polls one while the disk's thread writes another
)
_PROBE_S = 5.0
_WITHOUT_TIMING = 2  # cudaEventDisableTiming
_NOT_READY = 600  # cudaErrorNotReady


class StreamCalls(Protocol):
    """Each call returns an empty string, or the error's name. ``stream`` is a ``cudaStream_t``."""

    def record(self, stream: Any, *, is_own: bool = True) -> Any:
        """Return an event (``query``, ``synchronize``, ``wait(stream)``) behind what a torch stream was asked so far.

        Raises:
            MemoptError: CUDA refused it.
        """

    def wait_event(self, stream: Any, event: Any) -> None:
        """Let a torch stream of memopt's own wait for an event of :meth:`record`.

        Raises:
            MemoptError: CUDA refused it.
        """

    def launch_host_function(self, stream: int, function: int, argument: int) -> str:
        """Call the C function ``void (*)(void *)`` with ``argument`` when the stream gets there."""

    def wait_for_word(self, stream: int, device_address: int) -> str:
        """Hold the stream up until the word is 1."""

    def copy(self, stream: int, destination: int, source: int, nbytes: int) -> str:
        """Copy ``nbytes`` between device and page-locked host memory."""

    def device_address(self, host_address: int) -> tuple[int, str]:
        """Return where the device sees a byte of page-locked memory."""


class CudaEvent:
    """A CUDA event without timing; what ``torch.cuda.Stream.wait_event`` and the host pool ask of one.

    The garbage collector finalizes a cycle's objects in any order, so a buffer or a landing may ask an event in its
    own ``__del__`` after the event's. The event then answers for all that its stream was asked: later, never earlier.
    """

    __slots__ = ("_calls", "_handle", "_stream")

    def __init__(self, calls: CudaStreamCalls, stream: Any, *, is_own: bool) -> None:
        self._calls = calls
        self._stream = stream
        self._handle: ctypes.c_void_p | None = None
        handle = ctypes.c_void_p()
        calls.must(calls.short.cudaEventCreateWithFlags, ctypes.byref(handle), _WITHOUT_TIMING)
        self._handle = handle
        library = calls.short if is_own else calls.long
        calls.must(library.cudaEventRecord, handle, stream.cuda_stream)

    def query(self) -> bool:
        """Whether it has passed.

        Raises:
            MemoptError: the device failed.
        """
        short = self._calls.short
        if self._handle is None:
            code = short.cudaStreamQuery(self._stream.cuda_stream)
        else:
            code = short.cudaEventQuery(self._handle)
        if code == 0:
            return True
        short.cudaGetLastError()
        if code == _NOT_READY:
            return False
        raise MemoptError(f"CUDA failed: {self._calls.name_of(code)}")

    def synchronize(self) -> None:
        """Wait until it has passed; other threads of Python's go on."""
        if self._handle is None:
            self._calls.must(self._calls.long.cudaStreamSynchronize, self._stream.cuda_stream)
        else:
            self._calls.must(self._calls.long.cudaEventSynchronize, self._handle)

    def wait(self, stream: Any, *, is_own: bool = False) -> None:
        """Let a stream wait for it."""
        if self._handle is None:
            CudaEvent(self._calls, self._stream, is_own=False).wait(stream, is_own=is_own)
            return
        library = self._calls.short if is_own else self._calls.long
        self._calls.must(library.cudaStreamWaitEvent, stream.cuda_stream, self._handle, 0)

    def __del__(self) -> None:
        """An event that has not passed may go: CUDA frees it then."""
        handle, self._handle = self._handle, None
        if handle is not None and self._calls.short.cudaEventDestroy(handle):
            self._calls.short.cudaGetLastError()


class CudaStreamCalls:
    """The calls of the CUDA runtime that torch has loaded, and of the driver under it, for one device.

    Args:
        path: of the runtime.
        wait_value: ``cuStreamWaitValue32``; keeps Python's lock.
        device_index: the device.
    """

    def __init__(self, path: str, wait_value: Any, device_index: int) -> None:
        self.short = _typed(ctypes.PyDLL(path))
        """Calls that keep Python's lock."""
        self.long = _typed(ctypes.CDLL(path))
        """Calls that let go of it."""
        self._index = device_index
        wait_value.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
        self._wait_value = wait_value

    def name_of(self, code: int) -> str:
        """Return an error's name."""
        return str(self.short.cudaGetErrorName(code).decode())

    def checked(self, function: Any, *arguments: Any) -> str:
        """Call for this device; return "" or the error's name, cleared from the thread, whose device is as before."""
        before = ctypes.c_int()
        self.short.cudaGetDevice(ctypes.byref(before))
        is_other = before.value != self._index
        code = self.short.cudaSetDevice(self._index) if is_other else 0
        code = code or function(*arguments)
        text = "" if code == 0 else self.name_of(code)
        if is_other:
            self.short.cudaSetDevice(before.value)
        if code:
            self.short.cudaGetLastError()
        return text

    def must(self, function: Any, *arguments: Any) -> None:
        """Call for this device.

        Raises:
            MemoptError: CUDA refused it.
        """
        error = self.checked(function, *arguments)
        if error:
            raise MemoptError(f"{function.__name__} was refused by CUDA: {error}")

    def record(self, stream: Any, *, is_own: bool = True) -> CudaEvent:
        """See :class:`StreamCalls`."""
        return CudaEvent(self, stream, is_own=is_own)

    def wait_event(self, stream: Any, event: CudaEvent) -> None:
        """See :class:`StreamCalls`."""
        event.wait(stream, is_own=True)

    def launch_host_function(self, stream: int, function: int, argument: int) -> str:
        """See :class:`StreamCalls`."""
        return self.checked(self.short.cudaLaunchHostFunc, stream, function, argument)

    def wait_for_word(self, stream: int, device_address: int) -> str:
        """See :class:`StreamCalls`."""
        error = self.checked(self._wait_value, stream, device_address, 1, _WAIT_UNTIL_EQUAL)
        return error and f"cuStreamWaitValue32: {error}"

    def copy(self, stream: int, destination: int, source: int, nbytes: int) -> str:
        """See :class:`StreamCalls`."""
        copy = self.short.cudaMemcpyAsync
        return self.checked(copy, destination, source, nbytes, _COPY_BY_ADDRESS, stream)

    def device_address(self, host_address: int) -> tuple[int, str]:
        """See :class:`StreamCalls`."""
        out = ctypes.c_void_p()
        call = self.short.cudaHostGetDevicePointer
        error = self.checked(call, ctypes.byref(out), host_address, 0)
        return out.value or 0, error


def _typed(library: Any) -> Any:
    """Declare the runtime's functions: without that ctypes would pass an address as a 32-bit integer."""
    pointer, number = ctypes.c_void_p, ctypes.c_int
    for name, *arguments in (
        ("cudaGetDevice", pointer),
        ("cudaSetDevice", number),
        ("cudaGetErrorName", number),
        ("cudaGetLastError",),
        ("cudaEventCreateWithFlags", pointer, ctypes.c_uint),
        ("cudaEventRecord", pointer, pointer),
        ("cudaEventQuery", pointer),
        ("cudaEventSynchronize", pointer),
        ("cudaEventDestroy", pointer),
        ("cudaStreamWaitEvent", pointer, pointer, ctypes.c_uint),
        ("cudaStreamQuery", pointer),
        ("cudaStreamSynchronize", pointer),
        ("cudaLaunchHostFunc", pointer, pointer, pointer),
        ("cudaMemcpyAsync", pointer, pointer, ctypes.c_size_t, number, pointer),
        ("cudaHostGetDevicePointer", pointer, pointer, ctypes.c_uint),
    ):
        getattr(library, name).argtypes = arguments
    library.cudaGetErrorName.restype = ctypes.c_char_p
    return library


class Word:
    """One 32-bit word in page-locked memory, 0 until somebody sets it to 1."""

    __slots__ = ("_memory", "address", "device_address")

    def __init__(self, memory: Any, address: int, device_address: int) -> None:
        self._memory = memory
        self.address = address
        self.device_address = device_address

    @property
    def owner(self) -> Any:
        """What keeps the memory alive."""
        return self._memory

    def set(self, value: int) -> None:
        """Store a value (0: before use)."""
        self._memory[0] = value


class Words:
    """A fixed number of words; one that is given back is handed out again when its event has passed."""

    def __init__(self, pool: HostPool, calls: StreamCalls, *, num_words: int = 1024) -> None:
        self._pool = pool
        self._buffer = pool.take(num_words * _WORD_STRIDE_BYTES)
        self._cooling: deque[tuple[Any, Word]] = deque()
        self._free: list[Word] = []
        self._closed = False
        self.reason = "" if self._buffer.is_locked else "page-locked memory was refused"
        """Why a device cannot see the words; empty when it can."""
        if not self.reason:
            self._make(calls, num_words)

    def _make(self, calls: StreamCalls, num_words: int) -> None:
        base, error = calls.device_address(self._buffer.address)
        if error:
            self.reason = f"the device does not see page-locked memory: {error}"
            return
        memory = np.frombuffer(self._buffer.memoryview, dtype=np.uint32)
        step = _WORD_STRIDE_BYTES // 4
        self._free = [
            Word(
                memory[i * step : i * step + 1],
                self._buffer.address + i * _WORD_STRIDE_BYTES,
                base + i * _WORD_STRIDE_BYTES,
            )
            for i in range(num_words)
        ]

    @property
    def has_free(self) -> bool:
        """Whether :meth:`take` has a word."""
        while self._cooling and self._cooling[0][0].query():
            self._free.append(self._cooling.popleft()[1])
        return bool(self._free)

    def take(self) -> Word | None:
        """Return a word that is 0, or None while all are in use."""
        if not self.has_free:
            return None
        word = self._free.pop()
        word.set(0)
        return word

    def give(self, word: Word, event: Any = None) -> None:
        """Take a word back; ``event`` passes when no stream waits for it any more, in the order of the calls."""
        if event is None:
            self._free.append(word)
        else:
            self._cooling.append((event, word))

    def close(self) -> None:
        """Give the memory back; nothing may wait for a word any more. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._free.clear()
        self._cooling.clear()
        self._buffer.release()
        self._pool.close()


def open_stream_calls(device: torch.device) -> tuple[CudaStreamCalls | None, str]:
    """Return the calls, proven by a wait that holds and ends, or None and why there are none."""
    index = torch.cuda.current_device() if device.index is None else device.index
    cudart, reason = load_cudart(index)
    if not isinstance(cudart, LoadedCudart):
        return None, reason
    try:
        wait_value = ctypes.PyDLL("libcuda.so.1").cuStreamWaitValue32_v2
        calls = CudaStreamCalls(cudart.library._name, wait_value, index)
    except (OSError, AttributeError) as error:
        return None, f"the driver or runtime lacks a stream call: {error}"
    reason = _probe(calls, device)
    return (None, reason) if reason else (calls, "")


def _probe(calls: CudaStreamCalls, device: torch.device) -> str:
    """Let a stream wait for a word that is set a moment later; return what was wrong with that."""
    pool = HostPool(_WORD_STRIDE_BYTES * 64, register=True, num_threads=1)
    words = Words(pool, calls, num_words=2)
    word = words.take()
    reason = words.reason
    if word is not None:
        stream = torch.cuda.Stream(device)
        reason = calls.wait_for_word(stream.cuda_stream, word.device_address)
        event = calls.record(stream)
        time.sleep(0.001)
        if not reason and event.query():
            reason = "a stream did not wait for a word"
        word.set(1)
        end = time.monotonic() + _PROBE_S
        while not event.query():
            if time.monotonic() > end:  # the words stay: closing would wait for this stream
                return "a stream that waited for a word did not go on when it was set"
    words.close()
    return reason
