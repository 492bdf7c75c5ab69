// Registration of memopt's CUDA operators through torch's stable ABI: argument checks, device and
// stream. Built for torch 2.11, it runs on every later one, and loads on a CPU build of torch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "../cuda/launchers.h"

// Defined in libtorch_cuda.so only. Weak, so that the library loads beside a CPU build of torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

#if !defined(MEMOPT_BUILD_INFO)
#define MEMOPT_BUILD_INFO "unknown build"
#endif

extern "C" __attribute__((visibility("default"))) const char* memopt_cuda_build_info() {
  return MEMOPT_BUILD_INFO;
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

cudaStream_t current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "memopt's CUDA operators need a CUDA build of torch");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "no current CUDA stream on device ", device);
  return static_cast<cudaStream_t>(stream);
}

int32_t dtype_code(ScalarType type) {
  if (type == ScalarType::Float) return MEMOPT_FLOAT32;
  if (type == ScalarType::BFloat16) return MEMOPT_BFLOAT16;
  STD_TORCH_CHECK(type == ScalarType::Half, "weights must be float32, bfloat16 or float16");
  return MEMOPT_FLOAT16;
}

void check_flat(const Tensor& tensor, ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous() && tensor.scalar_type() == type, name,
                  " must be a contiguous CUDA tensor of the right dtype");
}

void check_same(const Tensor& weight, const Tensor& other, const char* name) {
  check_flat(other, weight.scalar_type(), name);
  STD_TORCH_CHECK(other.numel() == weight.numel() &&
                      other.get_device_index() == weight.get_device_index(),
                  name, " must have the weight's size and device");
}

// Addresses and bias corrections of all tensors: the part of the launch that changes every step.
std::unique_ptr<memopt_frugal_tensors> gather_tensors(const Tensors& weights, const Tensors& grads,
                                                      const Tensors& compensations,
                                                      const std::vector<double>& step_sizes,
                                                      const std::vector<double>& denom_scales) {
  auto packed = std::make_unique<memopt_frugal_tensors>();
  for (size_t i = 0; i < weights.size(); ++i) {
    check_flat(weights[i], weights[0].scalar_type(), "weights");
    check_same(weights[i], grads[i], "grads");
    packed->weight[i] = weights[i].mutable_data_ptr();
    packed->grad[i] = grads[i].const_data_ptr();
    if (!compensations.empty()) {
      check_same(weights[i], compensations[i], "compensations");
      packed->compensation[i] = compensations[i].mutable_data_ptr();
    }
    packed->step_size[i] = static_cast<float>(step_sizes[i]);
    packed->denom_scale[i] = static_cast<float>(denom_scales[i]);
  }
  return packed;
}

// The arena: [first, second] moments, or [codes, scale, codes, scale]; Lion and sgdm have one moment.
void set_state(const Tensors& state, ScalarType dtype, bool quantized, memopt_frugal_launch& launch) {
  size_t stride = quantized ? 2 : 1;
  STD_TORCH_CHECK(state.size() == stride || state.size() == 2 * stride, "state has ", state.size(),
                  " tensors");
  STD_TORCH_CHECK(launch.full_rule != MEMOPT_ADAMW || state.size() == 2 * stride,
                  "adamw needs two moments");
  for (size_t i = 0; i < state.size() / stride; ++i) {
    check_flat(state[i * stride], quantized ? ScalarType::Byte : dtype, "state");
    launch.moment[i] = state[i * stride].mutable_data_ptr();
    if (quantized) {
      check_flat(state[i * stride + 1], ScalarType::Float, "scales");
      launch.scale[i] = static_cast<float*>(state[i * stride + 1].mutable_data_ptr());
    }
  }
}

void set_tables(const Tensor& segments, const Tensor& chunks, const std::optional<Tensor>& index,
                memopt_frugal_launch& launch) {
  check_flat(segments, ScalarType::Long, "segments");
  check_flat(chunks, ScalarType::Int, "chunks");
  launch.segments = static_cast<const int64_t*>(segments.const_data_ptr());
  launch.chunks = static_cast<const int32_t*>(chunks.const_data_ptr());
  launch.num_chunks = static_cast<int32_t>(chunks.numel());
  if (index.has_value()) {
    check_flat(*index, ScalarType::Int, "index");
    launch.index = static_cast<const int32_t*>(index->const_data_ptr());
  }
}

// numbers = decay, free_step, 1 - beta1, 1 - beta2, eps.
// choices = full rule, free rule, rounding, quantized, maximize, call tag.
void frugal_step(Tensors weights, Tensors grads, Tensors state, Tensors compensations,
                 Tensor segments, Tensor chunks, std::optional<Tensor> index,
                 std::vector<double> step_sizes, std::vector<double> denom_scales,
                 std::vector<double> numbers, std::vector<int64_t> choices,
                 std::optional<Tensor> scalars) {
  size_t count = weights.size();
  if (count == 0) return;
  STD_TORCH_CHECK(count <= MEMOPT_FRUGAL_MAX_TENSORS, "at most ", MEMOPT_FRUGAL_MAX_TENSORS,
                  " tensors a call, got ", count);
  STD_TORCH_CHECK(grads.size() == count && step_sizes.size() == count &&
                      denom_scales.size() == count &&
                      (compensations.empty() || compensations.size() == count),
                  "every weight needs a gradient, a step size and a denominator scale");
  STD_TORCH_CHECK(numbers.size() == 5 && choices.size() == 6, "5 numbers and 6 choices");
  memopt_frugal_launch launch;
  std::memset(&launch, 0, sizeof(launch));
  launch.decay = static_cast<float>(numbers[0]);
  launch.free_step = static_cast<float>(numbers[1]);
  launch.beta1_rest = static_cast<float>(numbers[2]);
  launch.beta2_rest = static_cast<float>(numbers[3]);
  launch.eps = static_cast<float>(numbers[4]);
  launch.full_rule = static_cast<int32_t>(choices[0]);
  launch.free_rule = static_cast<int32_t>(choices[1]);
  int32_t rounding = static_cast<int32_t>(choices[2]);
  launch.maximize = static_cast<int32_t>(choices[4]);
  launch.call_tag = static_cast<uint32_t>(choices[5]);
  bool reduced = weights[0].scalar_type() != ScalarType::Float;
  STD_TORCH_CHECK(rounding != MEMOPT_KAHAN || !reduced || !compensations.empty(),
                  "rounding kahan needs compensations");
  set_state(state, weights[0].scalar_type(), choices[3] != 0, launch);
  set_tables(segments, chunks, index, launch);
  if (scalars.has_value()) {
    check_flat(*scalars, ScalarType::Float, "scalars");
    launch.scalars = static_cast<const float*>(scalars->const_data_ptr());
  }
  auto packed = gather_tensors(weights, grads, compensations, step_sizes, denom_scales);
  int32_t device = weights[0].get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  cudaError_t error = memopt_frugal_step(packed.get(), &launch, dtype_code(weights[0].scalar_type()),
                                         rounding, current_stream(device));
  STD_TORCH_CHECK(error == cudaSuccess, "frugal_step: ", cudaGetErrorString(error));
}

// draws = key, size, count, kind, position in `index`, of every tensor.
void frugal_draw(Tensor index, std::vector<int64_t> draws) {
  constexpr size_t kFields = 5;
  size_t count = draws.size() / kFields;
  STD_TORCH_CHECK(draws.size() == count * kFields && count <= MEMOPT_FRUGAL_MAX_TENSORS,
                  "draws are 5 numbers each, of at most ", MEMOPT_FRUGAL_MAX_TENSORS, " tensors");
  check_flat(index, ScalarType::Int, "index");
  auto packed = std::make_unique<memopt_frugal_draws>();
  for (size_t i = 0; i < count; ++i) {
    const int64_t* d = draws.data() + i * kFields;
    bool columns = d[3] == MEMOPT_SEGMENT_COLUMNS;
    STD_TORCH_CHECK(columns || d[3] == MEMOPT_SEGMENT_ROWS, "columns or rows are drawn");
    STD_TORCH_CHECK(0 < d[2] && d[2] < d[1] && d[1] <= INT32_MAX, "cannot draw ", d[2], " of ", d[1]);
    int64_t words = columns ? 2 * ((d[1] + 31) / 32) + d[2] : d[1];
    STD_TORCH_CHECK(0 <= d[4] && d[4] + words <= index.numel() && (!columns || d[4] % 2 == 0),
                    "draw ", i, " does not fit the index");
    packed->draw[i] = {static_cast<uint64_t>(d[0]), d[4], static_cast<uint32_t>(d[1]),
                       static_cast<uint32_t>(d[2]), static_cast<int32_t>(d[3])};
  }
  int32_t device = index.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  cudaError_t error = memopt_frugal_draw(packed.get(), static_cast<int32_t>(count),
                                         static_cast<int32_t*>(index.mutable_data_ptr()),
                                         current_stream(device));
  STD_TORCH_CHECK(error == cudaSuccess, "frugal_draw: ", cudaGetErrorString(error));
}

// numbers = beta1, beta2, weight_decay, full scale, free scale. choices = full rule, seed.
void frugal_clock(Tensor lr, Tensor steps, Tensor calls, Tensor scalars,
                  std::vector<double> numbers, std::vector<int64_t> choices) {
  check_flat(lr, ScalarType::Float, "lr");
  check_flat(steps, ScalarType::Float, "steps");
  check_flat(calls, ScalarType::Long, "calls");
  check_flat(scalars, ScalarType::Float, "scalars");
  STD_TORCH_CHECK(numbers.size() == 5 && choices.size() == 2, "5 numbers and 2 choices");
  STD_TORCH_CHECK(scalars.numel() >= 4 + 2 * steps.numel(), "scalars is too small");
  memopt_frugal_clock_args args;
  args.lr = static_cast<const float*>(lr.const_data_ptr());
  args.steps = static_cast<float*>(steps.mutable_data_ptr());
  args.calls = static_cast<int64_t*>(calls.mutable_data_ptr());
  args.scalars = static_cast<float*>(scalars.mutable_data_ptr());
  args.num_tensors = static_cast<int32_t>(steps.numel());
  args.beta1 = numbers[0];
  args.beta2 = numbers[1];
  args.weight_decay = numbers[2];
  args.full_scale = numbers[3];
  args.free_scale = numbers[4];
  args.full_rule = static_cast<int32_t>(choices[0]);
  args.seed = static_cast<uint32_t>(choices[1]);
  int32_t device = steps.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  cudaError_t error = memopt_frugal_clock(&args, current_stream(device));
  STD_TORCH_CHECK(error == cudaSuccess, "frugal_clock: ", cudaGetErrorString(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(memopt, m) {
  m.def(
      "frugal_step(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] state, "
      "Tensor(c!)[] compensations, Tensor segments, Tensor chunks, Tensor? index, "
      "float[] step_sizes, float[] denom_scales, float[] numbers, int[] choices, "
      "Tensor? scalars) -> ()");
  m.def("frugal_draw(Tensor(a!) index, int[] draws) -> ()");
  m.def(
      "frugal_clock(Tensor lr, Tensor(a!) steps, Tensor(b!) calls, Tensor(c!) scalars, "
      "float[] numbers, int[] choices) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(memopt, CUDA, m) {
  m.impl("frugal_step", TORCH_BOX(&frugal_step));
  m.impl("frugal_draw", TORCH_BOX(&frugal_draw));
  m.impl("frugal_clock", TORCH_BOX(&frugal_clock));
}
