// Many copies with one call: cudaMemcpyBatchAsync where runtime and driver have it (CUDA 12.8), which brings small pieces
// to the link's speed; else a loop of cudaMemcpyAsync, which at least is not in Python. No torch.
//
// The call's shape changed in CUDA 13.0: failIdx went away. The library is linked to one runtime, so the header it was
// built with decides; the driver below may be older, so that is asked for.
#include "launchers.h"

#define MEMOPT_BATCH_VERSION 12080

namespace {

cudaError_t copy_loop(const memopt_copies* copies, cudaStream_t stream) {
  for (size_t i = 0; i < copies->count; ++i) {
    cudaError_t error = cudaMemcpyAsync(copies->destinations[i], copies->sources[i], copies->sizes[i],
                                        cudaMemcpyDefault, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

#if CUDART_VERSION >= MEMOPT_BATCH_VERSION
cudaError_t copy_batched(const memopt_copies* copies, cudaStream_t stream) {
  cudaMemcpyAttributes attributes = {};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
  size_t first = 0;
#if CUDART_VERSION >= 13000
  return cudaMemcpyBatchAsync(copies->destinations, copies->sources, copies->sizes, copies->count,
                              &attributes, &first, 1, stream);
#else
  size_t failed = 0;
  return cudaMemcpyBatchAsync(const_cast<void**>(copies->destinations),
                              const_cast<void**>(reinterpret_cast<void* const*>(copies->sources)),
                              const_cast<size_t*>(copies->sizes), copies->count, &attributes, &first, 1,
                              &failed, stream);
#endif
}
#endif

}  // namespace

int memopt_copy_has_batches() {
#if CUDART_VERSION >= MEMOPT_BATCH_VERSION
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return driver >= MEMOPT_BATCH_VERSION;
#else
  return 0;
#endif
}

cudaError_t memopt_copy(const memopt_copies* copies, int batched, cudaStream_t stream) {
  if (copies->count == 0) return cudaSuccess;
  cudaError_t error;
#if CUDART_VERSION >= MEMOPT_BATCH_VERSION
  error = batched ? copy_batched(copies, stream) : copy_loop(copies, stream);
#else
  error = batched ? cudaErrorNotSupported : copy_loop(copies, stream);
#endif
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}
