"""The native step on a GPU. Without one: what can be checked of the library on a CPU."""

from __future__ import annotations

import pytest
import torch

from memopt.ops import cuda_status
from tests.optim import gpu_checks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:.*chooses whole tensors")  # at a density of 0.03
def test_everything_on_the_gpu():
    if not cuda_status().available:
        pytest.skip(cuda_status().reason)
    results, failures = gpu_checks.run_all()
    assert not failures, {name: results[name] for name in failures}
