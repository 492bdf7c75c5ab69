"""Checks of the device: is there one, how fast is its link, which attention kernels does it have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memopt.cli.checks.base import Check, Context, Gpu, Status
from memopt.types.sizes import format_bytes

_SLOW_SHARE = 0.6
"""Of the link's raw rate; one large page-locked copy reaches 0.85 to 0.9 of it."""
_SLOW_LINK = 10e9
"""Below what PCIe 3 with 16 lanes gives, where the system does not say what the link is."""
_OWN_BYTES = 1 << 30
"""More than this process's own CUDA context takes."""
HEAD_DIMS = (64, 96, 128, 192, 256)
_TRIED = (("bfloat16", 64), ("bfloat16", 128), ("bfloat16", 256), ("float16", 128))


def find_gpus() -> tuple[tuple[Gpu, ...], str]:
    """Return the CUDA devices that work, and why CUDA does not where torch is built for it."""
    import torch

    if not torch.backends.cuda.is_built():
        return (), f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
        return tuple(_gpu(index) for index in range(torch.cuda.device_count())), ""
    except (RuntimeError, AssertionError) as error:
        return (), str(error).strip().splitlines()[0]


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    return Gpu(
        index=index,
        name=properties.name,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        capability=f"{properties.major}.{properties.minor}",
        pci=_pci_address(index),
    )


def _pci_address(index: int) -> str:
    """Return "domain:bus:device.function" as /sys writes it, from the CUDA runtime that torch has loaded."""
    import ctypes

    maps = Path("/proc/self/maps").read_text().splitlines()
    path = next((line.split(maxsplit=5)[-1] for line in maps if "libcudart.so" in line), None)
    if path is None:
        return ""
    text = ctypes.create_string_buffer(32)
    if ctypes.CDLL(path).cudaDeviceGetPCIBusId(text, len(text), index) != 0:
        return ""
    return text.value.decode().lower()


def devices(context: Context) -> Sequence[Check]:
    """Each CUDA device, or why there is none."""
    if context.gpus:
        return [_judge_gpu(gpu) for gpu in context.gpus]
    signs = ("proc/driver/nvidia/version", "dev/nvidiactl", "dev/dxg")  # the last: WSL
    loaded = any((context.root / sign).exists() for sign in signs)
    figures = {"driver_loaded": loaded, "problem": context.gpu_problem}
    if not loaded:
        found = "no CUDA device: the device is the CPU, and activations can move to SSD only"
        return [Check(name="device", status="absent", found=found, figures=figures)]
    if "built without CUDA" in context.gpu_problem:
        found = f"an NVIDIA driver is loaded, but {context.gpu_problem}: the device is the CPU"
        todo = "install a CUDA build of torch (https://pytorch.org/get-started/locally)"
        return [Check(name="device", status="weak", found=found, todo=todo, figures=figures)]
    found = f"an NVIDIA driver is loaded, but CUDA does not work: {context.gpu_problem or 'no device is visible'}"
    todo = (
        "look at nvidia-smi and CUDA_VISIBLE_DEVICES; a driver older than torch's CUDA needs an update; "
        "in a container, pass the GPU (docker run --gpus all)"
    )
    return [Check(name="device", status="broken", found=found, todo=todo, figures=figures)]


def _judge_gpu(gpu: Gpu) -> Check:
    used = gpu.total_bytes - gpu.free_bytes
    figures = {
        "index": gpu.index,
        "name": gpu.name,
        "total_bytes": gpu.total_bytes,
        "free_bytes": gpu.free_bytes,
        "capability": gpu.capability,
        "pci": gpu.pci,
    }
    free = f"{format_bytes(gpu.free_bytes)} of {format_bytes(gpu.total_bytes)} free"
    found = f"{gpu.name}, {free}, compute {gpu.capability}"
    crowded = used > max(gpu.total_bytes // 10, _OWN_BYTES)
    todo = (
        f"{format_bytes(used)} are in use by others: end them, or name a device budget below what is free"
        if crowded
        else ""
    )
    status: Status = "weak" if crowded else "ok"
    return Check(name=f"GPU {gpu.index}", status=status, found=found, todo=todo, figures=figures)


def links(context: Context) -> Sequence[Check]:
    """The way between device and host, each direction alone and both at once."""
    import torch

    from memopt.memory.rates import measure_link

    if not context.gpus:
        if context.quick:
            return [_not_measured("link")]
        context.progress("copies in host memory", 0.0)
        rate = measure_link(torch.device("cpu")).d2h_bytes_per_s
        figures = {"memcpy_bytes_per_s": rate}
        found = f"no device: copies in host memory run at {_rate(rate)}"
        return [Check(name="link", status="absent", found=found, figures=figures)]
    checks = []
    for gpu in context.gpus:
        pcie = pcie_facts(context, gpu)
        if context.quick:
            checks.append(_judge_lanes(gpu, pcie))
            continue
        context.progress(f"link of GPU {gpu.index}", 0.0)
        rates = measure_link(torch.device("cuda", gpu.index))
        if gpu.index == 0:
            context.measured["d2h_bytes_per_s"] = rates.d2h_bytes_per_s
            context.measured["h2d_bytes_per_s"] = rates.h2d_bytes_per_s
        way = (rates.d2h_bytes_per_s, rates.h2d_bytes_per_s, rates.duplex_bytes_per_s)
        checks.append(judge_link(gpu, way, pcie, locked=rates.locked))
    return checks


def _not_measured(name: str) -> Check:
    return Check(name=name, status="absent", found="not measured (--quick)")


def pcie_facts(context: Context, gpu: Gpu) -> dict[str, Any]:
    """Return what /sys says of the GPU's link: lanes now and at most, and the raw rate in bytes per second."""
    base = f"sys/bus/pci/devices/{gpu.pci}"
    text = {
        name: context.read(f"{base}/{name}") if gpu.pci else None
        for name in ("max_link_speed", "current_link_width", "max_link_width")
    }
    lanes, most = (
        int(value) if value and value.isdigit() and int(value) > 0 else None
        for value in (text["current_link_width"], text["max_link_width"])
    )
    # The current speed is not asked: it falls while the device is idle.
    return {
        "lanes": lanes,
        "max_lanes": most,
        "speed": text["max_link_speed"],
        "raw_bytes_per_s": raw_rate(text["max_link_speed"], lanes),
    }


def raw_rate(speed: str | None, lanes: int | None) -> float | None:
    """Return a link's bytes per second before protocol overhead, of "32.0 GT/s PCIe" and its lanes."""
    found = re.match(r"([\d.]+) GT/s", speed or "")
    if found is None or lanes is None:
        return None
    transfers = float(found[1]) * 1e9
    payload = 0.8 if transfers <= 5e9 else 128 / 130 if transfers <= 32e9 else 1.0
    return transfers * payload / 8 * lanes


def _judge_lanes(gpu: Gpu, pcie: dict[str, Any]) -> Check:
    name = f"link of GPU {gpu.index}"
    if pcie["raw_bytes_per_s"] is None:
        return _not_measured(name)
    found = f"{pcie['lanes']} lanes of {pcie['speed']}: {_rate(pcie['raw_bytes_per_s'])} raw; not measured (--quick)"
    todo = _lanes_todo(pcie)
    return Check(name=name, status="weak" if todo else "ok", found=found, todo=todo, figures=pcie)


def _lanes_todo(pcie: dict[str, Any]) -> str:
    lanes, most = pcie["lanes"], pcie["max_lanes"]
    if lanes is None or most is None or lanes >= most:
        return ""
    return f"only {lanes} of {most} lanes are connected: look at the slot, the riser and the BIOS's bifurcation"


def judge_link(
    gpu: Gpu, rates: tuple[float, float, float], pcie: dict[str, Any], *, locked: bool
) -> Check:
    """Judge (to host, to device, both together) in bytes per second against what the link could give."""
    d2h, h2d, both = rates
    raw = pcie["raw_bytes_per_s"]
    figures = {
        "d2h_bytes_per_s": d2h,
        "h2d_bytes_per_s": h2d,
        "duplex_bytes_per_s": both,
        "locked": locked,
        **pcie,
    }
    found = f"to host {_rate(d2h)}, to device {_rate(h2d)}, both at once {_rate(both)}"
    if raw is not None:
        found += f" ({pcie['lanes']} lanes of {pcie['speed']}: {_rate(raw)} raw each way)"
    todo = _lanes_todo(pcie)
    if not todo and not locked:
        todo = "measured from pageable memory: see page-locked memory"
    elif not todo and min(d2h, h2d) < (_SLOW_LINK if raw is None else _SLOW_SHARE * raw):
        todo = (
            "slower than such a link should be: bind the process to the GPU's NUMA node, look for other "
            "traffic, and for IOMMU or ACS settings of virtual machines"
        )
    name = f"link of GPU {gpu.index}"
    return Check(
        name=name, status="weak" if todo else "ok", found=found, todo=todo, figures=figures
    )


def attention(context: Context) -> Sequence[Check]:
    """Which head dimensions cuDNN's attention takes here, asked of torch and tried."""
    name = "cuDNN attention"
    if not context.gpus:
        return [Check(name=name, status="absent", found="not used without a CUDA device")]
    import torch

    if not torch.backends.cudnn.is_available():
        found = "torch finds no cuDNN"
        todo = "install a torch that brings cuDNN; until then attention uses flash or the slower math kernel"
        return [Check(name=name, status="weak", found=found, todo=todo)]
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    accepted = {
        kind: [dim for dim in HEAD_DIMS if _accepts(kind, dim)] for kind in ("bfloat16", "float16")
    }
    tried: dict[str, str] = {}
    for kind, dim in () if context.quick else _TRIED:
        context.progress(f"cuDNN attention {kind} {dim}", 0.0)
        tried[f"{kind} {dim}"] = _try_attention(kind, dim)
    figures = {
        "version": torch.backends.cudnn.version(),
        "enabled": enabled,
        "accepted": accepted,
        "tried": tried,
        "flash_enabled": torch.backends.cuda.flash_sdp_enabled(),
    }
    return [judge_attention(figures)]


def judge_attention(figures: dict[str, Any]) -> Check:
    """Judge what torch said (`enabled`, `accepted`) and what running it gave (`tried`: empty text for success)."""
    name = "cuDNN attention"
    dims = figures["accepted"]["bfloat16"]
    failed = {case: why for case, why in figures["tried"].items() if why}
    found = f"cuDNN {figures['version']}, head dimensions {', '.join(map(str, dims)) or 'none'} in bfloat16"
    if not figures["enabled"]:
        todo = "switched off: torch.backends.cuda.enable_cudnn_sdp(True) allows it"
        return Check(name=name, status="weak", found=found, todo=todo, figures=figures)
    if not dims or len(failed) == len(figures["tried"]) > 0:
        why = next(iter(failed.values()), "torch accepts no head dimension")
        todo = "attention uses flash or the slower math kernel; a newer GPU or cuDNN is needed for this one"
        return Check(name=name, status="weak", found=f"{found}; {why}", todo=todo, figures=figures)
    if failed:
        found += f"; fails for {', '.join(f'{case} ({why})' for case, why in failed.items())}"
    elif figures["tried"]:
        found += f"; forward and backward run for {', '.join(figures['tried'])}"
    return Check(name=name, status="ok", found=found, figures=figures)


def _attention_inputs(kind: str, head_dim: int) -> list[Any]:
    import torch

    dtype = getattr(torch, kind)
    return [
        torch.randn(1, 2, 128, head_dim, device="cuda", dtype=dtype, requires_grad=True)
        for _ in range(3)
    ]


def _accepts(kind: str, head_dim: int) -> bool:
    """Ask torch whether cuDNN would take such a causal attention."""
    import torch

    query, key, value = _attention_inputs(kind, head_dim)
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, False)
    return bool(torch.backends.cuda.can_use_cudnn_attention(params, False))


def _try_attention(kind: str, head_dim: int) -> str:
    """Run forward and backward through cuDNN alone; return why that failed, or an empty string."""
    import warnings

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value = _attention_inputs(kind, head_dim)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            warnings.simplefilter("ignore")  # torch warns of each kernel that it passes over
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True
            )
            out.float().sum().backward()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return "" if bool(torch.isfinite(query.grad).all()) else "the gradient is not finite"


def _rate(bytes_per_s: float) -> str:
    from memopt.cli.probe import format_rate

    return format_rate(bytes_per_s)
