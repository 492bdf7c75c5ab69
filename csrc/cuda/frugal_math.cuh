// Arithmetic of the FRUGAL step: loading and storing, rounding, and the rules.
// All arithmetic is float32; the final addition is one rounding: w + (u - decay * w).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launchers.h"

namespace memopt {

constexpr uint32_t kMomentTag = 0x5BD1E995u;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ uint32_t mix32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The 32 random bits of (key low, key high) at a position; memopt/ops/counter_rng.py is the same.
__device__ __forceinline__ uint32_t random_bits(uint32_t low, uint32_t high, uint64_t index) {
  uint32_t mixed = mix32(static_cast<uint32_t>(index) ^ low);
  return mix32(mixed ^ high ^ (static_cast<uint32_t>(index >> 32) * 0x9E3779B9u));
}

// ---------------------------------------------------------------------------- numbers
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }

// Round up or down with the probability that makes the mean right; bfloat16 only.
template <typename T>
__device__ __forceinline__ T from_float_stochastic(float x, uint32_t random16) {
  return from_float<T>(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float_stochastic<__nv_bfloat16>(float x,
                                                                             uint32_t random16) {
  if (!isfinite(x)) return __float2bfloat16_rn(x);
  uint32_t bits = (__float_as_uint(x) + random16) >> 16;
  return __ushort_as_bfloat16(static_cast<unsigned short>(bits));
}

// Neighbouring numbers as they lie in memory; 16 bytes of them is what one instruction moves, and
// what a warp then moves is contiguous.
template <typename T, int kCount>
struct alignas(16) Pack {
  T value[kCount];
};

template <typename T>
constexpr int kWidth = 16 / sizeof(T);

// A pack's number j; of two bfloat16 in a word, each takes one instruction.
template <typename T, int kCount>
__device__ __forceinline__ float number_of(const Pack<T, kCount>& pack, int j) {
  return to_float(pack.value[j]);
}
template <int kCount>
__device__ __forceinline__ float number_of(const Pack<__nv_bfloat16, kCount>& pack, int j) {
  uint32_t pair = reinterpret_cast<const uint32_t*>(&pack)[j / 2];
  return __uint_as_float(j % 2 ? pair & 0xFFFF0000u : pair << 16);
}

template <typename T, int kCount = kWidth<T>>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* from) {
  Pack<T, kCount> result;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(result)) / 16; ++i) {
    reinterpret_cast<uint4*>(&result)[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
  }
  return result;
}

template <typename T, int kCount>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, kCount>& from) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(from)) / 16; ++i) {
    __stcs(reinterpret_cast<uint4*>(to) + i, reinterpret_cast<const uint4*>(&from)[i]);
  }
}

// Have the 32 bytes around an address brought to the first-level cache.
__device__ __forceinline__ void prefetch(const void* address) {
#if defined(__CUDA_ARCH__)
  uint32_t ignored;
  asm volatile("ld.global.ca.u8 %0, [%1];" : "=r"(ignored) : "l"(address));
#endif
}

__device__ __forceinline__ bool aligned16(const void* pointer) {
  return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0;
}

// ---------------------------------------------------------------------------- rules
// Scalars of one tensor in this step.
struct Scalars {
  float decay, free_step, step_size, denom_scale;
  float beta1_rest, beta2_rest, eps;
  int full_rule, free_rule, maximize;
  uint32_t call_tag;
};

// -1, 0, 1, and NaN for NaN.
__device__ __forceinline__ float sign_of(float x) {
  float one = x == 0.0f ? 0.0f : copysignf(1.0f, x);
  return isnan(x) ? x : one;
}

__device__ __forceinline__ float free_update(float g, const Scalars& s) {
  if (s.free_rule == MEMOPT_NONE) return 0.0f;
  float direction = s.free_rule == MEMOPT_SIGN ? sign_of(g) : g;
  return -s.free_step * direction;
}

// step * sign_of(g), but for the sign of a zero, which adding to a weight does not show.
__device__ __forceinline__ float signed_step(float g, float step) {
  uint32_t sign = __float_as_uint(g) & 0x80000000u;
  return fabsf(g) > 0.0f ? __uint_as_float(__float_as_uint(step) ^ sign) : g;
}

// Call body(update of a raw gradient), the rule and the direction being decided once for all.
template <typename Body>
__device__ __forceinline__ void with_free_rule(const Scalars& s, Body body) {
  float step = s.maximize ? s.free_step : -s.free_step;
  if (s.free_rule == MEMOPT_SIGN) {
    body([=](float g) { return signed_step(g, step); });
  } else if (s.free_rule == MEMOPT_SGD) {
    body([=](float g) { return step * g; });
  } else {
    body([](float) { return 0.0f; });
  }
}

// Returns the update and changes the moments.
__device__ __forceinline__ float full_update(float g, float& m, float& v, const Scalars& s) {
  if (s.full_rule == MEMOPT_ADAMW) {
    m = fmaf(s.beta1_rest, g - m, m);
    v = fmaf(s.beta2_rest, fmaf(g, g, -v), v);
    float denom = fmaf(sqrtf(v), s.denom_scale, s.eps);
    return -s.step_size * (m / denom);
  }
  if (s.full_rule == MEMOPT_LION) {
    float u = sign_of(fmaf(s.beta1_rest, g - m, m));
    m = fmaf(s.beta2_rest, g - m, m);
    return -s.step_size * u;
  }
  m = fmaf(1.0f - s.beta1_rest, m, g);
  return -s.step_size * m;
}

__device__ __forceinline__ float apply(float w, float update, const Scalars& s) {
  return w + fmaf(-s.decay, w, update);
}

// One weight that was `old`: with rounding kahan, `c` is its compensation.
template <typename T, int kRounding>
__device__ __forceinline__ void apply_rounded(float old, T& w, T& c, float update, const Scalars& s,
                                              uint32_t tag, uint64_t element) {
  if constexpr (kRounding == MEMOPT_KAHAN) {
    float result = apply(old + to_float(c), update, s);
    w = from_float<T>(result);
    c = from_float<T>(result - to_float(w));
  } else if constexpr (kRounding == MEMOPT_STOCHASTIC) {
    uint32_t bits = random_bits(tag, s.call_tag, element) & 0xFFFFu;
    w = from_float_stochastic<T>(apply(old, update, s), bits);
  } else {
    w = from_float<T>(apply(old, update, s));
  }
}

template <typename T, int kRounding>
__device__ __forceinline__ void apply_rounded(T& w, T& c, float update, const Scalars& s,
                                              uint32_t tag, uint64_t element) {
  apply_rounded<T, kRounding>(to_float(w), w, c, update, s, tag, element);
}

// Moments back in the weights' dtype; `number` is 0 for the first, 1 for the second.
template <typename T, int kRounding>
__device__ __forceinline__ T round_moment(float x, int number, uint32_t tag, uint64_t slot,
                                          const Scalars& s) {
  if constexpr (kRounding == MEMOPT_STOCHASTIC) {
    uint32_t bits = random_bits(tag ^ kMomentTag, s.call_tag, slot) >> (16 * number);
    return from_float_stochastic<T>(x, bits & 0xFFFFu);
  } else {
    return from_float<T>(x);
  }
}

}  // namespace memopt
