"""Kernels: a PyTorch reference for each, and the native one behind the same signature.

Nothing native is loaded by importing this package; the first use of a native op does it.
"""

from __future__ import annotations

from memopt.ops.native import CudaStatus, cuda_status

__all__ = ["CudaStatus", "cuda_status"]
