// What the threads of a CUDA block share: memory, sums and maxima over lanes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../paged_attention.h"

// Dynamic shared memory of the running kernel.
extern __shared__ __align__(16) unsigned char shared_memory[];

namespace hf_tiered_cache {
namespace {

constexpr int kWarpLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float MinusInfinity() { return __uint_as_float(0xff800000u); }
__device__ __forceinline__ float NotANumber() { return __uint_as_float(0x7fffffffu); }

__host__ __device__ __forceinline__ int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ __forceinline__ int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
__host__ __device__ constexpr int64_t DivideUp(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Sum each of kRows values over kLanes neighbouring lanes; lane i of them returns the sum of row
// i / (kLanes / kRows). The sums are trees of one shape, whatever kRows is. Halving the rows with
// the lanes takes kRows - 1 + log2(kLanes / kRows) shuffles instead of kRows * log2(kLanes).
template <int kRows, int kLanes>
__device__ __forceinline__ float SumRows(float (&values)[kRows], int lane) {
  static_assert(kRows <= kLanes && kLanes <= kWarpLanes, "a row needs a lane");
  int rows = kRows;
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    if (rows == 1) {
      values[0] += __shfl_xor_sync(kAllLanes, values[0], offset);
      continue;
    }
    rows /= 2;
    const bool is_upper = (lane & offset) != 0;
#pragma unroll
    for (int row = 0; row < kRows / 2; ++row) {
      if (row >= rows) break;
      const float kept = is_upper ? values[row + rows] : values[row];
      const float given = is_upper ? values[row] : values[row + rows];
      values[row] = kept + __shfl_xor_sync(kAllLanes, given, offset);
    }
  }
  return values[0];
}

// exp(score - max), and 1 where both are the same infinity.
__device__ __forceinline__ float Weight(float score, float max) {
  return score == max ? 1.0f : expf(score - max);
}

}  // namespace
}  // namespace hf_tiered_cache
