"""Accounted memory: the bytes of live tensor storages, op by op.

On a CPU there is no allocator to ask, and the resident set lags behind what PyTorch frees. A
dispatch mode sees every op, so it sees every storage being born, and a weak reference tells when
it dies. The figure is exact for what tensors hold; scratch space inside an op is not a tensor
and not counted.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from memopt.types.errors import BudgetError

_PLAIN = (Tensor, torch.nn.Parameter)


class _Life(weakref.ref):  # type: ignore[type-arg]
    """Of one storage. Its end is told by a call in C: a Ctrl-C in a weak reference's callback in Python is lost."""

    __slots__ = ("key", "nbytes")
    key: int
    nbytes: int


class AccountedMemory(TorchDispatchMode):
    """Count the bytes of tensor storages while active, in the thread that entered it.

    Args:
        limit_bytes: what the machine has room for: raise BudgetError when an op brings
            `current_bytes` above it, before the system kills the process.
        on_sample: called with `current_bytes` after each op that allocated.
    """

    def __init__(
        self, *, limit_bytes: int | None = None, on_sample: Callable[[int], None] | None = None
    ) -> None:
        super().__init__()
        self.limit_bytes = limit_bytes
        self.on_sample = on_sample
        self.on_growth: Callable[[Any, int], None] | None = None
        """Called with an op that allocated and `current_bytes`; what it raises ends the op."""
        self._current_bytes = 0
        self.peak_bytes = 0
        self.born_bytes = 0
        """Bytes of all storages ever counted."""
        self._live: dict[int, _Life] = {}
        self._dead: deque[_Life] = deque()
        self._books = threading.RLock()  # others ask while one counts; a __del__ may allocate

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run under the mode."""
        return True

    supports_higher_order_operators = True

    @property
    def current_bytes(self) -> int:
        """Bytes of the storages that live."""
        if self._dead:
            with self._books:
                self._bury()
        return self._current_bytes

    def _bury(self) -> None:
        while self._dead:
            life = self._dead.popleft()
            if self._live.get(life.key) is life:
                del self._live[life.key]
            self._current_bytes -= life.nbytes

    def reset_peak(self) -> None:
        """Start a new peak from the current level."""
        self.peak_bytes = self.current_bytes

    def track(self, tensor: Tensor) -> None:
        """Count the storage of a tensor that was born outside the mode."""
        if type(tensor) not in _PLAIN:
            if hasattr(tensor, "__tensor_flatten__"):
                for name in tensor.__tensor_flatten__()[0]:
                    self.track(getattr(tensor, name))
                return
            if not isinstance(tensor, torch.nn.Parameter):
                return
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return
        self._count(tensor.untyped_storage())

    def _count(self, storage: Any) -> None:
        with self._books:
            self._bury()  # before the look-up: a new storage may have a dead one's address
            key = storage._cdata
            if key in self._live:
                return
            nbytes = storage.nbytes()
            if nbytes == 0:
                return
            life = _Life(storage, self._dead.append)
            life.key, life.nbytes = key, nbytes
            self._live[key] = life
            self.born_bytes += nbytes
            self._current_bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self._current_bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the op and count what it allocated."""
        out = func(*args, **(kwargs or {}))
        before = self.current_bytes
        if isinstance(out, Tensor):
            self.track(out)
        elif isinstance(out, (tuple, list)):
            for item in out:
                if isinstance(item, Tensor):
                    self.track(item)
        if self.current_bytes > before:
            self._after_growth(func)
        return out

    def _after_growth(self, func: Any) -> None:
        if self.on_sample is not None:
            self.on_sample(self.current_bytes)
        if self.on_growth is not None:
            self.on_growth(func, self.current_bytes)
        if self.limit_bytes is not None and self.current_bytes > self.limit_bytes:
            current, self.limit_bytes, limit = self.current_bytes, None, self.limit_bytes
            raise BudgetError(
                f"{func} brings the live tensors to {current:,} bytes, above the {limit:,} bytes that "
                "this machine (or its cgroup) has room for: the system would kill the process next. "
                "Name an SSD directory in the budget, or use a smaller batch or sequence"
            )

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """Stop counting; live storages keep updating `current_bytes` as they die.

        Modes leave from the top of a stack. Those above this one (another session, that began
        later and goes on) step aside for it.
        """
        above = []
        while (top := _get_current_dispatch_mode()) is not None and top is not self:
            TorchDispatchMode.__exit__(top, None, None, None)
            above.append(top)
        super().__exit__(exc_type, exc_val, exc_tb)
        for mode in reversed(above):
            TorchDispatchMode.__enter__(mode)
