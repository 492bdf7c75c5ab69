/* The C interface of memopt's CUDA kernels: no torch, nothing of CUDA but the runtime's types.
 *
 * [Note: the step's tables]
 * One launch steps up to MEMOPT_FRUGAL_MAX_TENSORS parameters. What changes every step (addresses
 * of weights and gradients, bias corrections) travels as a kernel argument, so nothing is copied
 * to the device; what changes at a switch lies in device memory:
 *   segments  int64 [S][MEMOPT_FRUGAL_FIELDS], runs of elements of one kind, see memopt_frugal_field
 *   chunks    int32 [C], the segment of every chunk of MEMOPT_FRUGAL_CHUNK elements
 *   index     int32, per tensor: for columns, (mask, rank) for every 32 columns, then the numbers of
 *             the chosen ones; for rows, the slot of every row or -1
 */
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#define MEMOPT_FRUGAL_MAX_TENSORS 640
#define MEMOPT_FRUGAL_CHUNK 16384
#define MEMOPT_FRUGAL_FIELDS 12
#define MEMOPT_QUANTIZE_BLOCK 256

#if defined(__cplusplus)
extern "C" {
#endif

enum memopt_dtype { MEMOPT_FLOAT32 = 0, MEMOPT_BFLOAT16 = 1, MEMOPT_FLOAT16 = 2 };
enum memopt_full_rule { MEMOPT_ADAMW = 0, MEMOPT_LION = 1, MEMOPT_SGDM = 2 };
enum memopt_free_rule { MEMOPT_SIGN = 0, MEMOPT_SGD = 1, MEMOPT_NONE = 2 };
enum memopt_rounding { MEMOPT_NEAREST = 0, MEMOPT_STOCHASTIC = 1, MEMOPT_KAHAN = 2 };

enum memopt_segment_kind {
  MEMOPT_SEGMENT_FREE = 0,    /* no state */
  MEMOPT_SEGMENT_FULL = 1,    /* state for every element, in order */
  MEMOPT_SEGMENT_COLUMNS = 2, /* state for some columns */
  MEMOPT_SEGMENT_ROWS = 3,    /* state for some rows */
  MEMOPT_SEGMENT_STRATA = 4   /* state for one element of each stratum */
};

/* The columns of the segment table. A and B depend on the kind:
 * COLUMNS: columns of the matrix, columns with state. ROWS: columns of the matrix, -.
 * STRATA: elements of the tensor, strata; KEY and OFFSET are the draw's. */
enum memopt_frugal_field {
  MEMOPT_FIELD_TENSOR = 0,
  MEMOPT_FIELD_KIND = 1,
  MEMOPT_FIELD_START = 2,       /* first element in the tensor */
  MEMOPT_FIELD_SIZE = 3,        /* elements */
  MEMOPT_FIELD_STATE = 4,       /* arena position of the tensor's (FULL: the segment's) first state */
  MEMOPT_FIELD_FIRST_CHUNK = 5,
  MEMOPT_FIELD_ORIGIN = 6,      /* arena position of the tensor's state: its slot 0 */
  MEMOPT_FIELD_TAG = 7,         /* 32 bits of the parameter's name, for stochastic rounding */
  MEMOPT_FIELD_A = 8,
  MEMOPT_FIELD_B = 9,
  MEMOPT_FIELD_KEY = 10,        /* STRATA: key. COLUMNS, ROWS: position in `index` */
  MEMOPT_FIELD_OFFSET = 11
};

typedef struct {
  void* weight[MEMOPT_FRUGAL_MAX_TENSORS];
  const void* grad[MEMOPT_FRUGAL_MAX_TENSORS];
  void* compensation[MEMOPT_FRUGAL_MAX_TENSORS]; /* kahan only */
  float step_size[MEMOPT_FRUGAL_MAX_TENSORS];    /* lr * scale / (1 - beta1^t) */
  float denom_scale[MEMOPT_FRUGAL_MAX_TENSORS];  /* 1 / sqrt(1 - beta2^t) */
} memopt_frugal_tensors;

typedef struct {
  const int64_t* segments;
  const int32_t* chunks;
  const int32_t* index;
  int32_t num_chunks;
  void* moment[2];   /* in the weights' dtype, or 8-bit codes */
  float* scale[2];   /* one for each block of codes, or NULL */
  float decay;       /* lr * weight_decay */
  float free_step;   /* lr * state_free_lr_scale */
  float beta1_rest;  /* 1 - beta1 */
  float beta2_rest;  /* 1 - beta2 */
  float eps;
  int32_t full_rule;
  int32_t free_rule;
  int32_t maximize;
  uint32_t call_tag;
  const float* scalars; /* capturable: what `memopt_frugal_clock` wrote, else NULL */
} memopt_frugal_launch;

/* Step all tensors. `tensors` is read before the call returns. */
cudaError_t memopt_frugal_step(const memopt_frugal_tensors* tensors,
                               const memopt_frugal_launch* launch, int32_t dtype, int32_t rounding,
                               cudaStream_t stream);

/* Advance `steps` (float32 [num_tensors]) by one and write the step's scalars, all on the device:
 * scalars = decay, free_step, call tag (bits), 0, then (step_size, denom_scale) of every tensor.
 * `calls` (int64 [1]) counts calls for the rounding's random numbers. */
typedef struct {
  const float* lr;
  float* steps;
  int64_t* calls;
  float* scalars;
  int32_t num_tensors;
  double beta1, beta2, weight_decay, full_scale, free_scale;
  uint32_t seed;
  int32_t full_rule;
} memopt_frugal_clock_args;

cudaError_t memopt_frugal_clock(const memopt_frugal_clock_args* args, cudaStream_t stream);

/* The draw of one tensor's lines: of the pairs (hash, line) of `size` lines the `count` smallest,
 * 0 < count < size < 2^31, as memopt/ops/counter_rng.py: random_subset. Written to `index` from
 * `position` on (even, for COLUMNS), as the step's tables have it. */
typedef struct {
  uint64_t key;
  int64_t position;
  uint32_t size, count;
  int32_t kind; /* MEMOPT_SEGMENT_COLUMNS or MEMOPT_SEGMENT_ROWS */
} memopt_frugal_draw_line;

typedef struct {
  memopt_frugal_draw_line draw[MEMOPT_FRUGAL_MAX_TENSORS];
} memopt_frugal_draws;

/* Draw all in one launch. `draws` is read before the call returns. */
cudaError_t memopt_frugal_draw(const memopt_frugal_draws* draws, int32_t num_draws, int32_t* index,
                               cudaStream_t stream);

/* Copies between device and page-locked host memory, in no order among themselves; the arrays are read before the call
 * returns. These two are called by name (memopt/ops/copies.py), so they are visible. */
typedef struct {
  void* const* destinations;
  const void* const* sources;
  const size_t* sizes;
  size_t count;
} memopt_copies;

#define MEMOPT_VISIBLE __attribute__((visibility("default")))

/* Whether `batched` works: runtime (when built) and driver (now) have cudaMemcpyBatchAsync. */
MEMOPT_VISIBLE int memopt_copy_has_batches(void);

/* batched: one call; `stream` must not be the legacy default stream. Else one call a copy, from C. */
MEMOPT_VISIBLE cudaError_t memopt_copy(const memopt_copies* copies, int batched, cudaStream_t stream);

#if defined(__cplusplus)
}
#endif
