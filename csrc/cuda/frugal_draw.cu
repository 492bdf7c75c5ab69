// The draw of columns and rows of many tensors in one launch: a switch would otherwise sort every
// tensor's hashes, in a hundred launches that take the host longer than the step takes the device.
//
// One thread block draws the lines of one tensor: of the `size` pairs (hash, line) the `count`
// smallest, as `random_subset` in memopt/ops/counter_rng.py defines it, bit for bit. Nothing is
// sorted and nothing but the result is stored; a hash is fourteen instructions and computed anew
// in each pass:
//
//   1. radix select, eight bits a pass: the hash of the last line that is taken, and how many
//      lines of this very hash are;
//   2. once over the lines in order: who is taken, and how many were taken before it.
#include "frugal_math.cuh"

namespace memopt {

constexpr int kDrawThreads = 1024;  // any multiple of 32 up to this; the kernel asks blockDim
constexpr int kBins = 256, kBinsOfLane = kBins / 32;

struct Lines {
  uint32_t key_low, key_high, size, count;

  __device__ uint32_t hash(uint32_t line) const {
    return random_bits(key_low, key_high, line) >> 1;
  }
};

struct Last {
  uint32_t hash;    // of the last line that is taken
  uint32_t of_it;   // lines of this hash that are taken: the first ones
};

// Exclusive sum of a number over the lanes before.
__device__ __forceinline__ uint32_t sum_before(uint32_t mine, uint32_t lane) {
  uint32_t sum = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    uint32_t other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  return sum - mine;
}

__device__ __forceinline__ uint32_t sum_of_lanes(uint32_t mine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    mine += __shfl_xor_sync(kAllLanes, mine, distance);
  }
  return mine;
}

__device__ Last find_last(const Lines& lines) {
  __shared__ uint32_t bins[kBins];
  __shared__ Last found;
  uint32_t lane = threadIdx.x % 32, prefix = 0, wanted = lines.count;
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (uint32_t bin = threadIdx.x; bin < kBins; bin += blockDim.x) bins[bin] = 0;
    __syncthreads();
    for (uint32_t line = threadIdx.x; line < lines.size; line += blockDim.x) {
      uint32_t digits = lines.hash(line) >> shift;
      if (digits / kBins == prefix) atomicAdd(bins + digits % kBins, 1u);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      uint32_t mine = 0;
      for (int bin = 0; bin < kBinsOfLane; ++bin) mine += bins[lane * kBinsOfLane + bin];
      uint32_t before = sum_before(mine, lane);
      if (before < wanted && wanted <= before + mine) {  // one lane's
        uint32_t bin = lane * kBinsOfLane, left = wanted - before;
        while (left > bins[bin]) left -= bins[bin++];
        found = {prefix * kBins + bin, left};
      }
    }
    __syncthreads();
    prefix = found.hash;
    wanted = found.of_it;
  }
  return {prefix, wanted};
}

// Columns: (mask, rank of its first bit) for every 32, then the numbers of the chosen ones.
// Rows: the slot of every one, -1 without state.
struct IndexWriter {
  bool columns;
  int2* words;
  int32_t* list;
  int32_t* slots;

  __device__ IndexWriter(int32_t* index, const Lines& lines, bool columns_)
      : columns(columns_), words(reinterpret_cast<int2*>(index)),
        list(index + 2 * ((lines.size + 31) / 32)), slots(index) {}

  // All lanes of a warp call this for 32 lines from a multiple of 32 on.
  __device__ void write(const Lines& lines, uint32_t line, bool chosen, uint32_t rank) const {
    uint32_t mask = __ballot_sync(kAllLanes, chosen);
    if (line >= lines.size) return;
    if (!columns) {
      slots[line] = chosen ? static_cast<int32_t>(rank) : -1;
      return;
    }
    if (line % 32 == 0) words[line / 32] = {static_cast<int>(mask), static_cast<int>(rank)};
    if (chosen) list[rank] = static_cast<int32_t>(line);
  }
};

__device__ void write_in_order(const Lines& lines, const Last& last, const IndexWriter& writer) {
  // Lines of each warp, two tiles in turn so that one barrier a tile suffices: in the lower half
  // those below the last hash, in the upper half those of it.
  __shared__ uint32_t counts[2][kDrawThreads / 32];
  uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint32_t earlier = (1u << lane) - 1, below_before = 0, equal_before = 0;
  int turn = 0;
  for (uint32_t first = 0; first < lines.size; first += blockDim.x) {
    uint32_t line = first + threadIdx.x, hash = lines.hash(line);
    bool below = line < lines.size && hash < last.hash;
    bool equal = line < lines.size && hash == last.hash;
    uint32_t below_mask = __ballot_sync(kAllLanes, below);
    uint32_t equal_mask = __ballot_sync(kAllLanes, equal);
    if (lane == 0) counts[turn][warp] = __popc(below_mask) | __popc(equal_mask) << 16;
    __syncthreads();
    uint32_t count = lane < warps ? counts[turn][lane] : 0;
    uint32_t all = sum_of_lanes(count), before = sum_of_lanes(lane < warp ? count : 0);
    uint32_t below_here = below_before + before % 65536 + __popc(below_mask & earlier);
    uint32_t equal_here = equal_before + before / 65536 + __popc(equal_mask & earlier);
    bool chosen = below || (equal && equal_here < last.of_it);
    uint32_t ties = equal_here < last.of_it ? equal_here : last.of_it;
    writer.write(lines, line, chosen, below_here + ties);
    below_before += all % 65536;
    equal_before += all / 65536;
    turn = 1 - turn;
  }
}

__global__ void __launch_bounds__(kDrawThreads)
    frugal_draw_kernel(const __grid_constant__ memopt_frugal_draws draws, int32_t* index) {
  const memopt_frugal_draw_line& draw = draws.draw[blockIdx.x];
  Lines lines{static_cast<uint32_t>(draw.key), static_cast<uint32_t>(draw.key >> 32), draw.size,
              draw.count};
  IndexWriter writer(index + draw.position, lines, draw.kind == MEMOPT_SEGMENT_COLUMNS);
  write_in_order(lines, find_last(lines), writer);
}

}  // namespace memopt

extern "C" cudaError_t memopt_frugal_draw(const memopt_frugal_draws* draws, int32_t num_draws,
                                          int32_t* index, cudaStream_t stream) {
  if (num_draws == 0) return cudaSuccess;
  memopt::frugal_draw_kernel<<<num_draws, memopt::kDrawThreads, 0, stream>>>(*draws, index);
  return cudaGetLastError();
}
