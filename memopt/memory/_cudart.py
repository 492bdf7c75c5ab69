"""The CUDA runtime calls that page-locking needs, from the very library that torch has loaded.

A registration that CUDA refuses leaves an error behind that would surface at the user's next, innocent CUDA call, so it
is read and cleared (``cudaGetLastError``) at once, in the thread that met it. ctypes releases Python's lock around each
call.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Cudart", "LoadedCudart", "load_cudart"]

_REGISTER_PORTABLE = (
    1  # with unified addressing, which every 64-bit Linux has, that maps it for the device too
)


class Cudart(Protocol):
    """Each call returns an empty string, or the error's name after it was cleared from the calling thread."""

    def host_register(self, address: int, nbytes: int) -> str:
        """Page-lock ``nbytes`` from ``address`` in place."""

    def host_unregister(self, address: int) -> str:
        """Undo the registration that began at ``address``."""

    def synchronize(self) -> str:
        """Wait for everything that the device has been asked."""


class LoadedCudart:
    """The CUDA runtime through ctypes, for one device."""

    def __init__(self, library: Any, device_index: int) -> None:
        self.library = library
        self._device_index = device_index
        library.cudaHostRegister.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
        library.cudaHostUnregister.argtypes = (ctypes.c_void_p,)
        library.cudaGetErrorName.restype = ctypes.c_char_p

    def host_register(self, address: int, nbytes: int) -> str:
        """See :class:`Cudart`."""
        return self.checked(
            lambda: self.library.cudaHostRegister(address, nbytes, _REGISTER_PORTABLE)
        )

    def host_unregister(self, address: int) -> str:
        """See :class:`Cudart`."""
        return self.checked(lambda: self.library.cudaHostUnregister(address))

    def synchronize(self) -> str:
        """See :class:`Cudart`."""
        return self.checked(self.library.cudaDeviceSynchronize)

    def checked(self, call: Any) -> str:
        """Run ``call`` for this device and restore the thread's own; a worker thread starts on device 0."""
        before = ctypes.c_int()
        self.library.cudaGetDevice(ctypes.byref(before))
        code = self.library.cudaSetDevice(self._device_index)
        code = code or call()
        text = "" if code == 0 else self.library.cudaGetErrorName(code).decode()
        if before.value != self._device_index:
            self.library.cudaSetDevice(before.value)
        if code:
            self.library.cudaGetLastError()
        return text


def load_cudart(device_index: int) -> tuple[Cudart | None, str]:
    """Return the CUDA runtime of this process, or None and why there is none."""
    import torch

    if not torch.cuda.is_available():
        return None, "CUDA is not available"
    torch.cuda.init()
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if "libcudart.so" in path:
            return LoadedCudart(ctypes.CDLL(path), device_index), ""
    return None, "torch's CUDA runtime is not a shared library of this process"
