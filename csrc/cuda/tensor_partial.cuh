// The partial of one unit for a tile of rows on tensor cores, for types of 16 bits whose rows begin
// at 16 bytes. Memory binds it: what counts is that loads are always in flight.
//
// Every warp takes a strip of 32 tokens: keys and values go from memory
// straight into the registers of the one lane that needs them, a chunk of 64 dims at a time and two
// chunks ahead of their use. No shuffling is needed, because both products sum over something whose
// order is free as long as both sides agree on it: scores over dims, of which a lane takes 8
// consecutive ones, weighted values over tokens, whose scores the lane already holds. Largest
// scores and sums of the warps meet in shared memory.
//
// Weights are split in two elements, so they are as exact as the sums; the second half takes the
// 8 rows of the instruction that a tile of 8 rows leaves free. A tile of 16 is two of 8 for values,
// so that bits do not depend on the number of rows.
#pragma once

#include "block.cuh"
#include "geometry.cuh"
#include "tensor_core.cuh"

namespace hf_tiered_cache {
namespace {

constexpr int kStripTokens = 32;
constexpr int kTensorWarps = kUnitTokens / kStripTokens;
constexpr int kTensorThreads = kTensorWarps * kWarpLanes;
constexpr int kChunkDims = 64;
constexpr int kChunkLoads = kStripTokens * kChunkDims / kPack / kWarpLanes;  // per lane
constexpr int kHalfRows = 8;  // of the instruction's 16
constexpr int kTokenTiles = kStripTokens / 8;
constexpr int kTokenSteps = kStripTokens / 16;

struct Pack16 {
  uint32_t words[4];  // 8 elements
};
using Chunk = Pack16[kChunkLoads];

template <int kRows, int kChunks>
struct TensorMemory {
  // Rows behind each other begin 4 banks apart, so that 8 lanes' 16 bytes meet in no bank.
  static constexpr int kQueryDims = kChunks * kChunkDims + kPack;
  static constexpr int kSumDims = kChunkDims + 4;
  __align__(16) uint16_t query[kRows][kQueryDims];
  __align__(16) float sums[kTensorWarps][kRows][kSumDims];  // weighted values of a chunk
  float max[kTensorWarps][kRows];
  float sum[kTensorWarps][kRows];
};

// What a lane is to its warp, in the order of tensor_core.cuh, and where its strip lies.
struct Lane {
  int warp;
  int g;
  int t;
  int strip;  // first token, in the unit
};

__device__ __forceinline__ Lane ThisLane() {
  const int warp = threadIdx.x / kWarpLanes;
  const int lane = threadIdx.x % kWarpLanes;
  return {warp, lane / 4, lane % 4, warp * kStripTokens};
}

// The lane's token `i` of 2 of key tile `tile`: the one whose scores it holds, whose values it
// loads.
__device__ __forceinline__ int ScoreToken(const Lane& lane, int tile, int i) {
  return lane.strip + tile * 8 + 2 * lane.t + i;
}

// The lane's part of the unit's keys: of token g of each key tile 8 dims in each 32.
// Values: of both its tokens of each key tile 8 dims of a chunk, such that it sums 2 x 8
// consecutive ones, in other banks than its neighbours.
struct LanePart {
  const uint16_t* first;
  int dims;       // from `first` to the end of the row
  int stride;     // elements from a token to the next
  uint32_t tokens;  // a bit per token of the lane: whether the tile has it
};

__device__ __forceinline__ LanePart KeyPart(const uint16_t* keys, int key_dim, const Tile& tile,
                                            const Lane& lane) {
  const int token = lane.strip + lane.g;
  const int dim = lane.t * kPack;
  LanePart part = {keys + token * key_dim + dim, key_dim - dim, key_dim, 0};
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
    const bool is_there = token + n * 8 >= tile.begin && token + n * 8 < tile.end;
    part.tokens |= static_cast<uint32_t>(is_there) << n;
  }
  return part;
}

__device__ __forceinline__ LanePart ValuePart(const uint16_t* values, int value_dim,
                                              const Tile& tile, const Lane& lane) {
  const int dim = (lane.g / 2 + lane.g % 2 * 4) * kPack;
  LanePart part = {values + ScoreToken(lane, 0, 0) * value_dim + dim, value_dim - dim,
                   value_dim, 0};
#pragma unroll
  for (int n = 0; n < kChunkLoads; ++n) {
    const int token = ScoreToken(lane, n / 2, n % 2);
    const bool is_there = token >= tile.begin && token < tile.end;
    part.tokens |= static_cast<uint32_t>(is_there) << n;
  }
  return part;
}

// Keeps a value in its register, where the compiler would work it out anew for each use.
template <class T>
__device__ __forceinline__ void Keep([[maybe_unused]] T& value) {
#if defined(__CUDACC__)
  if constexpr (sizeof(T) == 8) {
    asm("" : "+l"(value));
  } else {
    asm("" : "+r"(value));
  }
#endif
}

// Elements that there are not become 0. With kIsExact, all dims are there.
template <bool kIsExact>
__device__ __forceinline__ Pack16 LoadPack16(const LanePart& part, int token_offset, int dim, int bit) {
  uint4 words = {};
  if ((part.tokens >> bit & 1) != 0 && (kIsExact || dim < part.dims)) {
    words = __ldcs(reinterpret_cast<const uint4*>(part.first + token_offset * part.stride + dim));
  }
  return {{words.x, words.y, words.z, words.w}};
}

template <bool kIsExact>
__device__ __forceinline__ void LoadKeys(const LanePart& part, int chunk, Chunk& to) {
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      to[n * 2 + half] = LoadPack16<kIsExact>(part, n * 8, chunk * kChunkDims + half * 32, n);
    }
  }
}

template <bool kIsExact>
__device__ __forceinline__ void LoadValues(const LanePart& part, int chunk, Chunk& to) {
#pragma unroll
  for (int n = 0; n < kChunkLoads; ++n) {
    to[n] = LoadPack16<kIsExact>(part, n / 2 * 8 + n % 2, chunk * kChunkDims, n);
  }
}

// A thread's part of the tile's queries, 0 in rows and dims that there are not.
template <int kRows, int kChunks>
struct QueryPart {
  static constexpr int kPacks = kChunks * kChunkDims / kPack;  // of a row
  static constexpr int kCount = DivideUp(kRows * kPacks, kTensorThreads);
  uint4 packs[kCount];

  __device__ __forceinline__ void Load(const AttentionParams& p, const Round& round,
                                       const Tile& tile, int key_dim) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int number = (threadIdx.x + i * kTensorThreads) / kPacks;
      const int dim = (threadIdx.x + i * kTensorThreads) % kPacks * kPack;
      packs[i] = {};
      if (number >= tile.rows || dim >= key_dim) continue;
      const Row row = RowOf(round, tile, number);
      const auto* query = static_cast<const uint16_t*>(p.query) +
                          tile.sequence * p.query_stride[0] + row.head * p.query_stride[1] +
                          row.query * p.query_stride[2] + dim;
      if (reinterpret_cast<uintptr_t>(query) % sizeof(uint4) == 0) {
        packs[i] = *reinterpret_cast<const uint4*>(query);
      } else {
        const auto pair = [&](int j) {
          return query[j] | static_cast<uint32_t>(query[j + 1]) << 16;
        };
        packs[i] = {pair(0), pair(2), pair(4), pair(6)};
      }
    }
  }

  __device__ __forceinline__ void Store(TensorMemory<kRows, kChunks>& memory) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int number = (threadIdx.x + i * kTensorThreads) / kPacks;
      const int dim = (threadIdx.x + i * kTensorThreads) % kPacks * kPack;
      if (number < kRows) *reinterpret_cast<uint4*>(&memory.query[number][dim]) = packs[i];
    }
  }
};

// Adds a chunk's products of queries and keys. scores[n][2 half + i]: of row g + 8 half and the
// lane's token i of key tile n.
template <DType kType, int kRows, int kChunks>
__device__ __forceinline__ void AddProducts(const TensorMemory<kRows, kChunks>& memory,
                                            const Lane& lane, int chunk, const Chunk& keys,
                                            float (&scores)[kTokenTiles][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int dim = chunk * kChunkDims + half * 32 + lane.t * kPack;
    Pack16 upper = {};
    const auto& lower = *reinterpret_cast<const Pack16*>(&memory.query[lane.g][dim]);
    if constexpr (kRows > kHalfRows) {
      upper = *reinterpret_cast<const Pack16*>(&memory.query[lane.g + kHalfRows][dim]);
    }
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
      const uint32_t a[4] = {lower.words[step], upper.words[step], lower.words[step + 1],
                             upper.words[step + 1]};
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const Pack16& key = keys[n * 2 + half];
        const uint32_t b[2] = {key.words[step], key.words[step + 1]};
        MultiplyAdd<kType>(scores[n], a, b);
      }
    }
  }
}

// Which of the lane's tokens are attended: a bit each, as in LanePart, in byte `half` by row
// g + 8 half, in byte 2 by some row of the tile. One word, as registers are dear.
using Attended = uint32_t;
constexpr uint32_t kAllTokens = (1u << kChunkLoads) - 1;

// Where every row may attend `tokens`.
__device__ __forceinline__ Attended AllAttended(uint32_t tokens) { return tokens * 0x010101u; }

__device__ __forceinline__ uint32_t AttendedBy(Attended attended, int byte) {
  return attended >> 8 * byte & kAllTokens;
}

// Where some may not: one token after the other, as it is rare.
template <int kRows>
__device__ __forceinline__ Attended FindAttended(const AttentionParams& p, const Round& round,
                                                 const Tile& tile, const Lane& lane,
                                                 uint32_t tokens) {
  Attended attended = 0;
#pragma unroll
  for (int half = 0; half < kRows / kHalfRows; ++half) {
    const int number = lane.g + half * kHalfRows;
    const bool is_row = number < tile.rows;
    const Row row = RowOf(round, tile, is_row ? number : 0);
#pragma unroll 1
    for (int n = 0; n < kChunkLoads; ++n) {
      const bool may = is_row && (tokens >> n & 1) != 0 &&
                       MayAttend(p, tile, row, ScoreToken(lane, n / 2, n % 2));
      const uint32_t lanes = __ballot_sync(kAllLanes, may) & 0x11111111u << lane.t;
      attended |= static_cast<uint32_t>(may) << (8 * half + n);
      attended |= static_cast<uint32_t>(lanes != 0) << (16 + n);
    }
  }
  return attended;
}

// Whether some row of the tile may not attend all of its tokens. The first row sees least.
__device__ __forceinline__ bool IsCut(const AttentionParams& p, const Round& round,
                                      const Tile& tile) {
  return p.mask != nullptr || (p.causal && tile.position + tile.end - 1 >
                                               p.query_start + RowOf(round, tile, 0).query);
}

// Products become scores: scaled, -inf where the row may not attend.
template <int kRows>
__device__ __forceinline__ void MakeScores(const AttentionParams& p,
                                           Attended attended,
                                           float (&scores)[kTokenTiles][4]) {
  const float inverse_softcap = p.softcap == 0.0f ? 0.0f : 1.0f / p.softcap;
#pragma unroll
  for (int half = 0; half < kRows / kHalfRows; ++half) {
#pragma unroll
    for (int n = 0; n < kChunkLoads; ++n) {
      float& score = scores[n / 2][half * 2 + n % 2];
      score *= p.scale;
      if (p.softcap != 0.0f) score = p.softcap * tanhf(score * inverse_softcap);
      if ((AttendedBy(attended, half) >> n & 1) == 0) score = MinusInfinity();
    }
  }
}

// The largest scores of the warp's tokens, into shared memory.
template <int kRows, int kChunks>
__device__ __forceinline__ void StoreMax(TensorMemory<kRows, kChunks>& memory, const Lane& lane,
                                         const float (&scores)[kTokenTiles][4]) {
#pragma unroll
  for (int half = 0; half < kRows / kHalfRows; ++half) {
    float max = MinusInfinity();
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      max = fmaxf(max, fmaxf(scores[n][half * 2], scores[n][half * 2 + 1]));
    }
    max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 1));
    max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 2));
    if (lane.t == 0) memory.max[lane.warp][lane.g + half * kHalfRows] = max;
  }
}

template <int kRows, int kChunks>
__device__ __forceinline__ float MaxOfWarps(const TensorMemory<kRows, kChunks>& memory, int row) {
  float max = memory.max[0][row];
#pragma unroll
  for (int warp = 1; warp < kTensorWarps; ++warp) max = fmaxf(max, memory.max[warp][row]);
  return max;
}

// Scores become weights, split in the order that values want them in: weights[half][step] of rows
// g + 8 half, their rests as the instruction's rows 8 to 15. Their sums go to shared memory.
template <DType kType, int kRows, int kChunks>
__device__ __forceinline__ void MakeWeights(TensorMemory<kRows, kChunks>& memory, const Lane& lane,
                                            const float (&scores)[kTokenTiles][4],
                                            uint32_t (&weights)[kRows / kHalfRows][kTokenSteps]
                                                               [4]) {
#pragma unroll
  for (int half = 0; half < kRows / kHalfRows; ++half) {
    const float max = MaxOfWarps(memory, lane.g + half * kHalfRows);
    const float base = max == MinusInfinity() ? 0.0f : max;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const float first = expf(scores[n][half * 2] - base);
      const float second = expf(scores[n][half * 2 + 1] - base);
      sum += first;
      sum += second;
      uint32_t(&to)[4] = weights[half][n / 2];
      SplitPair<kType>(first, second, to[n % 2 * 2], to[n % 2 * 2 + 1]);
    }
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    if (lane.t == 0) memory.sum[lane.warp][lane.g + half * kHalfRows] = sum;
  }
}

// Multiplies a chunk's values with the weights, into the warp's part of shared memory: 4 or 2
// of a lane's 8 dims at a time, to spare registers.
template <DType kType, int kRows, int kChunks>
__device__ __forceinline__ void SumValues(
    TensorMemory<kRows, kChunks>& memory, const Lane& lane, Chunk& values, Attended attended,
    const uint32_t (&weights)[kRows / kHalfRows][kTokenSteps][4]) {
  const uint32_t used = AttendedBy(attended, 2);
  if (used != kAllTokens) {
    // 0 * NaN is NaN: what nobody attends must not even meet a weight of zero.
#pragma unroll
    for (int n = 0; n < kChunkLoads; ++n) {
      if ((used >> n & 1) == 0) values[n] = {};
    }
  }
  constexpr int kDims = kRows > kHalfRows ? 2 : 4;
#pragma unroll
  for (int begin = 0; begin < kPack; begin += kDims) {
    uint32_t pairs[kDims][kTokenSteps][2];  // a dim of neighbouring tokens: an operand b
#pragma unroll
    for (int j = 0; j < kDims; j += 2) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const uint32_t first = values[n * 2].words[(begin + j) / 2];
        const uint32_t second = values[n * 2 + 1].words[(begin + j) / 2];
        pairs[j][n / 2][n % 2] = FirstOfEach(first, second);
        pairs[j + 1][n / 2][n % 2] = SecondOfEach(first, second);
      }
    }
#pragma unroll
    for (int half = 0; half < kRows / kHalfRows; ++half) {
      float acc[kDims][4] = {};
#pragma unroll
      for (int step = 0; step < kTokenSteps; ++step) {
#pragma unroll
        for (int j = 0; j < kDims; ++j) {
          MultiplyAdd<kType>(acc[j], weights[half][step], pairs[j][step]);
        }
      }
      // Column 2t is of the lanes whose ValueDim is 8 t, column 2t + 1 of those 32 dims further.
      float* row = memory.sums[lane.warp][lane.g + half * kHalfRows] + lane.t * kPack + begin;
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        struct alignas(kDims * sizeof(float)) {
          float of[kDims];
        } sums;
#pragma unroll
        for (int j = 0; j < kDims; ++j) sums.of[j] = acc[j][column] + acc[j][column + 2];
        *reinterpret_cast<decltype(sums)*>(row + column * 32) = sums;
      }
    }
  }
}

// One thread's part of the result: 4 dims of each chunk of one row.
struct Quad {
  uint32_t index;  // of the row's partial; kNoRow: the tile has no such row

  static constexpr uint32_t kNoRow = ~0u;
  static constexpr int kPerRow = kChunkDims / 4;

  __device__ __forceinline__ Quad(const AttentionParams& p, const Round& round, const Tile& tile)
      : index(kNoRow) {
    if (Number() < tile.rows) {
      index = static_cast<uint32_t>(PartialIndex(p, round, tile, RowOf(round, tile, Number())));
    }
  }

  __device__ __forceinline__ int Number() const { return threadIdx.x / kPerRow; }
  __device__ __forceinline__ int Dim() const { return threadIdx.x % kPerRow * 4; }

  __device__ __forceinline__ void StoreMaxAndSum(const Round& round, float max, float sum) const {
    round.partials.max[index] = max;
    round.partials.sum[index] = sum;
  }
  __device__ __forceinline__ void StoreValues(const Round& round, int value_dim, int dim,
                                              float4 values) const {
    float* row = round.partials.acc + static_cast<int64_t>(index) * value_dim;
    *reinterpret_cast<float4*>(row + dim) = values;
  }
};

// The sums of a chunk over the warps, and with the first chunk those of the weights, to memory.
template <int kRows, int kChunks>
__device__ __forceinline__ void StoreChunk(const Round& round,
                                           const TensorMemory<kRows, kChunks>& memory,
                                           const Quad& quad, int value_dim, int chunk) {
  if (quad.index == Quad::kNoRow) return;
  const int number = quad.Number();
  if (chunk == 0 && quad.Dim() == 0) {
    float sum = memory.sum[0][number];
#pragma unroll
    for (int warp = 1; warp < kTensorWarps; ++warp) sum += memory.sum[warp][number];
    quad.StoreMaxAndSum(round, MaxOfWarps(memory, number), sum);
  }
  const int dim = chunk * kChunkDims + quad.Dim();
  if (dim >= value_dim) return;
  float4 total = {};
#pragma unroll
  for (int warp = 0; warp < kTensorWarps; ++warp) {
    const auto& part = *reinterpret_cast<const float4*>(&memory.sums[warp][number][quad.Dim()]);
    total.x += part.x;
    total.y += part.y;
    total.z += part.z;
    total.w += part.w;
  }
  quad.StoreValues(round, value_dim, dim, total);
}

// The same partial for all rows of the tile: of nothing (sum 0), or of a block that cannot be read
// (sum NaN).
template <int kChunks>
__device__ __forceinline__ void StoreSame(const Round& round, const Quad& quad, int value_dim,
                                          float max, float sum) {
  if (quad.index == Quad::kNoRow) return;
  if (quad.Dim() == 0) quad.StoreMaxAndSum(round, max, sum);
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int dim = chunk * kChunkDims + quad.Dim();
    if (dim < value_dim) {
      quad.StoreValues(round, value_dim, dim, make_float4(sum, sum, sum, sum));
    }
  }
}

// CUDA blocks that shall fit a multiprocessor, which bounds the registers: 2 wherever that costs at
// most a few spills around the loads (nvcc 13.0; tests/cuda/test_registers.py sees to it).
template <int kRows, int kChunks, bool kIsExact>
constexpr int kTensorResident = (kRows > kHalfRows) + (kChunks > 2) + !kIsExact < 2 ? 2 : 1;

// With kIsExact, keys and values have just the dims of kChunks chunks, known to the compiler.
template <DType kType, int kRows, int kChunks, bool kIsExact>
__global__ void __launch_bounds__(kTensorThreads, kTensorResident<kRows, kChunks, kIsExact>)
    TensorPartialKernel(const __grid_constant__ AttentionParams p,
                        const __grid_constant__ Round round) {
  static_assert(kRows * Quad::kPerRow <= kTensorThreads, "a thread has one quad");
  // Where scores and two chunks would not fit the registers, the second of values comes later.
  constexpr bool kIsLate = kRows > kHalfRows || kChunks > 2 || !kIsExact;
  const Tile tile = ThisTile<kRows>(p, round);
  constexpr int kDims = kChunks * kChunkDims;
  const int key_dim = kIsExact ? kDims : static_cast<int>(p.view.key_dim);
  const int value_dim = kIsExact ? kDims : static_cast<int>(p.view.value_dim);
  const bool is_empty = tile.begin >= tile.end;
  // Asked for early: everything waits for it.
  const int slot = p.view.table[tile.sequence * p.view.table_stride + tile.column];
  QueryPart<kRows, kChunks> query;
  query.Load(p, round, tile, key_dim);
  const Quad quad(p, round, tile);
  if (is_empty || slot < 0 || slot >= p.view.num_slots) {
    StoreSame<kChunks>(round, quad, value_dim, is_empty ? MinusInfinity() : 0.0f,
                       is_empty ? 0.0f : NotANumber());
    return;
  }
  auto& memory = *reinterpret_cast<TensorMemory<kRows, kChunks>*>(shared_memory);
  const Lane lane = ThisLane();
  LanePart keys = KeyPart(KeyRows<kType>(p, tile, slot), key_dim, tile, lane);
  LanePart values = ValuePart(ValueRows<kType>(p, tile, slot), value_dim, tile, lane);
  Keep(keys.first);
  Keep(values.first);
  Keep(keys.tokens);
  Keep(values.tokens);

  Attended attended = AllAttended(values.tokens);
  if (IsCut(p, round, tile)) {
    attended = FindAttended<kRows>(p, round, tile, lane, values.tokens);
  }
  // Chunk i of the keys, then of the values, is in chunks[i % 2].
  Chunk chunks[2];
  const auto load = [&](int i) {
    if (i < kChunks) {
      LoadKeys<kIsExact>(keys, i, chunks[i % 2]);
    } else if (i < 2 * kChunks) {
      LoadValues<kIsExact>(values, i - kChunks, chunks[i % 2]);
    }
  };
  load(0);
  load(1);
  query.Store(memory);
  __syncthreads();

  float scores[kTokenTiles][4] = {};
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    AddProducts<kType>(memory, lane, chunk, chunks[chunk % 2], scores);
    if (!kIsLate || chunk + 2 != kChunks + 1) load(chunk + 2);
  }
  MakeScores<kRows>(p, attended, scores);
  StoreMax(memory, lane, scores);
  __syncthreads();
  uint32_t weights[kRows / kHalfRows][kTokenSteps][4];
  MakeWeights<kType>(memory, lane, scores, weights);
  if (kIsLate && kChunks > 1) load(kChunks + 1);

#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if (chunk > 0) __syncthreads();  // the sums before are stored
    SumValues<kType>(memory, lane, chunks[(kChunks + chunk) % 2], attended, weights);
    load(kChunks + chunk + 2);
    __syncthreads();
    StoreChunk(round, memory, quad, value_dim, chunk);
  }
}

}  // namespace
}  // namespace hf_tiered_cache
