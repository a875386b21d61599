// One CUDA block per row, or per slice of its dims. The largest scores are a prefix maximum, so all factors of a tile of
// partials are made at once; only the multiply-adds go one after the other, in the order of the
// partials: a left fold, whose bits do not depend on how the partials are spread over calls.
#include "block.cuh"
#include "element.cuh"
#include "fold.h"
#include "launch.cuh"

namespace hf_tiered_cache {
namespace {

constexpr int kFoldThreads = 256;
constexpr int kFoldWarps = kFoldThreads / kWarpLanes;
// Dims of a slice: small, so that a few rows of attention fill the device.
constexpr int kSliceDims = 32;
// Loads of a thread in flight, and so the size of a tile: the fold is bound by how long one takes.
constexpr int kFoldLoads = 32;

// What a tile of partials does to a row: one partial per thread, or fewer.
template <int kDims>
struct FoldMemory {
  static constexpr int kPartials = kFoldThreads * kFoldLoads / kDims;
  static_assert(kPartials <= kFoldThreads, "one thread makes the factors of a partial");
  float values[kPartials][kDims];  // weighted
  float keep[kFoldThreads];        // of what was there before the partial
  float weight[kFoldThreads];      // of the partial
  float sum[kFoldThreads];         // of the partial, weighted
  float warp_max[kFoldWarps];
};

__device__ __forceinline__ int64_t IndexOf(const RoundRows& rows, int64_t queries, int64_t row) {
  return row / queries * rows.all_queries + rows.first_query + row % queries;
}

// Make the factors of this thread's partial (max, sum); returns the largest score so far. `before`
// is that of the row before the tile. Synchronises before it returns.
template <int kDims>
__device__ float MakeFactors(FoldMemory<kDims>& factors, float max, float sum, float before) {
  const int lane = threadIdx.x % kWarpLanes;
  const int warp = threadIdx.x / kWarpLanes;
  float most = max;
#pragma unroll
  for (int offset = 1; offset < kWarpLanes; offset *= 2) {
    const float other = __shfl_up_sync(kAllLanes, most, offset);
    if (lane >= offset) most = fmaxf(most, other);
  }
  const float left = __shfl_up_sync(kAllLanes, most, 1);
  if (lane == kWarpLanes - 1) factors.warp_max[warp] = most;
  __syncthreads();
  float earlier = before;
  for (int i = 0; i < warp; ++i) earlier = fmaxf(earlier, factors.warp_max[i]);
  const float old_max = lane == 0 ? earlier : fmaxf(earlier, left);
  const float new_max = fmaxf(earlier, most);
  factors.keep[threadIdx.x] = Weight(old_max, new_max);
  factors.weight[threadIdx.x] = Weight(max, new_max);
  factors.sum[threadIdx.x] = sum * Weight(max, new_max);
  for (int i = 0; i < kFoldWarps; ++i) before = fmaxf(before, factors.warp_max[i]);
  __syncthreads();
  return before;
}

// Normalise dim `dim` of the row into the output.
template <DType kType>
__device__ void FinishDim(const FoldParams& p, int64_t row, int dim, float acc, float max,
                          float sum) {
  const int64_t query = p.output_first_query + row % p.queries;
  const int64_t head = row / p.queries % p.heads;
  const int64_t sequence = row / p.queries / p.heads;
  float shrink = 1.0f;
  if (p.output.sinks != nullptr) {
    // A sink is one more score with value 0: it only enlarges the sum.
    const float sink = p.output.sinks[head];
    const float new_max = fmaxf(max, sink);
    shrink = Weight(max, new_max);
    sum = fmaf(sum, shrink, Weight(sink, new_max));
    max = new_max;
  }
  auto* out = static_cast<Element<kType>*>(p.output.out) + sequence * p.output.stride[0] +
              head * p.output.stride[1] + query * p.output.stride[2];
  const float value = sum == 0.0f ? 0.0f : acc * shrink / sum;
  out[dim * p.output.stride[3]] = Narrow<kType>(value);
  if (p.output.lse != nullptr && dim == 0) {
    p.output.lse[row / p.queries * p.output_queries + query] =
        sum == 0.0f ? MinusInfinity() : max + logf(sum);
  }
}

// A thread's part of a tile of partials, on its way.
template <int kDims>
struct FoldLoads {
  float values[kFoldLoads];
  float max;
  float sum;

  // The tile that begins with partial `first`, of dims from `slice` on; nothing behind the last.
  __device__ __forceinline__ void Load(const FoldParams& p, int64_t row, int64_t first, int slice) {
    const int64_t num_rows = p.batch * p.heads * p.queries;
    const int64_t left = p.num_partials - first;
    max = MinusInfinity();
    sum = 0.0f;
    if (threadIdx.x < Min(left, FoldMemory<kDims>::kPartials)) {
      max = p.partials.max[(first + threadIdx.x) * num_rows + row];
      sum = p.partials.sum[(first + threadIdx.x) * num_rows + row];
    }
    constexpr int kTogether = kFoldThreads / kDims;  // partials of one load of all threads
    const int dim = slice + threadIdx.x % kDims;
    const int begin = threadIdx.x / kDims;
    const int count = dim < p.value_dim ? static_cast<int>(Min(left, kFoldThreads)) : 0;
    const int64_t step = num_rows * p.value_dim;
    const float* from = p.partials.acc + (first + begin) * step + row * p.value_dim + dim;
#pragma unroll
    for (int i = 0; i < kFoldLoads; ++i) {
      values[i] = begin + i * kTogether < count ? from[i * kTogether * step] : 0.0f;
    }
  }

  __device__ __forceinline__ void Store(FoldMemory<kDims>& memory) const {
    constexpr int kTogether = kFoldThreads / kDims;
#pragma unroll
    for (int i = 0; i < kFoldLoads; ++i) {
      const int partial = threadIdx.x / kDims + i * kTogether;
      memory.values[partial][threadIdx.x % kDims] = values[i] * memory.weight[partial];
    }
  }
};

template <DType kType, int kDims>
__global__ void __launch_bounds__(kFoldThreads) FoldKernel(const __grid_constant__ FoldParams p) {
  auto& memory = *reinterpret_cast<FoldMemory<kDims>*>(shared_memory);
  constexpr int kPartials = FoldMemory<kDims>::kPartials;
  const int64_t row = blockIdx.x;
  const int slice = blockIdx.y * kDims;
  const int dim = slice + threadIdx.x;
  const bool has_dim = threadIdx.x < kDims && dim < p.value_dim;
  float acc = 0.0f;
  float max = MinusInfinity();
  float sum = 0.0f;
  FoldLoads<kDims> loads;
  loads.Load(p, row, 0, slice);
  if (p.from.rows.acc != nullptr) {
    const int64_t index = IndexOf(p.from, p.queries, row);
    max = p.from.rows.max[index];
    sum = p.from.rows.sum[index];
    if (has_dim) acc = p.from.rows.acc[index * p.value_dim + dim];
  }

  for (int64_t first = 0; first < p.num_partials; first += kPartials) {
    max = MakeFactors(memory, loads.max, loads.sum, max);
    loads.Store(memory);
    __syncthreads();
    loads.Load(p, row, first + kPartials, slice);
    if (threadIdx.x < kDims) {
      const int count = static_cast<int>(Min(kPartials, p.num_partials - first));
#pragma unroll 8
      for (int i = 0; i < count; ++i) {
        acc = fmaf(acc, memory.keep[i], memory.values[i][threadIdx.x]);
        sum = fmaf(sum, memory.keep[i], memory.sum[i]);
      }
    }
    __syncthreads();  // the next tile overwrites the factors
  }

  if (p.to.rows.acc != nullptr) {
    const int64_t index = IndexOf(p.to, p.queries, row);
    if (has_dim) p.to.rows.acc[index * p.value_dim + dim] = acc;
    __syncthreads();  // `from` may be the same memory: everyone has read it
    if (dim == 0) {
      p.to.rows.max[index] = max;
      p.to.rows.sum[index] = sum;
    }
  }
  if (p.output.out != nullptr && has_dim) FinishDim<kType>(p, row, dim, acc, max, sum);
}

template <DType kType, int kDims>
cudaError_t launch_fold(void* stream, const FoldParams& params, int64_t rows) {
  const dim3 grid(rows, DivideUp(params.value_dim, kDims));
  return launch(stream, grid, kFoldThreads, sizeof(FoldMemory<kDims>), &FoldKernel<kType, kDims>,
                params);
}

}  // namespace

CudaStatus fold_partials(void* stream, const FoldParams& params) {
  const int64_t rows = params.batch * params.heads * params.queries;
  if (rows == 0) return {0, ""};
  // Slices of a row read the same largest score and sum: none may overwrite them.
  const bool is_in_place = params.from.rows.acc != nullptr && params.to.rows.acc != nullptr;
  return with_dtype(params.dtype, [&](auto type) {
    if (!is_in_place) return status_of(launch_fold<type.value, kSliceDims>(stream, params, rows));
    if (params.value_dim <= 4 * kSliceDims) {
      return status_of(launch_fold<type.value, 4 * kSliceDims>(stream, params, rows));
    }
    return status_of(launch_fold<type.value, 8 * kSliceDims>(stream, params, rows));
  });
}

CudaStatus htc_cuda_finish(CudaPlace place, const FinishParams* params) {
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  FoldParams fold = {};
  fold.dtype = params->dtype;
  fold.batch = params->batch;
  fold.heads = params->heads;
  fold.queries = params->queries;
  fold.value_dim = params->value_dim;
  fold.from = {params->state, params->queries, 0};
  fold.output = params->output;
  fold.output_queries = params->queries;
  return fold_partials(place.stream, fold);
}

CudaStatus htc_cuda_join(CudaPlace place, const JoinParams* params) {
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  FoldParams fold = {};
  fold.batch = 1;
  fold.heads = 1;
  fold.queries = params->rows;
  fold.value_dim = params->value_dim;
  fold.num_partials = 1;
  fold.partials = params->other;
  fold.from = {params->state, params->rows, 0};
  fold.to = fold.from;
  return fold_partials(place.stream, fold);
}

}  // namespace hf_tiered_cache
