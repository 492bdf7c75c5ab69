"""The compiled module behind the ``io_uring`` engine, and the calls of it that keep Python's lock."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable
from typing import Any

from memopt.types.errors import IoEngineUnavailable

__all__ = ["Handle", "ShortCalls", "address_of", "load_native"]


def load_native() -> Any:
    """Return the compiled module.

    Raises:
        IoEngineUnavailable: it was not built, or for another version of memopt, or cffi's runtime is missing.
    """
    try:
        native = importlib.import_module("memopt.io._uring")
    except ImportError as error:
        if (
            error.name == "_cffi_backend"
        ):  # what the module was built with, and asks for when it is loaded
            raise IoEngineUnavailable(
                f"io_uring: the runtime of cffi is missing ({error}); install cffi again"
            ) from error
        raise IoEngineUnavailable(
            f"io_uring: the native part of memopt is missing ({error}); install gcc and liburing-dev "
            "(2.3 or later), then memopt again"
        ) from error
    if not hasattr(native.lib, "memopt_uring_limit"):
        raise IoEngineUnavailable(
            "io_uring: the native part is older than memopt; install memopt again"
        )
    return native


def address_of(native: Any, pointer: Any) -> int:
    """Return the number of a pointer of cffi's."""
    return int(native.ffi.cast("uintptr_t", pointer))


class ShortCalls:
    """The native calls that wait for no disk and for no thread of Python's, made without letting go of Python's lock.

    At most they wait for the engine's mutex, which its own thread holds while it fills the ring and which nobody holds
    while wanting Python's lock. Pointers are integers.
    """

    def __init__(self, native: Any) -> None:
        pointer, word = ctypes.c_void_p, ctypes.c_uint64

        def bind(name: str, result: Any, *arguments: Any) -> tuple[int, Any]:
            at = address_of(native, native.ffi.addressof(native.lib, f"memopt_uring_{name}"))
            return at, ctypes.PYFUNCTYPE(result, *arguments)(at)

        batch = (pointer, pointer, ctypes.c_uint32, word, pointer)
        self.submit = bind("submit", ctypes.c_int, *batch)[1]
        self.prepare = bind("prepare", ctypes.c_int, *batch)[1]
        self.arm = bind("arm", None, pointer)[1]
        self.release_address, self.release = bind("release", None, pointer)
        self.cancel = bind("cancel", ctypes.c_int, pointer)[1]
        self.is_released = bind("is_released", ctypes.c_int, pointer)[1]
        self.free = bind("ticket_free", None, pointer)[1]
        self._wait = bind("wait", ctypes.c_int, pointer, pointer, ctypes.c_int64, pointer)[1]

    def poll(self, ring: int, ticket: int, result: int) -> bool:
        """Whether the ticket is over, with its result; a wait of no time at all."""
        return bool(self._wait(ring, ticket, 0, result))


class Handle:
    """What owns a native ticket: native code puts its address into ``out``, so that no interrupt comes between."""

    __slots__ = ("_free", "out")

    def __init__(self, free: Callable[[int], None]) -> None:
        self.out = ctypes.c_void_p()
        self._free = free

    @property
    def address(self) -> int:
        """Of the native ticket; 0 while there is none."""
        return self.out.value or 0

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # an interrupt in __init__
            self._free(self.address)
