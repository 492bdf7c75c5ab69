"""A CUDA for CPUs: streams are threads that run late, events and words are waited for in them, kernels are callables.

What it keeps of the real thing is the order: an operation runs after those before it in its stream and after the
events its stream was told to wait for, and in no other order. Every operation begins with a pause of random length, so
whatever is not ordered goes wrong sooner or later.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


class LostDeviceError(RuntimeError):
    """What every call raises on a device that failed."""


class FakeEvent:
    """torch.cuda.Event."""

    def __init__(self, *, enable_timing: bool = False) -> None:
        del enable_timing
        self.mark: threading.Event | None = None
        self.at_s = 0.0
        self.device: FakeDevice | None = None

    def record(self, stream: FakeStream) -> None:
        mark = self.mark = threading.Event()
        self.device = stream.device

        def reached() -> None:
            self.at_s = time.perf_counter()
            mark.set()

        stream.run(reached)

    def query(self) -> bool:
        if self.device is not None and self.device.lost:
            raise LostDeviceError("the device is lost")
        over = self.device is None or self.device.closed
        return over or self.mark is None or self.mark.is_set()

    def synchronize(self) -> None:
        while not self.query():
            time.sleep(0.0005)

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1e3 * (other.at_s - self.at_s)


class FakeStream:
    """torch.cuda.Stream: one thread that works off a queue."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.cuda_stream = device.register(self)
        self.queue: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while (job := self.queue.get()) is not None:
            self.device.pause()
            if not self.device.lost:
                job()

    def run(self, job: Callable[[], Any]) -> None:
        self.queue.put(job)

    def wait_event(self, event: FakeEvent) -> None:
        mark = event.mark
        if mark is not None:
            self.run(lambda: self.device.wait(mark.is_set))

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()


class FakeDevice:
    """The device: its streams, its current stream, the stream calls, and memory that is never reused too early."""

    def __init__(self, seed: int = 0, *, pause_s: float = 0.001) -> None:
        self.random = random.Random(seed)
        self.pause_s = pause_s
        self.lost = self.closed = False
        self.refuse_waits = False
        self.spoils = True
        self.streams: dict[int, FakeStream] = {}
        self.allocated: list[torch.Tensor] = []
        self.num_calls: dict[str, int] = {"host": 0, "wait": 0, "copy": 0}
        self.compute = FakeStream(self)

    def register(self, stream: FakeStream) -> int:
        self.streams[len(self.streams) + 1] = stream
        return len(self.streams)

    def pause(self) -> None:
        if self.pause_s:
            time.sleep(self.pause_s * self.random.random() ** 4)

    def wait(self, reached: Callable[[], bool]) -> None:
        while not self.lost and not reached():
            time.sleep(0.0002)

    def synchronize(self, device: Any = None) -> None:
        del device
        for stream in list(self.streams.values()):
            stream.synchronize()

    def close(self) -> None:
        self.closed = True
        for stream in self.streams.values():
            stream.queue.put(None)

    # - memopt.memory.streams.StreamCalls

    def record(self, stream: FakeStream, *, is_own: bool = True) -> FakeEvent:
        del is_own
        return stream.record_event()

    def wait_event(self, stream: FakeStream, event: FakeEvent) -> None:
        stream.wait_event(event)

    def launch_host_function(self, stream: int, function: int, argument: int) -> str:
        self.num_calls["host"] += 1
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
        self.streams[stream].run(lambda: call(argument))
        return ""

    def wait_for_word(self, stream: int, device_address: int) -> str:
        if self.refuse_waits:
            return "refused"
        self.num_calls["wait"] += 1
        word = ctypes.c_uint32.from_address(device_address)
        self.streams[stream].run(lambda: self.wait(lambda: word.value == 1))
        return ""

    def copy(self, stream: int, destination: int, source: int, nbytes: int) -> str:
        self.num_calls["copy"] += 1
        self.streams[stream].run(lambda: ctypes.memmove(destination, source, nbytes))
        return ""

    def device_address(self, host_address: int) -> tuple[int, str]:
        return host_address, ""

    # - memopt.memory._cudart.Cudart, for the host pools

    def host_register(self, address: int, nbytes: int) -> str:
        del address, nbytes
        return ""

    def host_unregister(self, address: int) -> str:
        del address
        return ""


@contextlib.contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch, device: FakeDevice) -> Iterator[FakeDevice]:
    """Let `torch.cuda` be `device`, and memory that the chain allocates on it live to the end."""

    def keep(*args: Any, **kwargs: Any) -> torch.Tensor:
        """Allocate as PyTorch does: a kernel asked for before may still write to this memory."""
        tensor = torch.empty_strided(*args, **kwargs)
        device.allocated.append(tensor)
        if device.spoils:
            device.compute.run(lambda: ctypes.memset(tensor.data_ptr(), 0xEE, tensor.nbytes))
        return tensor

    import memopt.activations.chain_stored as chain_stored

    monkeypatch.setattr(torch.cuda, "Stream", lambda _=None: FakeStream(device))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: device.compute)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(chain_stored.ChainStored, "_allocate", staticmethod(keep))
    try:
        yield device
    finally:
        device.close()


def in_backward(device, body) -> None:
    """Run `body` in a backward pass of `device`: in autograd's own thread where that is a CUDA device."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            body()
            return grad * 2

    Function.apply(torch.ones(3, device=device, requires_grad=True)).sum().backward()
