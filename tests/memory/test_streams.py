"""Events of our own: asked after the collector has finalized them they answer for their whole stream."""

from __future__ import annotations

import ctypes
import gc
from types import SimpleNamespace

import pytest

from memopt.memory.streams import CudaEvent
from memopt.types.errors import MemoptError

NOT_READY = 600


class Runtime:
    """A CUDA runtime in which an event passes when its stream is let go of; using a dead event is an error."""

    def __init__(self) -> None:
        self.events = {}
        self.finished = set()
        self.waits = []
        self.num_made = 0
        self.synchronized = []

    def cudaEventCreateWithFlags(self, out, flags):
        self.num_made += 1
        ctypes.cast(out, ctypes.POINTER(ctypes.c_void_p))[0] = self.num_made
        self.events[self.num_made] = None
        return 0

    def cudaEventRecord(self, handle, stream):
        self.events[handle.value] = stream
        return 0

    def cudaEventQuery(self, handle):
        return 0 if self.events[handle.value] in self.finished else NOT_READY

    def cudaStreamQuery(self, stream):
        return 0 if stream in self.finished else NOT_READY

    def cudaEventSynchronize(self, handle):
        self.synchronized.append(self.events[handle.value])
        return 0

    def cudaStreamSynchronize(self, stream):
        self.synchronized.append(stream)
        return 0

    def cudaStreamWaitEvent(self, stream, handle, flags):
        self.waits.append((stream, self.events[handle.value]))
        return 0

    def cudaEventDestroy(self, handle):
        del self.events[handle.value]
        return 0

    def cudaGetLastError(self):
        return 0


class Calls:
    """What an event asks of `CudaStreamCalls`."""

    def __init__(self) -> None:
        self.short = self.long = Runtime()

    def must(self, function, *arguments):
        code = function(*arguments)
        if code:
            raise MemoptError(str(code))

    def name_of(self, code):
        return str(code)


IN = SimpleNamespace(cuda_stream=7)
COMPUTE = SimpleNamespace(cuda_stream=0)


class Landing:
    """Asks its event when it is finalized, as what holds memory under a copy does."""

    seen = None

    def __init__(self, event) -> None:
        self.event = event

    def __del__(self) -> None:
        Landing.seen = self.event.query()
        self.event.wait(COMPUTE)
        self.event.synchronize()


@pytest.mark.parametrize("event_first", [True, False])
@pytest.mark.parametrize("over", [True, False])
def test_a_cycle_finalized_in_any_order(event_first, over):
    """With the event finalized first, the wait is for an event recorded anew on the same stream."""
    calls = Calls()
    runtime = calls.short
    gc.collect()
    event = None
    if event_first:
        event = CudaEvent(calls, IN, is_own=True)
        landing = Landing(event)
    else:
        landing = Landing(None)
        landing.event = CudaEvent(calls, IN, is_own=True)
    if over:
        runtime.finished.add(IN.cuda_stream)
    ring = [landing]
    landing.ring = ring
    ring.append(ring)
    del landing, event, ring
    gc.collect()
    assert runtime.waits == [(COMPUTE.cuda_stream, IN.cuda_stream)]
    assert runtime.synchronized == [IN.cuda_stream]
    assert Landing.seen is over
    assert runtime.events == {}


def test_a_finalized_event_answers_for_its_stream():
    calls = Calls()
    event = CudaEvent(calls, IN, is_own=True)
    event.__del__()
    assert calls.short.events == {}
    assert not event.query()
    event.wait(COMPUTE)
    event.synchronize()
    assert calls.short.waits == [(COMPUTE.cuda_stream, IN.cuda_stream)]
    calls.short.finished.add(IN.cuda_stream)
    assert event.query()
    del event
    assert calls.short.num_made == 2
    assert calls.short.events == {}


def test_an_event_that_was_refused_is_destroyed():
    calls = Calls()
    calls.short.cudaEventRecord = lambda handle, stream: 709
    with pytest.raises(MemoptError):
        CudaEvent(calls, IN, is_own=True)
    gc.collect()
    assert calls.short.events == {}
