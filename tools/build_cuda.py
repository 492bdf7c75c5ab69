# ruff: noqa: INP001, S603 - a script outside of the package; the commands are made here
"""Build `libmemopt_cuda.so` with nvcc, for the torch of this Python or any later one.

    python tools/build_cuda.py [--arch 90] [--out DIRECTORY]

`torch.utils.cpp_extension` refuses to build CUDA code beside a CPU build of torch, so nvcc is called
directly. Only torch's stable ABI is used (target: torch 2.11), and the one symbol that a CPU build
lacks is weak, so the same file loads on both. The default place is `.native/` of the checkout.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "libmemopt_cuda.so"
STABLE_ABI = "0x020b000000000000"  # torch 2.11, the oldest one that memopt runs on
SOURCES = (
    "csrc/cuda/frugal_step.cu",
    "csrc/cuda/frugal_draw.cu",
    "csrc/cuda/frugal_clock.cu",
    "csrc/cuda/batched_copy.cu",
    "csrc/torch/ops.cpp",
)


def find_nvcc() -> str:
    """Return the path of nvcc from $CUDA_HOME, $PATH or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for candidate in (f"{home}/bin/nvcc", shutil.which("nvcc")):
        if candidate and Path(candidate).is_file():
            return candidate
    raise SystemExit("nvcc was not found: set CUDA_HOME to a CUDA 13 toolkit")


def torch_directory() -> Path:
    """Return torch's directory without importing it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch is not installed in this Python")
    return Path(spec.origin).parent


def nvcc_version(nvcc: str) -> str:
    """Return nvcc's release, such as 13.0."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return text.split("release ")[1].split(",")[0]


def build(out: Path, archs: list[str]) -> Path:
    """Compile all sources in parallel and link them; return the library's path."""
    nvcc, torch_home = find_nvcc(), torch_directory()
    objects = out / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    version = (
        (torch_home / "version.py")
        .read_text()
        .split("__version__ = ")[1]
        .split("\n")[0]
        .strip("'\"")
    )
    info = f"CUDA {nvcc_version(nvcc)}, sm_{'+sm_'.join(archs)}, built on torch {version}, needs torch >= 2.11"
    flags = [
        "-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden",
        f"-I{torch_home / 'include'}", f"-I{torch_home / 'include/torch/csrc/api/include'}",
        "-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DUSE_CUDA",
        f'-DMEMOPT_BUILD_INFO="{info}"',
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs),
    ]  # fmt: skip
    commands, targets = [], []
    for source in SOURCES:
        target = objects / (Path(source).name + ".o")
        commands.append([nvcc, *flags, "-c", str(ROOT / source), "-o", str(target)])
        targets.append(str(target))
    with ThreadPoolExecutor() as pool:
        list(pool.map(_run, commands))
    library = out / LIBRARY
    part = out / (LIBRARY + f".{os.getpid()}")
    _run([
        nvcc, "-shared", *targets, "-o", str(part), "-cudart", "shared", f"-L{torch_home / 'lib'}",
        "-Xlinker", "--no-as-needed", "-ltorch",
    ])  # fmt: skip
    part.replace(library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def main() -> None:
    """Parse arguments and build."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--arch", action="append", help="compute capability, e.g. 90 (default)")
    parser.add_argument("--out", type=Path, default=ROOT / ".native", help="where the library goes")
    options = parser.parse_args()
    begin = time.perf_counter()
    library = build(options.out, options.arch or ["90"])
    sys.stdout.write(f"{library}: {time.perf_counter() - begin:.0f} s\n")


if __name__ == "__main__":
    main()
