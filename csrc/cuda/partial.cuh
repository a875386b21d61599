// The partial of one unit for a tile of rows: the first step of the online softmax (Milakov &
// Gimelshein 2018, arXiv 1805.02867), in float32.
//
// A thread holds kPack dims: kLanes neighbouring lanes make up a token, and each keys' and values'
// byte goes from memory straight into the registers of the one thread that needs it, once for all
// rows of the tile (the heads of a group). Scores and weights pass through shared memory.
#pragma once

#include "block.cuh"
#include "element.cuh"
#include "geometry.cuh"

namespace hf_tiered_cache {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpLanes;

// CUDA blocks that shall fit a multiprocessor, which bounds the registers: 3, for more loads in
// flight, where it costs no spills (nvcc 13.0; tests/cuda/test_registers.py sees to it).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
template <int kRows, int kLanes>
constexpr int kResident = kRows == 4 && kLanes == 16 ? 3 : 2;
#else
template <int kRows, int kLanes>
constexpr int kResident = 2;
#endif

// Loads of 16 bytes that a thread has in flight.
constexpr int kLoads = 4;
template <DType kType>
constexpr int kTokensAtOnce = kLoads * sizeof(uint4) / sizeof(Pack<kType>);

template <int kRows, int kLanes>
struct PartialMemory {
  struct Scoring {
    float query[kRows][kLanes * kPack];
    float scores[kUnitTokens][kRows];  // then weights
    float warp_values[kWarps][kRows];
    bool is_used[kUnitTokens];  // by some row of the tile
  };
  union {
    Scoring scoring;
    float sums[kWarps / 2][kRows][kLanes * kPack];  // of values, of half of the warps
  };
};

// pass 1: queries as floats in shared memory, 0 in rows and dims that there are not
template <DType kType, int kRows, int kLanes>
__device__ __forceinline__ void LoadQueries(const AttentionParams& p, const Round& round,
                                            const Tile& tile,
                                            PartialMemory<kRows, kLanes>& memory) {
  constexpr int kDims = kLanes * kPack;
  for (int i = threadIdx.x; i < kRows * kDims; i += kThreads) {
    const int dim = i % kDims;
    float value = 0.0f;
    if (i / kDims < tile.rows && dim < p.view.key_dim) {
      const Row row = RowOf(round, tile, i / kDims);
      const auto* query = static_cast<const Element<kType>*>(p.query) +
                          tile.sequence * p.query_stride[0] + row.head * p.query_stride[1] +
                          row.query * p.query_stride[2];
      value = Widen<kType>(query[dim]);
    }
    memory.scoring.query[i / kDims][dim] = value;
  }
}

// pass 2: products of queries and keys
template <DType kType, int kRows, int kLanes, bool kAligned>
__device__ __forceinline__ void MakeProducts(const AttentionParams& p, const Tile& tile,
                                             const Element<kType>* keys,
                                             PartialMemory<kRows, kLanes>& memory) {
  constexpr int kTogether = kThreads / kLanes;  // tokens of one load of all threads
  constexpr int kAtOnce = kTokensAtOnce<kType>;
  const int dim = static_cast<int>(p.view.key_dim);
  const int part = threadIdx.x % kLanes;
  const int first = part * kPack;
  float query[kRows][kPack];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) query[row][i] = memory.scoring.query[row][first + i];
  }
  for (int begin = tile.begin; begin < tile.end; begin += kTogether * kAtOnce) {
    Pack<kType> packs[kAtOnce] = {};
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int t = begin + n * kTogether + threadIdx.x / kLanes;
      if (t < tile.end) packs[n] = LoadPack<kType, kAligned>(keys + t * dim, first, dim);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int t = begin + n * kTogether + threadIdx.x / kLanes;
      float key[kPack];
      WidenPack<kType>(packs[n], key);
      float products[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        products[row] = 0.0f;
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          products[row] = fmaf(query[row][i], key[i], products[row]);
        }
      }
      const float product = SumRows<kRows, kLanes>(products, part);
      constexpr int kSharers = kLanes / kRows;  // lanes that hold the same sum
      if (t < tile.end && part % kSharers == 0) {
        memory.scoring.scores[t][part / kSharers] = product;
      }
    }
  }
}

// Fold `value` of all threads that work on the same row, threadIdx.x % kRows, in a fixed order.
template <int kRows, int kLanes, class Fold>
__device__ __forceinline__ float OverTokens(float value, PartialMemory<kRows, kLanes>& memory,
                                            const Fold& fold) {
#pragma unroll
  for (int offset = kWarpLanes / 2; offset >= kRows; offset /= 2) {
    value = fold(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  const int lane = threadIdx.x % kWarpLanes;
  if (lane < kRows) memory.scoring.warp_values[threadIdx.x / kWarpLanes][lane] = value;
  __syncthreads();
  value = memory.scoring.warp_values[0][threadIdx.x % kRows];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) {
    value = fold(value, memory.scoring.warp_values[warp][threadIdx.x % kRows]);
  }
  __syncthreads();  // the next call overwrites them
  return value;
}

// pass 3: scores, their largest, weights, their sum
template <int kRows, int kLanes>
__device__ __forceinline__ void MakeWeights(const AttentionParams& p, const Round& round,
                                            const Tile& tile,
                                            PartialMemory<kRows, kLanes>& memory) {
  constexpr int kTogether = kThreads / kRows;
  const int number = threadIdx.x % kRows;
  const bool is_row = number < tile.rows;
  const Row row = RowOf(round, tile, is_row ? number : 0);
  float max = MinusInfinity();
  for (int begin = tile.begin; begin < tile.end; begin += kTogether) {
    const int t = begin + threadIdx.x / kRows;
    float score = MinusInfinity();
    if (t < tile.end && is_row && MayAttend(p, tile, row, t)) {
      score = memory.scoring.scores[t][number] * p.scale;
      if (p.softcap != 0.0f) score = p.softcap * tanhf(score / p.softcap);
    }
    max = fmaxf(max, score);
    // NaN is attended: what is wrong must show. The rows of a token are neighbouring lanes.
    const unsigned attending = __ballot_sync(kAllLanes, score != MinusInfinity());
    if (t < tile.end) {
      memory.scoring.scores[t][number] = score;
      const int lane = threadIdx.x % kWarpLanes;
      if (number == 0) {
        memory.scoring.is_used[t] = (attending >> lane & ((1u << kRows) - 1)) != 0;
      }
    }
  }
  max = OverTokens(max, memory, [](float a, float b) { return fmaxf(a, b); });

  const float base = max == MinusInfinity() ? 0.0f : max;
  float sum = 0.0f;
  for (int t = tile.begin + threadIdx.x / kRows; t < tile.end; t += kTogether) {
    const float weight = expf(memory.scoring.scores[t][number] - base);
    memory.scoring.scores[t][number] = weight;
    sum += weight;
  }
  sum = OverTokens(sum, memory, [](float a, float b) { return a + b; });
  if (is_row && threadIdx.x < kRows) {
    const int64_t index = PartialIndex(p, round, tile, row);
    round.partials.max[index] = max;
    round.partials.sum[index] = sum;
  }
}

// Write one thread's dims of the rows' weighted values.
template <int kRows, bool kAligned>
__device__ __forceinline__ void StoreValues(const AttentionParams& p, const Round& round,
                                            const Tile& tile, int first,
                                            const float (&acc)[kRows][kPack]) {
  const int64_t dim = p.view.value_dim;
#pragma unroll
  for (int number = 0; number < kRows; ++number) {
    if (number >= tile.rows) break;
    const Row row = RowOf(round, tile, number);
    float* to = round.partials.acc + PartialIndex(p, round, tile, row) * dim;
    if constexpr (kAligned) {
      if (first < dim) {
        const float* from = acc[number];
        auto* quads = reinterpret_cast<float4*>(to + first);
        quads[0] = make_float4(from[0], from[1], from[2], from[3]);
        quads[1] = make_float4(from[4], from[5], from[6], from[7]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        if (first + i < dim) to[first + i] = acc[number][i];
      }
    }
  }
}

// pass 4: weighted values
template <DType kType, int kRows, int kLanes, bool kAligned>
__device__ __forceinline__ void AddValues(const AttentionParams& p, const Round& round,
                                          const Tile& tile, const Element<kType>* values,
                                          PartialMemory<kRows, kLanes>& memory) {
  constexpr int kTogether = kThreads / kLanes;
  constexpr int kAtOnce = kTokensAtOnce<kType>;
  const int dim = static_cast<int>(p.view.value_dim);
  const int first = threadIdx.x % kLanes * kPack;
  float acc[kRows][kPack] = {};
  for (int begin = tile.begin + threadIdx.x / kLanes; begin < tile.end;
       begin += kTogether * kAtOnce) {
    Pack<kType> packs[kAtOnce] = {};
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int t = begin + n * kTogether;
      // 0 * NaN is NaN: what nobody attends must not even meet a weight of zero.
      if (t < tile.end && memory.scoring.is_used[t]) {
        packs[n] = LoadPack<kType, kAligned>(values + t * dim, first, dim);
      }
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int t = begin + n * kTogether;
      if (t >= tile.end) break;
      float value[kPack];
      WidenPack<kType>(packs[n], value);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const float weight = memory.scoring.scores[t][row];
#pragma unroll
        for (int i = 0; i < kPack; ++i) acc[row][i] = fmaf(weight, value[i], acc[row][i]);
      }
    }
  }

  // Sum over the threads that hold the same dims: lanes first, then warps, halving.
#pragma unroll
  for (int offset = kWarpLanes / 2; offset >= kLanes; offset /= 2) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        acc[row][i] += __shfl_xor_sync(kAllLanes, acc[row][i], offset);
      }
    }
  }
  const int warp = threadIdx.x / kWarpLanes;
  const bool is_holder = threadIdx.x % kWarpLanes < kLanes;
  for (int half = kWarps / 2; half > 0; half /= 2) {
    __syncthreads();
    if (is_holder && warp >= half && warp < 2 * half) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) memory.sums[warp - half][row][first + i] = acc[row][i];
      }
    }
    __syncthreads();
    if (is_holder && warp < half) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) acc[row][i] += memory.sums[warp][row][first + i];
      }
    }
  }
  if (threadIdx.x < kLanes) StoreValues<kRows, kAligned>(p, round, tile, first, acc);
}

// The same partial for all rows of the tile: of nothing (sum 0), or of a block that cannot be read
// (sum NaN).
template <int kRows, int kLanes, bool kAligned>
__device__ __forceinline__ void StoreSame(const AttentionParams& p, const Round& round,
                                          const Tile& tile, float max, float sum) {
  if (threadIdx.x < tile.rows) {
    const int64_t index =
        PartialIndex(p, round, tile, RowOf(round, tile, static_cast<int>(threadIdx.x)));
    round.partials.max[index] = max;
    round.partials.sum[index] = sum;
  }
  if (threadIdx.x < kLanes) {
    float acc[kRows][kPack];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) acc[row][i] = sum;
    }
    StoreValues<kRows, kAligned>(p, round, tile, threadIdx.x * kPack, acc);
  }
}

template <DType kType, int kRows, int kLanes, bool kAligned>
__global__ void __launch_bounds__(kThreads, kResident<kRows, kLanes>)
    PartialKernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Round round) {
  const Tile tile = ThisTile<kRows>(p, round);
  if (tile.begin >= tile.end) {
    StoreSame<kRows, kLanes, kAligned>(p, round, tile, MinusInfinity(), 0.0f);
    return;
  }
  const int64_t slot = p.view.table[tile.sequence * p.view.table_stride + tile.column];
  if (slot < 0 || slot >= p.view.num_slots) {
    StoreSame<kRows, kLanes, kAligned>(p, round, tile, 0.0f, NotANumber());
    return;
  }
  auto& memory = *reinterpret_cast<PartialMemory<kRows, kLanes>*>(shared_memory);
  LoadQueries<kType>(p, round, tile, memory);
  __syncthreads();
  MakeProducts<kType, kRows, kLanes, kAligned>(p, tile, KeyRows<kType>(p, tile, slot), memory);
  __syncthreads();
  MakeWeights(p, round, tile, memory);
  AddValues<kType, kRows, kLanes, kAligned>(p, round, tile, ValueRows<kType>(p, tile, slot),
                                            memory);
}

}  // namespace
}  // namespace hf_tiered_cache
