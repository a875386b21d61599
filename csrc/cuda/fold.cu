// One CUDA block per row. The largest scores are a prefix maximum, so all factors of a tile of
// partials are made at once; only the multiply-adds go one after the other, in the order of the
// partials: a left fold, whose bits do not depend on how the partials are spread over calls.
#include "block.cuh"
#include "element.cuh"
#include "fold.h"
#include "launch.cuh"

namespace hf_tiered_cache {
namespace {

constexpr int kFoldThreads = 128;
constexpr int kFoldWarps = kFoldThreads / kWarpLanes;
// Dims per thread: 256 at most.
constexpr int kFoldDims = 2;
// Loads of a thread in flight: the fold is bound by how long one takes.
constexpr int kFoldLoads = 16;

// What a tile of partials, one per thread, does to a row.
struct FoldFactors {
  float keep[kFoldThreads];    // of what was there before the partial
  float weight[kFoldThreads];  // of the partial
  float sum[kFoldThreads];     // of the partial, weighted
  float warp_max[kFoldWarps];
};

__device__ __forceinline__ int64_t IndexOf(const RoundRows& rows, int64_t queries, int64_t row) {
  return row / queries * rows.all_queries + rows.first_query + row % queries;
}

// Make the factors of this thread's partial (max, sum); returns the largest score so far. `before`
// is that of the row before the tile. Synchronises before it returns.
__device__ float MakeFactors(FoldFactors& factors, float max, float sum, float before) {
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

// Normalise the row into the output; every thread has its dims of `acc`.
template <DType kType>
__device__ void FinishRow(const FoldParams& p, int64_t row, const float (&acc)[kFoldDims],
                          float max, float sum) {
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
#pragma unroll
  for (int i = 0; i < kFoldDims; ++i) {
    const int64_t dim = threadIdx.x + i * kFoldThreads;
    if (dim < p.value_dim) {
      const float value = sum == 0.0f ? 0.0f : acc[i] * shrink / sum;
      out[dim * p.output.stride[3]] = Narrow<kType>(value);
    }
  }
  if (p.output.lse != nullptr && threadIdx.x == 0) {
    p.output.lse[row / p.queries * p.output_queries + query] =
        sum == 0.0f ? MinusInfinity() : max + logf(sum);
  }
}

template <DType kType>
__global__ void __launch_bounds__(kFoldThreads) FoldKernel(const __grid_constant__ FoldParams p) {
  auto& factors = *reinterpret_cast<FoldFactors*>(shared_memory);
  const int64_t row = blockIdx.x;
  const int64_t num_rows = p.batch * p.heads * p.queries;
  float acc[kFoldDims] = {};
  float max = MinusInfinity();
  float sum = 0.0f;
  if (p.from.rows.acc != nullptr) {
    const int64_t index = IndexOf(p.from, p.queries, row);
    max = p.from.rows.max[index];
    sum = p.from.rows.sum[index];
#pragma unroll
    for (int i = 0; i < kFoldDims; ++i) {
      const int64_t dim = threadIdx.x + i * kFoldThreads;
      if (dim < p.value_dim) acc[i] = p.from.rows.acc[index * p.value_dim + dim];
    }
  }

  for (int64_t first = 0; first < p.num_partials; first += kFoldThreads) {
    const int count = static_cast<int>(Min(kFoldThreads, p.num_partials - first));
    float partial_max = MinusInfinity();
    float partial_sum = 0.0f;
    if (threadIdx.x < count) {
      const int64_t index = (first + threadIdx.x) * num_rows + row;
      partial_max = p.partials.max[index];
      partial_sum = p.partials.sum[index];
    }
    max = MakeFactors(factors, partial_max, partial_sum, max);
    for (int i = 0; i < count; ++i) sum = fmaf(sum, factors.keep[i], factors.sum[i]);

#pragma unroll
    for (int i = 0; i < kFoldDims; ++i) {
      const int64_t dim = threadIdx.x + i * kFoldThreads;
      if (dim >= p.value_dim) continue;
      const float* from = p.partials.acc + (first * num_rows + row) * p.value_dim + dim;
      for (int begin = 0; begin < count; begin += kFoldLoads) {
        float values[kFoldLoads];
#pragma unroll
        for (int j = 0; j < kFoldLoads; ++j) {
          const int partial = begin + j;
          values[j] = partial < count ? from[partial * num_rows * p.value_dim] : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < kFoldLoads; ++j) {
          const int partial = begin + j;
          if (partial < count) {
            acc[i] = fmaf(acc[i], factors.keep[partial], values[j] * factors.weight[partial]);
          }
        }
      }
    }
    __syncthreads();  // the next tile overwrites the factors
  }

  if (p.to.rows.acc != nullptr) {
    const int64_t index = IndexOf(p.to, p.queries, row);
#pragma unroll
    for (int i = 0; i < kFoldDims; ++i) {
      const int64_t dim = threadIdx.x + i * kFoldThreads;
      if (dim < p.value_dim) p.to.rows.acc[index * p.value_dim + dim] = acc[i];
    }
    __syncthreads();  // `from` may be the same memory: everyone has read it
    if (threadIdx.x == 0) {
      p.to.rows.max[index] = max;
      p.to.rows.sum[index] = sum;
    }
  }
  if (p.output.out != nullptr) FinishRow<kType>(p, row, acc, max, sum);
}

}  // namespace

CudaStatus fold_partials(void* stream, const FoldParams& params) {
  const int64_t rows = params.batch * params.heads * params.queries;
  if (rows == 0) return {0, ""};
  return with_dtype(params.dtype, [&](auto type) {
    return status_of(launch(stream, dim3(rows), kFoldThreads, sizeof(FoldFactors),
                            &FoldKernel<type.value>, params));
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
