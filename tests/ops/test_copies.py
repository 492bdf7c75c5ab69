"""copy_batch where there is no device: its checks, its reference, and a failure that names its reason."""

from __future__ import annotations

import pytest
import torch

from memopt.ops.copies import copies_status, copy_batch
from memopt.types.errors import NativeUnavailable


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_reference_copies(impl):
    sources = [torch.randn(n) for n in (1, 0, 7, 1000)]
    destinations = [torch.zeros_like(s) for s in sources]
    copy_batch(destinations, sources, impl=impl)
    assert all(torch.equal(d, s) for d, s in zip(destinations, sources, strict=True))
    copy_batch([], [], impl=impl)


@pytest.mark.parametrize(
    ("destinations", "sources", "message"),
    [
        ([torch.zeros(2)], [], "1 destinations for 0 sources"),
        ([torch.zeros(2)], [torch.zeros(3)], r"\(3,\) of torch.float32 does not fit \(2,\)"),
        ([torch.zeros(2)], [torch.zeros(2, dtype=torch.int32)], "torch.int32 does not fit"),
        ([torch.zeros(2, 3).t()], [torch.zeros(3, 2)], "contiguous"),
        ([torch.zeros(3, 2)], [torch.zeros(2, 3).t()], "contiguous"),
        (
            [torch.zeros(2), torch.zeros(2, device="meta")],
            [torch.zeros(2), torch.zeros(2)],
            "one direction",
        ),
    ],
)
def test_what_does_not_match_is_refused_and_nothing_is_copied(destinations, sources, message):
    with pytest.raises(ValueError, match=message):
        copy_batch(destinations, sources)


def test_unknown_impl():
    with pytest.raises(ValueError, match="impl='fast' is unknown"):
        copy_batch([], [], impl="fast")


@pytest.mark.parametrize("impl", ["native", "loop"])
def test_native_is_never_replaced_silently(impl):
    with pytest.raises(NativeUnavailable):
        copy_batch([torch.zeros(2)], [torch.zeros(2)], impl=impl)


def test_status_has_a_reason():
    available, reason = copies_status()
    assert available or reason
