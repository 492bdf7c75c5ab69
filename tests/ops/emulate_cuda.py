"""The step's kernel on a CPU: its own sources, compiled by g++ with CUDA's words defined away.

A thread block is 256 threads of the operating system, one block after the other; `__syncwarp` and the
warp's votes are barriers of 32 threads; an asynchronous copy happens when its thread waits for it, and
not before. So what the kernel computes, the alignment of what it loads and stores at once, and whether
its lanes may run in any order between barriers, is tested without a GPU; its speed and registers are not.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import torch

from memopt.ops.frugal_draw import FIELDS
from memopt.ops.frugal_step import MAX_TENSORS

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
PRELUDE = r"""
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#include <cuda_runtime_api.h>
#include <vector_types.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#undef __shared__
#undef __device__
#undef __global__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block at a time
struct Dim { unsigned x, y, z; };
thread_local Dim threadIdx{0, 0, 0}, blockIdx{0, 0, 0};
Dim blockDim{256, 1, 1};
struct Warp { std::barrier<> meet{32}; std::atomic<int> any{0}; float lane[32]; uint32_t word[2][32]; };
static Warp* warps[32];
static std::barrier<>* block;
alignas(64) static char shared_memory[1 << 16];
static Warp& warp() { return *warps[threadIdx.x / 32]; }
static void __syncwarp() { warp().meet.arrive_and_wait(); }
static int __any_sync(unsigned, int mine) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) warp().any = 0;
  __syncwarp();
  if (mine) warp().any = 1;
  __syncwarp();
  return warp().any;
}
static float __shfl_xor_sync(unsigned, float x, int distance) {
  __syncwarp();
  warp().lane[threadIdx.x % 32] = x;
  __syncwarp();
  return warp().lane[threadIdx.x % 32 ^ distance];
}
// Every lane's word, of two turns: a lane is never two calls ahead of another.
static const uint32_t* words_of_lanes(uint32_t mine) {
  thread_local int turn = 0;
  turn = 1 - turn;
  warp().word[turn][threadIdx.x % 32] = mine;
  __syncwarp();
  return warp().word[turn];
}
static uint32_t __shfl_xor_sync(unsigned, uint32_t x, int distance) {
  return words_of_lanes(x)[threadIdx.x % 32 ^ distance];
}
static uint32_t __shfl_up_sync(unsigned, uint32_t x, int distance) {
  const uint32_t* words = words_of_lanes(x);
  int lane = threadIdx.x % 32;
  return words[lane < distance ? lane : lane - distance];
}
static uint32_t __ballot_sync(unsigned, int mine) {
  const uint32_t* words = words_of_lanes(mine != 0);
  uint32_t mask = 0;
  for (int i = 0; i < 32; ++i) mask |= words[i] << i;
  return mask;
}
static void __syncthreads() { block->arrive_and_wait(); }
static void atomicAdd(uint32_t* p, uint32_t x) { std::atomic_ref<uint32_t>(*p) += x; }
static std::atomic<int> misaligned{0};  // a GPU stops there, this CPU does not mind
template <class T> T* checked(T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) ++misaligned;
  return p;
}
template <class T> T read(const T* p) { return *checked(p); }
#define __ldg(p) read(p)
#define __ldcs(p) read(p)
#define __stcs(p, v) (*checked(p) = (v))
#define __popc(x) __builtin_popcount(x)
static uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint64_t)a * b >> 32; }
struct Copy { void* to; const void* from; size_t bytes; };
thread_local std::vector<std::vector<Copy>> copies(1);  // the last group is open
static void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  checked(static_cast<uint4*>(to));
  checked(static_cast<const uint4*>(from));
  copies.back().push_back({to, from, bytes});
}
static void __pipeline_commit() { copies.emplace_back(); }
static void __pipeline_wait_prior(size_t groups) {
  while (copies.size() > groups + 1) {
    for (const Copy& copy : copies.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    copies.erase(copies.begin());
  }
}
template <class To, class From> To same_bits(From x) { To y; std::memcpy(&y, &x, 4); return y; }
static uint32_t __float_as_uint(float x) { return same_bits<uint32_t>(x); }
static float __uint_as_float(uint32_t x) { return same_bits<float>(x); }
using std::isfinite;
using std::isnan;
#define make_uint2(a, b) uint2{(unsigned)(a), (unsigned)(b)}
#define make_uint4(a, b, c, d) uint4{a, b, c, d}
"""
DRIVER = r"""
template <typename Body>
void run_blocks(int blocks, unsigned size, Body body) {
  blockDim.x = size;
  for (int number = 0; number < blocks; ++number) {
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < size / 32; ++i) warps[i] = new Warp;
    block = new std::barrier<>(size);
    for (unsigned i = 0; i < size; ++i) {
      threads.emplace_back([=] {
        threadIdx = {i, 0, 0};
        blockIdx = {(unsigned)number, 0, 0};
        body();
      });
    }
    for (auto& one : threads) one.join();
    for (unsigned i = 0; i < size / 32; ++i) delete warps[i];
    delete block;
  }
}
extern "C" void emulated_draw(const memopt_frugal_draws* draws, int num_draws, int32_t* index,
                              int threads) {
  run_blocks(num_draws, threads, [=] { memopt::frugal_draw_kernel(*draws, index); });
}
template <typename T, int kRounding, memopt::Layout kLayout>
void run(const memopt_frugal_tensors* tensors, const memopt_frugal_launch* launch) {
  run_blocks(launch->num_chunks, memopt::kThreads<kLayout>, [=] {
    memopt::frugal_step_kernel<T, kRounding, kLayout>(*tensors, *launch);
  });
}
template <typename T, int kRounding>
void pick(const memopt_frugal_tensors* tensors, const memopt_frugal_launch* launch) {
  if (launch->scale[0]) run<T, kRounding, memopt::kQuantized>(tensors, launch);
  else if (launch->index) run<T, kRounding, memopt::kIndexed>(tensors, launch);
  else run<T, kRounding, memopt::kRuns>(tensors, launch);
}
extern "C" int misaligned_accesses() { return misaligned; }
extern "C" void emulated_step(const memopt_frugal_tensors* t, const memopt_frugal_launch* l,
                              int is_bfloat16, int rounding) {
  if (!is_bfloat16) return rounding ? pick<float, 1>(t, l) : pick<float, 0>(t, l);
  using T = __nv_bfloat16;
  rounding == 0 ? pick<T, 0>(t, l) : rounding == 1 ? pick<T, 1>(t, l) : pick<T, 2>(t, l);
}
"""


class Tensors(ctypes.Structure):
    """memopt_frugal_tensors."""

    _fields_ = [
        *((name, ctypes.c_void_p * MAX_TENSORS) for name in ("weight", "grad", "compensation")),
        *((name, ctypes.c_float * MAX_TENSORS) for name in ("step_size", "denom_scale")),
    ]


class Draw(ctypes.Structure):
    """memopt_frugal_draw_line."""

    _fields_ = [
        ("key", ctypes.c_uint64), ("position", ctypes.c_int64), ("size", ctypes.c_uint32),
        ("count", ctypes.c_uint32), ("kind", ctypes.c_int32),
    ]  # fmt: skip


class Launch(ctypes.Structure):
    """memopt_frugal_launch."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("segments", "chunks", "index")),
        ("num_chunks", ctypes.c_int32),
        ("moment", ctypes.c_void_p * 2),
        ("scale", ctypes.c_void_p * 2),
        *((name, ctypes.c_float) for name in ("decay", "free_step", "beta1_rest", "beta2_rest", "eps")),
        *((name, ctypes.c_int32) for name in ("full_rule", "free_rule", "maximize")),
        ("call_tag", ctypes.c_uint32),
        ("scalars", ctypes.c_void_p),
    ]  # fmt: skip


def cuda_include() -> Path | None:
    """Return the folder of CUDA's headers, None where there is none."""
    nvcc = shutil.which("nvcc")
    homes = [
        os.environ.get("CUDA_HOME"),
        "/usr/local/cuda",
        nvcc and Path(nvcc).resolve().parents[1],
    ]
    found = [Path(home) / "include" for home in homes if home]
    return next((path for path in found if (path / "cuda_bf16.h").is_file()), None)


def _joined(name: str, seen: set[str]) -> str:
    lines = []
    for line in (SOURCES / name).read_text().splitlines(keepends=True):
        included = re.match(r'#include "(.*\.cuh)"', line)
        if included and included.group(1) not in seen:
            seen.add(included.group(1))
            lines.append(_joined(included.group(1), seen))
        elif not included and not line.startswith(("#pragma", "#include <cuda_pipeline")):
            lines.append(line)
    return "".join(lines)


def _before(name: str, end: str, seen: set[str]) -> str:
    """Return a source up to where it launches."""
    source = _joined(name, seen)
    return source[: source.index(end)]


def build(folder: Path, include: Path, defines: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compile the kernel's sources for this CPU."""
    seen: set[str] = set()
    kernel = _before(
        "frugal_step.cu", "template <typename T, int kRounding, Layout kLayout>\ncudaError_t", seen
    )
    kernel += "}\n" + _before("frugal_draw.cu", "}  // namespace memopt", seen)
    shared = re.compile(r"__shared__ (Exchange<T, kRounding>) tiles\[.*\];")
    assert shared.search(kernel), "the kernel's shared memory has another form"
    kernel = shared.sub(r"auto* tiles = reinterpret_cast<\1*>(shared_memory);", kernel)
    file, library = folder / "kernel.cpp", folder / "kernel.so"
    file.write_text(PRELUDE + kernel + "}\n" + DRIVER)
    command = ["g++", "-O1", "-std=c++20", "-ffp-contract=off", "-fPIC", "-shared", "-pthread",
               *(f"-D{word}" for word in defines),
               f"-I{SOURCES}", f"-isystem{include}", str(file), "-o", str(library)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return ctypes.CDLL(str(library))


def step_with(library: ctypes.CDLL):
    """Return a function with the operator's signature that runs the emulated kernel."""

    def step(weights, grads, state, compensations, segments, chunks, index, step_sizes,
             denom_scales, numbers, choices, scalars):  # fmt: skip
        tensors, launch = Tensors(), Launch()
        for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
            tensors.weight[i], tensors.grad[i] = weight.data_ptr(), grad.data_ptr()
            tensors.step_size[i], tensors.denom_scale[i] = step_sizes[i], denom_scales[i]
            if compensations:
                tensors.compensation[i] = compensations[i].data_ptr()
        quantized = bool(choices[3])
        launch.segments, launch.chunks = segments.data_ptr(), chunks.data_ptr()
        launch.index = None if index is None else index.data_ptr()
        launch.num_chunks = chunks.numel()
        for i, array in enumerate(state[::2] if quantized else state):
            launch.moment[i] = array.data_ptr()
        for i, array in enumerate(state[1::2] if quantized else []):
            launch.scale[i] = array.data_ptr()
        names = ("decay", "free_step", "beta1_rest", "beta2_rest", "eps")
        for name, number in zip(names, numbers, strict=True):
            setattr(launch, name, number)
        launch.full_rule, launch.free_rule, rounding, _, launch.maximize = choices[:5]
        launch.call_tag = choices[5] & 0xFFFFFFFF
        is_bfloat16 = weights[0].dtype == torch.bfloat16
        library.emulated_step(
            ctypes.byref(tensors), ctypes.byref(launch), int(is_bfloat16), rounding
        )
        assert library.misaligned_accesses() == 0

    return step


def draw_with(library: ctypes.CDLL, threads: int = 64):
    """Return a function with the draw's signature that runs the emulated kernel."""

    def draw(index, draws):
        packed, count = (Draw * MAX_TENSORS)(), len(draws) // FIELDS
        for i in range(count):
            key, size, chosen, kind, position = draws[FIELDS * i : FIELDS * (i + 1)]
            packed[i] = Draw(key & (2**64 - 1), position, size, chosen, kind)
        address = ctypes.c_void_p(index.data_ptr())
        library.emulated_draw(ctypes.byref(packed), count, address, threads)

    return draw
