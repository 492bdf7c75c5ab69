// Moments as 8-bit codes in blocks of 256 with one float32 scale each: memopt/ops/quantize.py on a
// GPU. One warp handles one block, eight neighbouring elements a lane.
#pragma once

#include <cfloat>

#include "frugal_math.cuh"

namespace memopt {

constexpr int kVector = 8;  // elements of a lane

template <typename T>
struct Chunk;

__device__ __forceinline__ float decode_signed(uint32_t code, float scale) {
  float level = static_cast<float>(static_cast<int8_t>(code)) * (1.0f / 127.0f);
  return level * fabsf(level) * scale;
}

__device__ __forceinline__ float decode_unsigned(uint32_t code, float scale) {
  float level = static_cast<float>(code) * (1.0f / 255.0f);
  level *= level;
  return level * level * scale;
}

__device__ __forceinline__ uint32_t encode_signed(float x, float inverse, float random) {
  float level = copysignf(sqrtf(fabsf(x) * inverse) * 127.0f, x);
  level = random < 0.0f ? rintf(level) : floorf(level + random);
  level = fminf(fmaxf(level, -127.0f), 127.0f);
  return static_cast<uint32_t>(static_cast<int>(level)) & 0xFFu;
}

// A second moment that is not zero never gets code 0: the step would be m / eps.
__device__ __forceinline__ uint32_t encode_unsigned(float x, float inverse, float random) {
  float level = sqrtf(sqrtf(x * inverse)) * 255.0f;
  level = random < 0.0f ? rintf(level) : floorf(level + random);
  if (level == 0.0f && x > 0.0f) level = 1.0f;
  return static_cast<uint32_t>(fminf(fmaxf(level, 0.0f), 255.0f));
}

__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) {
    uint32_t other = __shfl_xor_sync(kAllLanes, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

__device__ __forceinline__ uint32_t byte_of(const uint2& codes, int j) {
  return (j < 4 ? codes.x >> (8 * j) : codes.y >> (8 * (j - 4))) & 0xFFu;
}

__device__ __forceinline__ void put_byte(uint2& codes, int j, uint32_t byte) {
  if (j < 4) {
    codes.x |= byte << (8 * j);
  } else {
    codes.y |= byte << (8 * (j - 4));
  }
}

// A moment's eight numbers of this lane: load, and encode with the warp's largest magnitude.
template <int kRounding, bool kSigned>
struct Moment8 {
  uint8_t* codes;
  float* scale;
  float value[kVector];

  __device__ Moment8(void* base, float* scales, int64_t state, int lane)
      : codes(static_cast<uint8_t*>(base) + state + lane * kVector),
        scale(scales + state / MEMOPT_QUANTIZE_BLOCK) {
    uint2 raw = __ldcs(reinterpret_cast<const uint2*>(codes));
    float s = __ldg(scale);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      value[j] = kSigned ? decode_signed(byte_of(raw, j), s) : decode_unsigned(byte_of(raw, j), s);
    }
  }

  __device__ void store(int lane, uint32_t tag, uint32_t call_tag, uint64_t slot) {
    // Magnitudes are in the order of their bits, with infinity and then NaN on top, which fmaxf drops.
    uint32_t magnitude = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      uint32_t bits = __float_as_uint(value[j]) & 0x7FFFFFFFu;
      magnitude = bits > magnitude ? bits : magnitude;
    }
    float largest = __uint_as_float(warp_max(magnitude));
    uint2 raw = make_uint2(0, 0);
    if (isfinite(largest)) {
      float inverse = largest > 0.0f ? fminf(1.0f / largest, FLT_MAX) : 1.0f;  // 0 * inverse is 0
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        float random = -1.0f;
        if (kRounding == MEMOPT_STOCHASTIC) {
          uint32_t bits = random_bits(tag ^ kMomentTag, call_tag, slot + j);
          random = static_cast<float>(kSigned ? bits & 0xFFFFu : bits >> 16) * (1.0f / 65536.0f);
        }
        put_byte(raw, j, kSigned ? encode_signed(value[j], inverse, random)
                                 : encode_unsigned(value[j], inverse, random));
      }
    } else {
      largest = __uint_as_float(0x7FC00000u);  // NaN: so is all that is read back
    }
    __stcs(reinterpret_cast<uint2*>(codes), raw);
    if (lane == 0) *scale = largest;
  }
};

// One warp, one block of 256 elements of which `count` exist; `state` < 0: they have no state.
template <typename T, int kRounding>
__device__ __forceinline__ void step_block(const Chunk<T>& c, const memopt_frugal_launch& launch,
                                           bool aligned, int i, int count, int64_t state) {
  int lane = threadIdx.x % 32;
  int mine = count - lane * kVector;
  mine = mine < 0 ? 0 : (mine > kVector ? kVector : mine);
  int at = i + lane * kVector;
  bool vector = aligned && mine == kVector;
  Pack<T, kVector> w, g, comp;
  if (vector) {
    w = load_pack<T, kVector>(c.weight + at);
    g = load_pack<T, kVector>(c.grad + at);
    if constexpr (kRounding == MEMOPT_KAHAN) comp = load_pack<T, kVector>(c.compensation + at);
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      bool exists = j < mine;
      w.value[j] = exists ? c.weight[at + j] : from_float<T>(0.0f);
      g.value[j] = exists ? c.grad[at + j] : from_float<T>(0.0f);
      if constexpr (kRounding == MEMOPT_KAHAN) {
        comp.value[j] = exists ? c.compensation[at + j] : from_float<T>(0.0f);
      }
    }
  }
  float update[kVector];
  if (state >= 0) {
    Moment8<kRounding, true> m(launch.moment[0], launch.scale[0], state, lane);
    Moment8<kRounding, false> v(c.has_second ? launch.moment[1] : launch.moment[0],
                                c.has_second ? launch.scale[1] : launch.scale[0], state, lane);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      float gradient = c.s.maximize ? -to_float(g.value[j]) : to_float(g.value[j]);
      update[j] = full_update(gradient, m.value[j], v.value[j], c.s);
      if (j >= mine) m.value[j] = v.value[j] = 0.0f;
    }
    uint64_t slot = state + lane * kVector - c.origin;
    __syncwarp();  // every lane has read the scales before lane 0 writes them
    m.store(lane, c.tag, c.s.call_tag, slot);
    if (c.has_second) v.store(lane, c.tag, c.s.call_tag, slot);
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      float gradient = c.s.maximize ? -to_float(g.value[j]) : to_float(g.value[j]);
      update[j] = free_update(gradient, c.s);
    }
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    apply_rounded<T, kRounding>(w.value[j], comp.value[j], update[j], c.s, c.tag,
                                c.element + at + j);
  }
  if (vector) {
    store_pack(c.weight + at, w);
    if constexpr (kRounding == MEMOPT_KAHAN) store_pack(c.compensation + at, comp);
  } else {
    for (int j = 0; j < mine; ++j) {
      c.weight[at + j] = w.value[j];
      if constexpr (kRounding == MEMOPT_KAHAN) c.compensation[at + j] = comp.value[j];
    }
  }
}

// A chunk whose state is quantised: in order from `state` on (slots NULL), or by rows of `columns`
// elements, a multiple of the block.
template <typename T, int kRounding>
__device__ void run_quantized(const Chunk<T>& c, const memopt_frugal_launch& launch, bool aligned,
                              int64_t state, uint64_t columns, const int32_t* slots) {
  int warps = blockDim.x / 32;
  for (int i = threadIdx.x / 32 * MEMOPT_QUANTIZE_BLOCK; i < c.size;
       i += warps * MEMOPT_QUANTIZE_BLOCK) {
    int left = c.size - i;
    int64_t at = state + i;
    if (slots != nullptr) {
      int64_t element = static_cast<int64_t>(c.element) + i, width = static_cast<int64_t>(columns);
      int64_t row = element / width, slot = __ldg(slots + row);
      at = slot < 0 ? -1 : state + slot * width + (element - row * width);
    }
    int count = left < MEMOPT_QUANTIZE_BLOCK ? left : MEMOPT_QUANTIZE_BLOCK;
    step_block<T, kRounding>(c, launch, aligned, i, count, at);
  }
}

}  // namespace memopt
