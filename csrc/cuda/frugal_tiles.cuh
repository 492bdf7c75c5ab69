// Columns and strata: elements with and without state lie among each other, so a thread that
// takes neighbouring elements would run both rules for each of them. Here a warp takes a tile twice:
//
//   1. by slots: each lane takes a slot of the state, finds its element, and updates densely; the
//      moments of a tile are contiguous in the arena, whatever the selection;
//   2. by elements: each lane takes packs of 16 bytes, with the update that the first pass left for an
//      element, or else the state-free one.
//
// Gradients and updates pass through shared memory. What a selection must give is `Slots`: for the
// tile's slots, one after the other a lane, the place in the tile and the place in the arena.
#pragma once

#include "frugal_math.cuh"

namespace memopt {

template <typename T>
struct Chunk;

constexpr uint32_t kWarp = 0xFFFFFFFFu;
constexpr int kBatch = 4;  // slots of a lane whose moments are on their way at the same time
// Packs of a lane in a tile; with a compensation beside each weight, registers suffice for half.
template <int kRounding>
constexpr int kPacks = kRounding == MEMOPT_KAHAN ? 2 : 4;
// An update that no arithmetic gives: CUDA's NaN is 0x7FFFFFFF.
constexpr uint32_t kNoUpdate = 0xFFFFDEADu;

template <typename T, int kRounding>
constexpr int kTile = 32 * kPacks<kRounding> * kWidth<T>;

template <typename T, int kRounding>
struct alignas(16) Exchange {
  T grad[kTile<T, kRounding>];
  uint32_t update[kTile<T, kRounding>];
};

// One slot of a tile: the element's place in it (negative: none) and the state's in the arena.
struct Slot {
  int place;
  int64_t state;
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
  int64_t state;
  uint32_t width, chosen;
  const int2* words;
  const int32_t* list;
  int64_t base;     // arena position of the tile's first slot
  int32_t shift;    // from (row, column) to the place in the tile
  uint32_t first;   // rank of the tile's first slot in its row
  int count, next;  // slots of the tile; the lane's next one

  __device__ ColumnSlots(int64_t state_, uint64_t columns, uint64_t chosen_, const int2* words_)
      : state(state_), width(static_cast<uint32_t>(columns)),
        chosen(static_cast<uint32_t>(chosen_)), words(words_),
        list(reinterpret_cast<const int32_t*>(words_ + (columns + 31) / 32)) {}

  // How many chosen columns are left of a column.
  __device__ uint32_t rank(uint32_t column) const {
    int2 word = __ldg(words + column / 32);
    return word.y + __popc(static_cast<uint32_t>(word.x) & ((1u << (column & 31)) - 1));
  }
  __device__ void begin(uint64_t element, int size, int lane) {
    uint64_t row = element / width;
    uint32_t column = static_cast<uint32_t>(element - row * width);
    first = rank(column);
    base = state + static_cast<int64_t>(row * chosen + first);
    uint32_t stop = column + size, rows = stop / width;
    count = static_cast<int>(rows * chosen + rank(stop - rows * width) - first);
    shift = -static_cast<int32_t>(column);
    next = lane;
  }
  __device__ bool more() const { return next - static_cast<int>(threadIdx.x % 32) < count; }
  __device__ Slot take() {
    Slot slot{-1, base + next};
    if (next < count) {
      uint32_t at = first + next, row = at >= chosen ? 1 : 0;
      if (chosen <= static_cast<uint32_t>(count)) row = at / chosen;  // a tile of several rows
      slot.place = static_cast<int>(row * width) + __ldg(list + (at - row * chosen)) + shift;
    }
    next += 32;
    return slot;
  }
};

// The strata of memopt/optim/selections/coordinates.py: begin(j) = floor((j N + u) / k), but 0 for
// the first and N for the one after the last.
struct StrataSlots {
  int64_t state;
  uint64_t size, count, offset, step, rest;
  uint64_t step32, rest32;  // from a stratum to the one 32 further
  Divider by_count, by_size;
  uint32_t key_low, key_high;
  uint64_t first_element, stop_element;
  uint64_t stratum, raw, remainder;  // the lane's next one; its begin as the formula gives it

  __device__ StrataSlots(int64_t state_, uint64_t n, uint64_t k, uint64_t key, uint64_t u)
      : state(state_), size(n), count(k), offset(u), step(n / k), rest(n % k), by_count(k),
        by_size(n), key_low(static_cast<uint32_t>(key)), key_high(static_cast<uint32_t>(key >> 32)) {
    step32 = 32 * step + by_count.divide(32 * rest, rest32);
  }
  __device__ void begin(uint64_t element, int length, int lane) {
    first_element = element;
    stop_element = element + length;
    uint64_t reach = (element + 1) * count, ignored;
    stratum = (reach > offset ? by_size.divide(reach - offset - 1, ignored) : 0) + lane;
    raw = by_count.divide(stratum * size + offset, remainder);
  }
  __device__ bool more() const {  // the warp's lanes are at 32 neighbouring strata
    bool mine = stratum < count && (stratum == 0 || raw < stop_element);
    return __any_sync(kWarp, mine);
  }
  __device__ Slot take() {
    Slot slot{-1, state + static_cast<int64_t>(stratum)};
    if (stratum < count) {
      uint64_t next = raw + step + (remainder + rest >= count ? 1 : 0);
      uint64_t left = stratum ? raw : 0, right = stratum + 1 == count ? size : next;
      uint64_t chance = random_bits(key_low, key_high, stratum);
      uint64_t pick = left + (chance * (right - left) >> 32);
      if (pick >= first_element && pick < stop_element) {
        slot.place = static_cast<int>(pick - first_element);
      }
    }
    stratum += 32;
    raw += step32;
    remainder += rest32;
    if (remainder >= count) {
      remainder -= count;
      ++raw;
    }
    return slot;
  }
};

// A pack of up to kWidth elements; elements that do not exist are left as they are.
template <typename T>
__device__ __forceinline__ void load_some(const T* from, int count, bool whole,
                                          Pack<T, kWidth<T>>& to) {
  if (whole) {
    to = load_pack(from);
    return;
  }
#pragma unroll
  for (int j = 0; j < kWidth<T>; ++j) {
    if (j < count) to.value[j] = from[j];
  }
}

template <typename T>
__device__ __forceinline__ void store_some(T* to, int count, bool whole,
                                           const Pack<T, kWidth<T>>& from) {
  if (whole) {
    store_pack(to, from);
    return;
  }
#pragma unroll
  for (int j = 0; j < kWidth<T>; ++j) {
    if (j < count) to[j] = from.value[j];
  }
}

// The first pass: update the tile's slots.
template <typename T, int kRounding, typename Slots>
__device__ __forceinline__ void step_slots(const Chunk<T>& c, Exchange<T, kRounding>& tile,
                                           Slots& slots) {
  while (slots.more()) {
    Slot slot[kBatch];
    T m[kBatch], v[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      slot[b] = slots.take();
      m[b] = v[b] = from_float<T>(0.0f);
      if (slot[b].place >= 0) {
        m[b] = c.moment[0][slot[b].state];
        if (c.has_second) v[b] = c.moment[1][slot[b].state];
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      int place = slot[b].place;
      if (place < 0) continue;
      float gradient = to_float(tile.grad[place]);
      if (c.s.maximize) gradient = -gradient;
      float mean = to_float(m[b]), square = to_float(v[b]);
      float update = full_update(gradient, mean, square, c.s);
      int64_t at = slot[b].state;
      uint64_t number = at - c.origin;
      c.moment[0][at] = round_moment<T, kRounding>(mean, 0, c.tag, number, c.s);
      if (c.has_second) c.moment[1][at] = round_moment<T, kRounding>(square, 1, c.tag, number, c.s);
      tile.update[place] = __float_as_uint(update);
    }
  }
}

// All tiles of a chunk. `tile` is the warp's own.
template <typename T, int kRounding, typename Slots>
__device__ void run_tiles(const Chunk<T>& c, bool aligned, Exchange<T, kRounding>& tile,
                          Slots slots) {
  constexpr int kSize = kTile<T, kRounding>, kCount = kPacks<kRounding>;
  using Weights = Pack<T, kWidth<T>>;
  int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int first = threadIdx.x / 32 * kSize; first < c.size; first += warps * kSize) {
    Weights w[kCount], comp[kCount];
    int left = c.size - first, size = left < kSize ? left : kSize;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      int place = (u * 32 + lane) * kWidth<T>, count = size - place;
      bool whole = aligned && count >= kWidth<T>;
      Weights g;
      load_some(c.weight + first + place, count, whole, w[u]);
      load_some(c.grad + first + place, count, whole, g);
      if constexpr (kRounding == MEMOPT_KAHAN) {
        load_some(c.compensation + first + place, count, whole, comp[u]);
      }
      *reinterpret_cast<Weights*>(tile.grad + place) = g;
#pragma unroll
      for (int j = 0; j < kWidth<T>; j += 4) {
        *reinterpret_cast<uint4*>(tile.update + place + j) =
            make_uint4(kNoUpdate, kNoUpdate, kNoUpdate, kNoUpdate);
      }
    }
    __syncwarp();
    slots.begin(c.element + first, size, lane);
    step_slots<T, kRounding>(c, tile, slots);
    __syncwarp();
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      int place = (u * 32 + lane) * kWidth<T>, count = size - place;
      bool whole = aligned && count >= kWidth<T>;
      Weights g = *reinterpret_cast<const Weights*>(tile.grad + place);
      Pack<uint32_t, kWidth<T>> found;
#pragma unroll
      for (int j = 0; j < kWidth<T>; j += 4) {
        reinterpret_cast<uint4*>(&found)[j / 4] =
            *reinterpret_cast<const uint4*>(tile.update + place + j);
      }
      with_free_rule(c.s, [&](auto free_rule) {
#pragma unroll
        for (int j = 0; j < kWidth<T>; ++j) {
          float update = __uint_as_float(found.value[j]);
          if (found.value[j] == kNoUpdate) update = free_rule(to_float(g.value[j]));
          apply_rounded<T, kRounding>(w[u].value[j], comp[u].value[j], update, c.s, c.tag,
                                      c.element + first + place + j);
        }
      });
      store_some(c.weight + first + place, count, whole, w[u]);
      if constexpr (kRounding == MEMOPT_KAHAN) {
        store_some(c.compensation + first + place, count, whole, comp[u]);
      }
    }
    __syncwarp();  // the next tile writes where this one's updates are read
  }
}

}  // namespace memopt
