"""Small tensor facts below autograd: storages, aliases, whether bytes can move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def storage_key(tensor: Tensor) -> int:
    """Identity of the tensor's storage, valid while the storage lives."""
    return int(tensor.untyped_storage()._cdata)


def is_plain(value: Any) -> bool:
    """Whether `value` is a strided tensor of PyTorch's own type with a storage to move."""
    return type(value) in _PLAIN and value.layout is torch.strided and not value.is_nested


def version_of(tensor: Tensor) -> int:
    """Return the tensor's version counter; made in inference mode it has none and keeps its value."""
    return -1 if tensor.is_inference() else tensor._version


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory without gap or overlap, in any order.

    What lies there must be the elements: a lazy conjugate's are others than its memory holds.
    """
    if tensor.is_conj() or tensor.is_neg():
        return False
    if tensor.is_contiguous():
        return True
    expected = 1
    pairs = sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1)
    for stride, size in pairs:
        if stride != expected:
            return False
        expected *= size
    return True


def shared_alias(tensor: Tensor) -> Tensor:
    """Return a detached alias that shares the version counter.

    `detach` inside a dispatch mode starts a version counter of its own, and a later in-place
    write by the program would go unseen; with ADInplaceOrView let through it is shared.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


class _NonLeaf(torch.autograd.Function):
    """Give a tensor a grad_fn without copying it or making it a view."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, box: list[Tensor]) -> Tensor:
        del ctx, anchor
        return box.pop()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None]:
        del ctx, grads
        return None, None


def graph_input(tensor: Tensor) -> Tensor:
    """Return a fresh tensor as one that some op returned: it requires grad and is no leaf."""
    return _NonLeaf.apply(torch.empty(0, requires_grad=True), [tensor.detach()])  # type: ignore[no-any-return]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an op's arguments or results (tensors, lists and tuples of them)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def nbytes_of(tensor: Tensor) -> int:
    """Bytes of the tensor's own elements."""
    return tensor.numel() * tensor.element_size()


def flat_elements(tensor: Tensor) -> Tensor:
    """Return a dense tensor's elements as one dimension, in memory order, without a copy."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


_ROW_WORDS = 4096


def digest(tensor: Tensor) -> Tensor:
    """Return an exact checksum of a dense tensor's bytes, on its own device.

    Int64 sums (wrapping, so independent of order and of the device) over the rows and over the
    columns of the bytes seen as a matrix of 4,096 words: one changed bit, and rows or words
    that changed places, change the digest.
    """
    flat = flat_elements(tensor.detach())
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.dtype is torch.bool:
        flat = flat.view(torch.uint8)
    flat = flat.view(torch.uint8)
    if flat.data_ptr() % 8:
        flat = flat.clone()
    num_words = flat.numel() // 8
    words = flat[: num_words * 8].view(torch.int64)
    num_rows = num_words // _ROW_WORDS
    body = words[: num_rows * _ROW_WORDS].view(num_rows, _ROW_WORDS)
    tail = words[num_rows * _ROW_WORDS :]
    parts = [body.sum(1), body.sum(0), tail, flat[num_words * 8 :].to(torch.int64)]
    return torch.cat(parts)


def only_views(out: Any, sources: set[int]) -> bool:
    """Whether an op only made new names of storages that it was given: its result does not depend on their bytes."""
    outputs = list(tensors_in(out))
    return bool(outputs) and all(is_plain(t) and storage_key(t) in sources for t in outputs)
