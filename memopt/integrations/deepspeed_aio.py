"""memopt's storage engine behind DeepSpeed's ``aio_handle`` interface: tensors in, tensors out, errors raised.

:class:`TensorAioHandle` has what DeepSpeed's NVMe swappers call. Its locked tensors come from memopt's pool of
page-locked memory: exact sizes, page-aligned for direct I/O *and* registered with CUDA, so that copies to the device
are asynchronous. (DeepSpeed's own are only ``mlock``-ed since 0.19.4; before, they were rounded up to powers of two.)

:func:`op_modules` gives the two objects that take the place of DeepSpeed's compiled ``async_io`` and ``pin_memory``
extensions; a plugin puts them where DeepSpeed looks for them.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from memopt.io.aio_handle import AioHandle
from memopt.io.buffers import RawBuffer
from memopt.memory.pinned import HostBuffer, HostPool

__all__ = ["LockedTensors", "TensorAioHandle", "op_modules"]


class LockedTensors:
    """Host tensors for storage and device, found again by their address. Thread-safe.

    Args:
        cap_bytes: at most this much host memory.
        register: page-lock it with CUDA; None: where CUDA is available.
    """

    def __init__(self, cap_bytes: int, *, register: bool | None = None) -> None:
        self.pool = HostPool(cap_bytes, torch.cuda.is_available() if register is None else register)
        self._buffers: dict[int, HostBuffer] = {}
        self._lock = threading.Lock()

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: Tensor) -> Tensor:
        """Return a one-dimensional tensor of ``num_elem`` elements of ``example_tensor``'s type, uninitialised.

        Raises:
            HostPoolFull: the cap leaves no room.
        """
        buffer = self.pool.take(num_elem * example_tensor.element_size())
        with self._lock:
            self._buffers[buffer.address] = buffer
        return buffer.tensor(example_tensor.dtype, (num_elem,))

    def free_cpu_locked_tensor(self, locked_tensor: Tensor) -> bool:
        """Give a locked tensor back; return False when it is none of ours. Nothing may use it any more."""
        return self.free_cpu_locked_tensor_by_ptr(locked_tensor.data_ptr())

    def free_cpu_locked_tensor_by_ptr(self, address: int) -> bool:
        """As :meth:`free_cpu_locked_tensor`, by address."""
        with self._lock:
            buffer = self._buffers.pop(address, None)
        if buffer is None:
            return False
        event = None
        if buffer.is_locked:  # a copy on the caller's stream may still read it
            event = torch.cuda.Event()
            event.record()
        buffer.release(event)
        return True

    def is_pinned(self, buffer: Tensor) -> bool:
        """Return whether the whole of ``buffer`` is locked memory: one of our tensors, a view of one, or torch's."""
        if buffer.device.type != "cpu":
            return False
        begin = buffer.data_ptr()
        end = begin + buffer.numel() * buffer.element_size()
        with self._lock:
            if any(
                b.address <= begin and end <= b.address + b.nbytes for b in self._buffers.values()
            ):
                return True
        return torch.cuda.is_available() and buffer.is_pinned()

    def close(self) -> None:
        """Free everything."""
        with self._lock:
            self._buffers.clear()
        self.pool.close()


class TensorAioHandle(AioHandle):
    """DeepSpeed's ``aio_handle`` over memopt's engine; arguments and results as in ``memopt.io.aio_handle``.

    Tensors must be contiguous and in host memory; device tensors are DeepSpeed's to stage.
    """

    def __init__(self, *settings: Any, locked: LockedTensors, **named: Any) -> None:
        super().__init__(*settings, **named)
        self._locked = locked

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: Tensor) -> Tensor:
        """See :meth:`LockedTensors.new_cpu_locked_tensor`."""
        return self._locked.new_cpu_locked_tensor(num_elem, example_tensor)

    def free_cpu_locked_tensor(self, locked_tensor: Tensor) -> bool:
        """See :meth:`LockedTensors.free_cpu_locked_tensor`."""
        return self._locked.free_cpu_locked_tensor(locked_tensor)

    def is_pinned(self, buffer: Tensor) -> bool:
        """See :meth:`LockedTensors.is_pinned`."""
        return self._locked.is_pinned(buffer)

    def _as_buffer(self, buffer: Tensor) -> RawBuffer:
        if buffer.device.type != "cpu":
            raise ValueError(
                f"the tensor is on {buffer.device}; storage reads and writes host tensors"
            )
        if not buffer.is_contiguous():
            raise ValueError(
                f"the tensor of shape {tuple(buffer.shape)} is not contiguous; pass a contiguous one"
            )
        nbytes = buffer.numel() * buffer.element_size()
        return RawBuffer(address=buffer.data_ptr(), nbytes=nbytes, owner=buffer)


def op_modules(locked: LockedTensors, **options: Any) -> tuple[Any, Any]:
    """Return what replaces DeepSpeed's ``async_io`` and ``pin_memory`` modules.

    Args:
        locked: where locked tensors come from; shared by all handles.
        options: passed to every handle, for example ``engine="io_uring"``.
    """

    def aio_handle(*settings: Any, **named: Any) -> TensorAioHandle:
        return TensorAioHandle(*settings, locked=locked, **options, **named)

    return SimpleNamespace(aio_handle=aio_handle), SimpleNamespace(pin_handle=lambda: locked)
