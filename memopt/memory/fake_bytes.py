"""Accounted memory of a step that is not run: the bytes that fake tensors would hold."""

from __future__ import annotations

from torch import Tensor

from memopt.memory.accounting import AccountedMemory

__all__ = ["FakeBytes"]


class FakeBytes(AccountedMemory):
    """Count the storages of fake tensors; enter it inside a `FakeTensorMode`.

    Args:
        device_type: of which device; None: of all.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self._device_type = device_type

    def track(self, tensor: Tensor) -> None:
        """Count the storage of a fake tensor; it has none of its own, but the size of one."""
        from torch._subclasses.fake_tensor import FakeTensor

        if isinstance(tensor, FakeTensor) and self._device_type in (None, tensor.device.type):
            self._count(tensor.untyped_storage())
