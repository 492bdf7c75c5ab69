// The step's scalars on the device, for CUDA graphs: a replayed step advances its own counters and
// reads a learning rate that the host may change between replays.
#include "frugal_math.cuh"

namespace memopt {

__global__ void frugal_clock_kernel(memopt_frugal_clock_args a) {
  float lr = *a.lr;
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    a.scalars[0] = static_cast<float>(lr * a.weight_decay);
    a.scalars[1] = static_cast<float>(lr * a.free_scale);
    uint32_t call = static_cast<uint32_t>(*a.calls);
    a.scalars[2] = __uint_as_float(mix32(a.seed ^ call));
    *a.calls += 1;
  }
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < a.num_tensors;
       i += gridDim.x * blockDim.x) {
    float step = a.steps[i] + 1.0f;
    a.steps[i] = step;
    double size = lr * a.full_scale, denom = 1.0;
    if (a.full_rule == MEMOPT_ADAMW) {
      size /= 1.0 - pow(a.beta1, static_cast<double>(step));
      denom = rsqrt(1.0 - pow(a.beta2, static_cast<double>(step)));
    }
    a.scalars[4 + 2 * i] = static_cast<float>(size);
    a.scalars[5 + 2 * i] = static_cast<float>(denom);
  }
}

}  // namespace memopt

extern "C" cudaError_t memopt_frugal_clock(const memopt_frugal_clock_args* args,
                                           cudaStream_t stream) {
  int blocks = (args->num_tensors + 255) / 256;
  memopt::frugal_clock_kernel<<<blocks > 0 ? blocks : 1, 256, 0, stream>>>(*args);
  return cudaGetLastError();
}
