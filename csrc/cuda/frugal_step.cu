// The FRUGAL step of many tensors in one launch: every gradient and weight is read once, every
// weight written once, nothing of a tensor's size is allocated.
//
// One thread block steps one chunk of a segment. A thread handles 16 bytes of neighbouring elements
// at a time, several such packs in flight, since nothing here but memory matters.
// Elements at the ends of a segment, and tensors whose addresses or row lengths do not allow it, go
// one by one through the same arithmetic. Columns and strata are in frugal_tiles.cuh, 8-bit moments
// in frugal_quantized.cuh. See launchers.h for the tables.
#include "frugal_math.cuh"
#include "frugal_quantized.cuh"
#include "frugal_tiles.cuh"

namespace memopt {

// What a launch's segments may be; apart, because the index arithmetic of the second costs
// registers that the first, the common case, turns into threads in flight.
enum Layout { kRuns, kIndexed, kQuantized };

template <Layout kLayout>
constexpr int kThreads = kLayout == kIndexed ? MEMOPT_TILE_THREADS : 256;

// Blocks on a processor, which bounds their registers.
template <Layout kLayout, int kRounding>
constexpr int kBlocks = kLayout == kIndexed ? (kRounding == MEMOPT_NEAREST ? MEMOPT_TILE_BLOCKS
                                                                           : 768 / MEMOPT_TILE_THREADS)
                                            : (kRounding == MEMOPT_NEAREST && kLayout == kRuns ? 4 : 3);

// What one thread block works on: the tensor from the chunk's first element on.
template <typename T>
struct Chunk {
  T* weight;
  const T* grad;
  T* compensation;
  T* moment[2];      // arena, not yet advanced
  uint64_t element;  // index in the tensor of the chunk's first element
  int64_t origin;    // arena position of the tensor's slot 0
  int size;
  uint32_t tag;
  bool has_second;
  Scalars s;
};

template <typename T, int kRounding>
__device__ __forceinline__ void step_one(const Chunk<T>& c, int i, int64_t state) {
  float g = to_float(c.grad[i]);
  if (c.s.maximize) g = -g;
  float update;
  if (state >= 0) {
    float m = to_float(c.moment[0][state]);
    float v = c.has_second ? to_float(c.moment[1][state]) : 0.0f;
    update = full_update(g, m, v, c.s);
    uint64_t slot = state - c.origin;
    c.moment[0][state] = round_moment<T, kRounding>(m, 0, c.tag, slot, c.s);
    if (c.has_second) c.moment[1][state] = round_moment<T, kRounding>(v, 1, c.tag, slot, c.s);
  } else {
    update = free_update(g, c.s);
  }
  T w = c.weight[i];
  T compensation = kRounding == MEMOPT_KAHAN ? c.compensation[i] : from_float<T>(0.0f);
  apply_rounded<T, kRounding>(w, compensation, update, c.s, c.tag, c.element + i);
  c.weight[i] = w;
  if (kRounding == MEMOPT_KAHAN) c.compensation[i] = compensation;
}

// What is in flight of one pack; moments and compensation only where there are any.
template <typename T>
struct Flight {
  Pack<T, kWidth<T>> w, g, comp, m, v;
};

// Load everything of a pack at i that the first step of its update needs.
template <typename T, int kRounding>
__device__ __forceinline__ void load_weights(const Chunk<T>& c, int i, Flight<T>& f) {
  f.w = load_pack(c.weight + i);
  f.g = load_pack(c.grad + i);
  if constexpr (kRounding == MEMOPT_KAHAN) f.comp = load_pack(c.compensation + i);
}

template <typename T>
__device__ __forceinline__ void load_moments(const Chunk<T>& c, int64_t state, Flight<T>& f) {
  f.m = load_pack(c.moment[0] + state);
  if (c.has_second) f.v = load_pack(c.moment[1] + state);
}

// Update and store a pack at i that has state everywhere (at `state`, ...) or nowhere.
template <typename T, int kRounding, bool kFull>
__device__ __forceinline__ void finish_pack(const Chunk<T>& c, int i, int64_t state, Flight<T>& f) {
  if constexpr (kFull) {
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j) {
      float gradient = to_float(f.g.value[j]);
      if (c.s.maximize) gradient = -gradient;
      float mean = to_float(f.m.value[j]);
      float square = c.has_second ? to_float(f.v.value[j]) : 0.0f;
      float update = full_update(gradient, mean, square, c.s);
      uint64_t slot = state + j - c.origin;
      f.m.value[j] = round_moment<T, kRounding>(mean, 0, c.tag, slot, c.s);
      f.v.value[j] = round_moment<T, kRounding>(square, 1, c.tag, slot, c.s);
      apply_rounded<T, kRounding>(f.w.value[j], f.comp.value[j], update, c.s, c.tag,
                                  c.element + i + j);
    }
  } else {
    with_free_rule(c.s, [&](auto free_rule) {
#pragma unroll
      for (int j = 0; j < kWidth<T>; ++j) {
        float update = free_rule(to_float(f.g.value[j]));
        apply_rounded<T, kRounding>(f.w.value[j], f.comp.value[j], update, c.s, c.tag,
                                    c.element + i + j);
      }
    });
  }
  store_pack(c.weight + i, f.w);
  if constexpr (kRounding == MEMOPT_KAHAN) store_pack(c.compensation + i, f.comp);
  if constexpr (kFull) {
    store_pack(c.moment[0] + state, f.m);
    if (c.has_second) store_pack(c.moment[1] + state, f.v);
  }
}

// kUnroll packs of elements, all with state (at `state` + distance from i) or all without.
template <typename T, int kRounding, bool kFull, int kStride, int kUnroll>
__device__ __forceinline__ void step_run(const Chunk<T>& c, int first, int stop, int64_t state) {
  Flight<T> flight[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    int i = first + u * kStride;
    if (i < stop) {
      load_weights<T, kRounding>(c, i, flight[u]);
      if constexpr (kFull) load_moments(c, state + i, flight[u]);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    int i = first + u * kStride;
    if (i < stop) finish_pack<T, kRounding, kFull>(c, i, state + i, flight[u]);
  }
}

// Elements of one kind in a row; `state` is the arena position of the chunk's first element.
template <typename T, int kRounding, bool kFull, int kThreads>
__device__ void run_uniform(const Chunk<T>& c, bool aligned, int64_t state) {
  constexpr int kStride = kThreads * kWidth<T>;
  constexpr int kUnroll = kFull ? 2 : 4;  // as many bytes in flight with and without moments
  if (kFull) {
    aligned = aligned && aligned16(c.moment[0] + state) &&
              (!c.has_second || aligned16(c.moment[1] + state));
  }
  int stop = aligned ? c.size / kWidth<T> * kWidth<T> : 0;
  for (int first = threadIdx.x * kWidth<T>; first < stop; first += kStride * kUnroll) {
    step_run<T, kRounding, kFull, kStride, kUnroll>(c, first, stop, state);
  }
  for (int i = stop + threadIdx.x; i < c.size; i += kThreads) {
    step_one<T, kRounding>(c, i, kFull ? state + i : -1);
  }
}

// What a row's state is to an element: its arena position, -1 without state.
struct RowSlots {
  int64_t state;
  uint64_t first_row;
  uint32_t first_column, width;
  const int32_t* slots;

  __device__ int64_t at(int i) const {
    uint32_t offset = first_column + i, row = offset / width, column = offset - row * width;
    int32_t slot = __ldg(slots + first_row + row);
    return slot < 0 ? -1 : state + static_cast<int64_t>(slot) * width + column;
  }
};

// A pack's weights, and its moments where it has any.
template <typename T, int kRounding>
__device__ __forceinline__ int64_t load_row(const Chunk<T>& c, int i, const RowSlots& rows,
                                            Flight<T>& f) {
  int64_t at = rows.at(i);
  load_weights<T, kRounding>(c, i, f);
  if (at >= 0) load_moments(c, at, f);
  return at;
}

template <typename T, int kRounding, int kThreads>
__device__ void run_rows(const Chunk<T>& c, bool aligned, const RowSlots& rows) {
  constexpr int kStride = kThreads * kWidth<T>;
  bool vectors = aligned && rows.width % kWidth<T> == 0 && aligned16(c.moment[0] + rows.state) &&
                 (!c.has_second || aligned16(c.moment[1] + rows.state));
  int stop = vectors ? c.size / kWidth<T> * kWidth<T> : 0;
  Flight<T> now, next;
  int i = threadIdx.x * kWidth<T>;
  int64_t at = i < stop ? load_row<T, kRounding>(c, i, rows, now) : -1, after = -1;
  for (; i < stop; i += kStride) {  // the next pack is on its way while this one is updated
    if (i + kStride < stop) after = load_row<T, kRounding>(c, i + kStride, rows, next);
    if (at < 0) {
      finish_pack<T, kRounding, false>(c, i, 0, now);
    } else {
      finish_pack<T, kRounding, true>(c, i, at, now);
    }
    now = next;
    at = after;
  }
  for (i = stop + threadIdx.x; i < c.size; i += kThreads) {
    step_one<T, kRounding>(c, i, rows.at(i));
  }
}

__device__ __forceinline__ Scalars scalars_of(const memopt_frugal_tensors& tensors,
                                              const memopt_frugal_launch& launch, int tensor) {
  Scalars s;
  s.beta1_rest = launch.beta1_rest;
  s.beta2_rest = launch.beta2_rest;
  s.eps = launch.eps;
  s.full_rule = launch.full_rule;
  s.free_rule = launch.free_rule;
  s.maximize = launch.maximize;
  if (launch.scalars != nullptr) {
    s.decay = __ldg(launch.scalars);
    s.free_step = __ldg(launch.scalars + 1);
    s.call_tag = __float_as_uint(__ldg(launch.scalars + 2));
    s.step_size = __ldg(launch.scalars + 4 + 2 * tensor);
    s.denom_scale = __ldg(launch.scalars + 5 + 2 * tensor);
  } else {
    s.decay = launch.decay;
    s.free_step = launch.free_step;
    s.call_tag = launch.call_tag;
    s.step_size = tensors.step_size[tensor];
    s.denom_scale = tensors.denom_scale[tensor];
  }
  return s;
}

template <typename T, int kRounding, Layout kLayout>
__global__ void __launch_bounds__(kThreads<kLayout>, kBlocks<kLayout, kRounding>)
    frugal_step_kernel(const __grid_constant__ memopt_frugal_tensors tensors,
                       const __grid_constant__ memopt_frugal_launch launch) {
  int chunk = blockIdx.x;
  const int64_t* f = launch.segments +
                     static_cast<int64_t>(__ldg(launch.chunks + chunk)) * MEMOPT_FRUGAL_FIELDS;
  int tensor = static_cast<int>(__ldg(f + MEMOPT_FIELD_TENSOR));
  int kind = static_cast<int>(__ldg(f + MEMOPT_FIELD_KIND));
  int64_t distance = (chunk - __ldg(f + MEMOPT_FIELD_FIRST_CHUNK)) * MEMOPT_FRUGAL_CHUNK;
  int64_t size = __ldg(f + MEMOPT_FIELD_SIZE) - distance;
  int64_t state = __ldg(f + MEMOPT_FIELD_STATE);

  Chunk<T> c;
  c.element = __ldg(f + MEMOPT_FIELD_START) + distance;
  c.weight = static_cast<T*>(tensors.weight[tensor]) + c.element;
  c.grad = static_cast<const T*>(tensors.grad[tensor]) + c.element;
  c.compensation = nullptr;
  bool aligned = aligned16(c.weight) && aligned16(c.grad);
  if constexpr (kRounding == MEMOPT_KAHAN) {
    c.compensation = static_cast<T*>(tensors.compensation[tensor]) + c.element;
    aligned = aligned && aligned16(c.compensation);
  }
  c.moment[0] = static_cast<T*>(launch.moment[0]);
  c.moment[1] = static_cast<T*>(launch.moment[1]);
  c.origin = __ldg(f + MEMOPT_FIELD_ORIGIN);
  c.size = static_cast<int>(size < MEMOPT_FRUGAL_CHUNK ? size : MEMOPT_FRUGAL_CHUNK);
  c.tag = static_cast<uint32_t>(__ldg(f + MEMOPT_FIELD_TAG));
  c.has_second = launch.full_rule == MEMOPT_ADAMW;
  c.s = scalars_of(tensors, launch, tensor);

  if (kind == MEMOPT_SEGMENT_FREE) {
    run_uniform<T, kRounding, false, kThreads<kLayout>>(c, aligned, 0);
    return;
  }
  if constexpr (kLayout == kRuns) {
    run_uniform<T, kRounding, true, kThreads<kLayout>>(c, aligned, state + distance);
    return;
  }
  uint64_t a = __ldg(f + MEMOPT_FIELD_A), b = __ldg(f + MEMOPT_FIELD_B);
  uint64_t key = __ldg(f + MEMOPT_FIELD_KEY);
  if constexpr (kLayout == kQuantized) {
    const int32_t* slots = kind == MEMOPT_SEGMENT_ROWS ? launch.index + key : nullptr;
    run_quantized<T, kRounding>(c, launch, aligned, state + (slots ? 0 : distance), a, slots);
  }
  if constexpr (kLayout == kIndexed) {
    __shared__ Exchange<T, kRounding> tiles[kThreads<kLayout> / 32];
    if (kind == MEMOPT_SEGMENT_FULL) {
      run_uniform<T, kRounding, true, kThreads<kLayout>>(c, aligned, state + distance);
    } else if (kind == MEMOPT_SEGMENT_COLUMNS) {
      const int2* words = reinterpret_cast<const int2*>(launch.index + key);
      ColumnSlots columns(state, a, b, words, c.element);
      run_tiles<T, kRounding>(c, aligned, tiles[threadIdx.x / 32], columns);
    } else if (kind == MEMOPT_SEGMENT_ROWS) {
      uint64_t row = c.element / a;
      uint32_t column = static_cast<uint32_t>(c.element - row * a);
      RowSlots rows{state, row, column, static_cast<uint32_t>(a), launch.index + key};
      run_rows<T, kRounding, kThreads<kLayout>>(c, aligned, rows);
    } else {
      StrataSlots strata(state, a, b, key, __ldg(f + MEMOPT_FIELD_OFFSET), c.element);
      run_tiles<T, kRounding>(c, aligned, tiles[threadIdx.x / 32], strata);
    }
  }
}

template <typename T, int kRounding, Layout kLayout>
cudaError_t launch_layout(const memopt_frugal_tensors& tensors,
                          const memopt_frugal_launch& launch, cudaStream_t stream) {
  frugal_step_kernel<T, kRounding, kLayout>
      <<<launch.num_chunks, kThreads<kLayout>, 0, stream>>>(tensors, launch);
  return cudaGetLastError();
}

template <typename T, int kRounding>
cudaError_t launch_rounded(const memopt_frugal_tensors& tensors, const memopt_frugal_launch& launch,
                           cudaStream_t stream) {
  if (launch.scale[0] != nullptr) {
    return launch_layout<T, kRounding, kQuantized>(tensors, launch, stream);
  }
  if (launch.index != nullptr) {
    return launch_layout<T, kRounding, kIndexed>(tensors, launch, stream);
  }
  return launch_layout<T, kRounding, kRuns>(tensors, launch, stream);
}

}  // namespace memopt

// Roundings that a dtype does not have are not compiled: only codes are rounded stochastically
// beside float32 weights, and float16 has no stochastic rounding.
extern "C" cudaError_t memopt_frugal_step(const memopt_frugal_tensors* tensors,
                                          const memopt_frugal_launch* launch, int32_t dtype,
                                          int32_t rounding, cudaStream_t stream) {
  using namespace memopt;
  if (launch->num_chunks == 0) return cudaSuccess;
  bool stochastic = rounding == MEMOPT_STOCHASTIC, kahan = rounding == MEMOPT_KAHAN;
  if (dtype == MEMOPT_FLOAT32) {
    if (stochastic) return launch_rounded<float, MEMOPT_STOCHASTIC>(*tensors, *launch, stream);
    return launch_rounded<float, MEMOPT_NEAREST>(*tensors, *launch, stream);
  }
  if (dtype == MEMOPT_BFLOAT16) {
    using T = __nv_bfloat16;
    if (stochastic) return launch_rounded<T, MEMOPT_STOCHASTIC>(*tensors, *launch, stream);
    if (kahan) return launch_rounded<T, MEMOPT_KAHAN>(*tensors, *launch, stream);
    return launch_rounded<T, MEMOPT_NEAREST>(*tensors, *launch, stream);
  }
  if (dtype != MEMOPT_FLOAT16 || stochastic) return cudaErrorInvalidValue;
  if (kahan) return launch_rounded<__half, MEMOPT_KAHAN>(*tensors, *launch, stream);
  return launch_rounded<__half, MEMOPT_NEAREST>(*tensors, *launch, stream);
}
