// Columns and strata: elements with and without state lie among each other, so a thread that
// takes neighbouring elements would run both rules for each of them. Here a warp copies a tile to
// shared memory and goes over it twice:
//
//   1. by elements: each lane updates packs of 16 bytes by the state-free rule, out of place, also
//      what has state: a branch would cost more than the few operations that are thrown away;
//   2. by slots: each lane takes a slot of the state, finds its element, and updates it densely
//      from the old weight; a tile's moments are contiguous in the arena, whatever the selection.
//
// Then the tile's new weights leave as packs. What bounds this is not latency alone but the number
// of instructions, so: copies to shared memory need no registers (cp.async), the moments come near
// while the first pass computes, and places are found in 32 bits.
// What a selection must give is `Slots`: where in the arena a tile's slots begin, the lane's next
// one from there on, and for each of them (32 apart) the element's place in the tile.
#pragma once

#include <cuda_pipeline.h>

#include "frugal_math.cuh"

// Packs of 16 bytes of a lane in a tile, tiles of a warp on their way at the same time, threads of a
// block and blocks on a processor. Other values are for measuring: benchmarks/bench_frugal_tiles.py.
#if !defined(MEMOPT_TILE_PACKS)
#define MEMOPT_TILE_PACKS 4
#endif
#if !defined(MEMOPT_TILE_STAGES)
#define MEMOPT_TILE_STAGES 1
#endif
#if !defined(MEMOPT_TILE_THREADS)
#define MEMOPT_TILE_THREADS 128
#endif
#if !defined(MEMOPT_TILE_BLOCKS)
#define MEMOPT_TILE_BLOCKS 7
#endif

namespace memopt {

template <typename T>
struct Chunk;

constexpr int kBatch = 4;  // slots of a lane whose moments are on their way at the same time
constexpr int kStages = MEMOPT_TILE_STAGES;
// With a compensation beside each weight, shared memory suffices for half.
template <int kRounding>
constexpr int kPacks = kRounding == MEMOPT_KAHAN ? MEMOPT_TILE_PACKS / 2 : MEMOPT_TILE_PACKS;

template <typename T, int kRounding>
constexpr int kTile = 32 * kPacks<kRounding> * kWidth<T>;

// A warp's tiles: what comes in, a stage each, and what goes out.
enum Array { kWeight, kCompensation, kGrad };

template <typename T, int kRounding>
struct alignas(16) Exchange {
  static constexpr bool kKahan = kRounding == MEMOPT_KAHAN;
  T in[kStages][kKahan ? 3 : 2][kTile<T, kRounding>];
  T out[kKahan ? 2 : 1][kTile<T, kRounding>];

  __device__ T* source(int stage, Array array) {
    return in[stage][kKahan ? array : (array == kGrad)];
  }
};

// floor(x / divisor) for quotients below 2^50, without the 64-bit division's hundred instructions.
struct Divider {
  uint64_t divisor;
  double inverse;

  __device__ explicit Divider(uint64_t d) : divisor(d), inverse(1.0 / static_cast<double>(d)) {}
  __device__ uint64_t divide(uint64_t x, uint64_t& remainder) const {
    uint64_t quotient = static_cast<uint64_t>(static_cast<double>(x) * inverse);
    int64_t rest = static_cast<int64_t>(x - quotient * divisor);
    if (rest < 0) {
      --quotient;
      rest += static_cast<int64_t>(divisor);
    } else if (rest >= static_cast<int64_t>(divisor)) {
      ++quotient;
      rest -= static_cast<int64_t>(divisor);
    }
    remainder = static_cast<uint64_t>(rest);
    return quotient;
  }
};

// Columns of a matrix. `words` holds (mask, rank of its first bit) for every 32 columns, `list` the
// chosen columns in ascending order.
struct ColumnSlots {
  uint32_t width, chosen;
  const int2* words;
  const int32_t* list;
  int64_t chunk_state;    // arena position of the first slot of the chunk's first row
  uint32_t chunk_column;  // column of the chunk's first element
  int64_t base;           // arena position of the tile's first slot
  int32_t shift;          // from (row, column) to the place in the tile
  uint32_t first, count;  // rank of the tile's first slot in its row; slots of the tile
  uint32_t next;          // the lane's next one

  __device__ ColumnSlots(int64_t state, uint64_t columns, uint64_t chosen_, const int2* words_,
                         uint64_t chunk_element)
      : width(static_cast<uint32_t>(columns)), chosen(static_cast<uint32_t>(chosen_)),
        words(words_), list(reinterpret_cast<const int32_t*>(words_ + (columns + 31) / 32)) {
    uint64_t row = chunk_element / columns;
    chunk_column = static_cast<uint32_t>(chunk_element - row * columns);
    chunk_state = state + static_cast<int64_t>(row * chosen_);
  }

  __device__ uint32_t most() const { return count; }  // slots of the tile, or a few more
  // How many chosen columns are left of a column.
  __device__ uint32_t rank(uint32_t column) const {
    int2 word = __ldg(words + column / 32);
    return word.y + __popc(static_cast<uint32_t>(word.x) & ((1u << (column & 31)) - 1));
  }
  // The tile of `size` elements from the chunk's element `place` on.
  __device__ void begin(int place, int size, int lane) {
    uint32_t column = chunk_column + place, row = column / width;
    column -= row * width;
    first = rank(column);
    base = chunk_state + static_cast<int64_t>(row) * chosen + first;
    uint32_t stop = column + size, rows = 0;
    if (stop >= width) rows = stop / width;
    count = rows * chosen + rank(stop - rows * width) - first;
    shift = -static_cast<int32_t>(column);
    next = lane;
  }
  __device__ bool more() const { return next - threadIdx.x % 32 < count; }
  __device__ void take(int (&place)[kBatch]) {
    const int32_t* from = list + first + next;
    if (first + count <= chosen) {  // a tile in one row, which most are
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        place[b] = next + 32 * b < count ? __ldg(from + 32 * b) + shift : -1;
      }
    } else {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        uint32_t at = first + next + 32 * b, row = at / chosen;
        int column = next + 32 * b < count ? __ldg(list + (at - row * chosen)) + shift : 0;
        place[b] = next + 32 * b < count ? static_cast<int>(row * width) + column : -1;
      }
    }
    next += 32 * kBatch;
  }
};

// The strata of memopt/optim/selections/coordinates.py: begin(j) = floor((j N + u) / k), but 0 for
// the first and N for the one after the last. memopt/optim/native.py sees to it that there are
// fewer than 2^31 and that they are shorter than 2^22: what lies near a tile then fits 32 bits.
struct StrataSlots {
  int64_t state;
  uint64_t size, offset, chunk_element;
  uint32_t count, step, rest;
  uint32_t step32, rest32;  // from a stratum to the one 32 further
  Divider by_count, by_size;
  uint32_t key_low, key_high;
  int64_t base;          // arena position of the tile's first stratum
  uint32_t number, next;  // of that stratum; the lane's next one, seen from it
  int32_t length, origin, stop;  // of the tile; where the tensor begins and stops, seen from it
  int32_t raw;           // the next one's begin as the formula gives it, seen from the tile
  uint32_t remainder;

  __device__ StrataSlots(int64_t state_, uint64_t n, uint64_t k, uint64_t key, uint64_t u,
                         uint64_t chunk_element_)
      : state(state_), size(n), offset(u), chunk_element(chunk_element_),
        count(static_cast<uint32_t>(k)), by_count(k), by_size(n),
        key_low(static_cast<uint32_t>(key)), key_high(static_cast<uint32_t>(key >> 32)) {
    uint64_t remains;
    step = static_cast<uint32_t>(by_count.divide(n, remains));
    rest = static_cast<uint32_t>(remains);
    step32 = 32 * step + static_cast<uint32_t>(by_count.divide(32 * remains, remains));
    rest32 = static_cast<uint32_t>(remains);
  }
  // Far away is far enough: differences are taken modulo 2^32.
  __device__ int32_t seen_from(uint64_t element, uint64_t position) const {
    return static_cast<int32_t>(static_cast<uint32_t>(position - element));
  }
  __device__ void begin(int place, int length_, int lane) {
    uint64_t element = chunk_element + place, reach = (element + 1) * count, remains;
    uint64_t stratum = reach > offset ? by_size.divide(reach - offset - 1, remains) : 0;
    base = state + static_cast<int64_t>(stratum);
    number = static_cast<uint32_t>(stratum);
    next = lane;
    raw = seen_from(element, by_count.divide((stratum + lane) * size + offset, remains));
    remainder = static_cast<uint32_t>(remains);
    length = length_;
    origin = seen_from(element, 0);
    stop = seen_from(element, size);
  }
  __device__ uint32_t most() const {
    uint32_t touched = length / step + 2, left = count - number;
    return left < touched ? left : touched;
  }
  // The warp's lanes are at 32 neighbouring strata; those behind the last begin behind the tensor.
  __device__ bool more() const {
    return __any_sync(kAllLanes, number + next == 0 || raw < length);
  }
  __device__ void take(int (&place)[kBatch]) {
    if (number == 0 || stop <= length) {
      take_some<true>(place);
    } else {
      take_some<false>(place);
    }
  }
  // kEnds: the tensor's first or last stratum, longer than the formula says, may be there.
  template <bool kEnds>
  __device__ __forceinline__ void take_some(int (&place)[kBatch]) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      uint32_t stratum = number + next + 32 * b, bits = random_bits(key_low, key_high, stratum);
      int32_t left = raw, right = raw + static_cast<int32_t>(step);
      if (remainder + rest >= count) ++right;
      if (kEnds && stratum == 0) left = origin;
      if (kEnds && stratum + 1 == count) right = stop;
      int32_t pick = left + static_cast<int32_t>(__umulhi(bits, right - left));
      place[b] = static_cast<uint32_t>(pick) < static_cast<uint32_t>(length) ? pick : -1;
      raw += static_cast<int32_t>(step32);
      remainder += rest32;
      if (remainder >= count) {
        remainder -= count;
        ++raw;
      }
    }
    next += 32 * kBatch;
  }
};

// Copy an array of a tile in; `whole`: as packs that arrive at some time before the next wait.
template <typename T, int kCount>
__device__ __forceinline__ void fetch_array(const T* from, T* to, int size, bool whole, int lane) {
  if (whole) {
    const uint4* packs = reinterpret_cast<const uint4*>(from) + lane;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      __pipeline_memcpy_async(reinterpret_cast<uint4*>(to) + lane + u * 32, packs + u * 32, 16);
    }
  } else {
#pragma unroll 1
    for (int place = lane; place < size; place += 32) to[place] = from[place];
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void store_array(const T* from, T* to, int size, bool whole, int lane) {
  if (whole) {
    uint4* packs = reinterpret_cast<uint4*>(to) + lane;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      __stcs(packs + u * 32, reinterpret_cast<const uint4*>(from)[lane + u * 32]);
    }
  } else {
#pragma unroll 1
    for (int place = lane; place < size; place += 32) to[place] = from[place];
  }
}

// A tile's way in, from the chunk's element `first` on; the caller waits for the copies.
template <typename T, int kRounding>
__device__ __forceinline__ void fetch_tile(const Chunk<T>& c, Exchange<T, kRounding>& tile,
                                           int stage, bool aligned, int first, int lane) {
  constexpr int kCount = kPacks<kRounding>;
  int size = c.size - first;
  bool whole = aligned && size >= kTile<T, kRounding>;
  if (size > kTile<T, kRounding>) size = kTile<T, kRounding>;
  if (size > 0) {
    fetch_array<T, kCount>(c.weight + first, tile.source(stage, kWeight), size, whole, lane);
    fetch_array<T, kCount>(c.grad + first, tile.source(stage, kGrad), size, whole, lane);
    if constexpr (kRounding == MEMOPT_KAHAN) {
      T* to = tile.source(stage, kCompensation);
      fetch_array<T, kCount>(c.compensation + first, to, size, whole, lane);
    }
  }
  __pipeline_commit();  // also of nothing: waiting counts commits
}

// The first pass: every element of the tile by the state-free rule.
template <typename T, int kRounding>
__device__ __forceinline__ void step_elements(const Chunk<T>& c, Exchange<T, kRounding>& tile,
                                              int stage, int first, int lane) {
  using Packed = Pack<T, kWidth<T>>;
  with_free_rule(c.s, [&](auto free_rule) {
#pragma unroll 2
    for (int u = 0; u < kPacks<kRounding>; ++u) {
      int place = (u * 32 + lane) * kWidth<T>;
      Packed w = *reinterpret_cast<const Packed*>(tile.source(stage, kWeight) + place), comp;
      Packed g = *reinterpret_cast<const Packed*>(tile.source(stage, kGrad) + place), result;
      if constexpr (kRounding == MEMOPT_KAHAN) {
        comp = *reinterpret_cast<const Packed*>(tile.source(stage, kCompensation) + place);
      }
#pragma unroll
      for (int j = 0; j < kWidth<T>; ++j) {
        apply_rounded<T, kRounding>(number_of(w, j), result.value[j], comp.value[j],
                                    free_rule(number_of(g, j)), c.s, c.tag,
                                    c.element + first + place + j);
      }
      *reinterpret_cast<Packed*>(tile.out[0] + place) = result;
      if constexpr (kRounding == MEMOPT_KAHAN) {
        *reinterpret_cast<Packed*>(tile.out[1] + place) = comp;
      }
    }
  });
}

// Bring a tile's moments near: one number of every 32 bytes is asked for and not waited for.
template <typename T, typename Slots>
__device__ __forceinline__ void approach_moments(const Chunk<T>& c, const Slots& slots, int lane) {
  constexpr int kSector = 32 / sizeof(T);
  for (uint32_t slot = lane * kSector, most = slots.most(); slot < most; slot += 32 * kSector) {
    prefetch(c.moment[0] + slots.base + slot);
    if (c.has_second) prefetch(c.moment[1] + slots.base + slot);
  }
}

// The second pass: the tile's slots by the state-full rule.
template <typename T, int kRounding, int kRule, typename Slots>
__device__ __forceinline__ void step_slots(const Chunk<T>& c, Exchange<T, kRounding>& tile,
                                           int stage, int first, Slots& slots) {
  constexpr bool kSecond = kRule == MEMOPT_ADAMW;
  Scalars s = c.s;
  s.full_rule = kRule;
  T *first_mean = c.moment[0] + slots.base, *first_square = c.moment[1] + slots.base;
  while (slots.more()) {
    int place[kBatch];
    T mean[kBatch], square[kBatch];
    uint32_t slot = slots.next;
    T *m = first_mean + slot, *v = first_square + slot;
    slots.take(place);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (place[b] < 0) continue;
      mean[b] = m[32 * b];
      if (kSecond) square[b] = v[32 * b];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (place[b] < 0) continue;
      float gradient = to_float(tile.source(stage, kGrad)[place[b]]);
      if (s.maximize) gradient = -gradient;
      float new_mean = to_float(mean[b]), new_square = kSecond ? to_float(square[b]) : 0.0f;
      float update = full_update(gradient, new_mean, new_square, s);
      uint64_t number = slots.base - c.origin + slot + 32 * b;
      m[32 * b] = round_moment<T, kRounding>(new_mean, 0, c.tag, number, s);
      if (kSecond) v[32 * b] = round_moment<T, kRounding>(new_square, 1, c.tag, number, s);
      T w = tile.source(stage, kWeight)[place[b]], comp = from_float<T>(0.0f);
      if constexpr (kRounding == MEMOPT_KAHAN) comp = tile.source(stage, kCompensation)[place[b]];
      apply_rounded<T, kRounding>(w, comp, update, s, c.tag, c.element + first + place[b]);
      tile.out[0][place[b]] = w;
      if constexpr (kRounding == MEMOPT_KAHAN) tile.out[1][place[b]] = comp;
    }
  }
}

// All tiles of a chunk. `tile` is the warp's own.
template <typename T, int kRounding, typename Slots>
__device__ void run_tiles(const Chunk<T>& c, bool aligned, Exchange<T, kRounding>& tile,
                          Slots slots) {
  constexpr int kSize = kTile<T, kRounding>, kCount = kPacks<kRounding>;
  int lane = threadIdx.x % 32, stride = blockDim.x / 32 * kSize, stage = 0;
  int first = threadIdx.x / 32 * kSize;
#pragma unroll
  for (int s = 0; s < kStages; ++s) {
    fetch_tile(c, tile, s, aligned, first + s * stride, lane);
  }
  for (; first < c.size; first += stride) {
    int size = c.size - first < kSize ? c.size - first : kSize;
    slots.begin(first, size, lane);
    approach_moments(c, slots, lane);
    __pipeline_wait_prior(kStages - 1);
    __syncwarp();  // what other lanes fetched
    step_elements(c, tile, stage, first, lane);
    __syncwarp();  // what this pass left is overwritten where there is state
    if (c.s.full_rule == MEMOPT_ADAMW) {
      step_slots<T, kRounding, MEMOPT_ADAMW>(c, tile, stage, first, slots);
    } else if (c.s.full_rule == MEMOPT_LION) {
      step_slots<T, kRounding, MEMOPT_LION>(c, tile, stage, first, slots);
    } else {
      step_slots<T, kRounding, MEMOPT_SGDM>(c, tile, stage, first, slots);
    }
    __syncwarp();  // the tile is done: its place is free, its weights may go
    fetch_tile(c, tile, stage, aligned, first + kStages * stride, lane);
    bool whole = aligned && size == kSize;
    store_array<T, kCount>(tile.out[0], c.weight + first, size, whole, lane);
    if constexpr (kRounding == MEMOPT_KAHAN) {
      store_array<T, kCount>(tile.out[1], c.compensation + first, size, whole, lane);
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
}

}  // namespace memopt
