// Attention of many rows: bound by arithmetic. Two register-tiled matrix products per tile of
// tokens with an online softmax between them (FlashAttention-2, arXiv 2307.08691), on operands
// packed once per tile and used by every row of the item.
//
// Parallel over (sequence, kv_head, rows). Inside an item tiles are walked in order, and no row
// depends on another, so threads cannot change a bit. Tiles end at block boundaries and at fixed
// multiples of kTileTokens inside a block: the splitting of the table over calls cannot either.
// Included once per instruction set, see vector.h.
#pragma once

#include "../online_softmax.h"
#include "packing.h"

namespace hf_tiered_cache {
namespace HTC_ISA {
namespace {

constexpr int kTileTokens = 256;
// The micro-kernel makes kMicroRows x (kMicroVectors vectors) sums in registers.
constexpr int kMicroRows = 6;
constexpr int kMicroVectors = HTC_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kPanel = kMicroVectors * kLanes;  // tokens (scores) or dims (values) of one panel
constexpr int kBlockRows = 4 * kMicroRows;      // rows that share one buffer of scores
constexpr int64_t kMinItemRows = 10 * kBlockRows;
constexpr int64_t kMaxItemRows = 42 * kBlockRows;

// ---- the micro-kernel ---------------------------------------------------------------------------

// c[row][col] = sum over k of a[row][k] * b[k][col] for kMicroRows rows and kVectors vectors; a
// word is a float, or a pair of bfloat16. With kAdd: c = c * keep[row] + that.
template <bool kDot, int kVectors, bool kAdd>
void MicroKernel(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                 float* c, int64_t c_stride, const float* keep) {
  VecF sum[kMicroRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    VecF right[kVectors];
    HTC_UNROLL for (int v = 0; v < kVectors; ++v) {
      right[v] = Load<VecF>(b + k * b_stride + v * kLanes);
    }
    HTC_UNROLL for (int r = 0; r < kMicroRows; ++r) {
      if constexpr (kDot) {
        uint32_t word;
        __builtin_memcpy(&word, a + r * a_stride + k, 4);
        const VecU left = word - VecU{};
        HTC_UNROLL for (int v = 0; v < kVectors; ++v) {
          sum[r][v] = DotPairs(sum[r][v], (VecU)right[v], left);
        }
      } else {
        const float left = a[r * a_stride + k];
        HTC_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] += right[v] * left;
      }
    }
  }
  HTC_UNROLL for (int r = 0; r < kMicroRows; ++r) {
    HTC_UNROLL for (int v = 0; v < kVectors; ++v) {
      float* to = c + r * c_stride + v * kLanes;
      if constexpr (kAdd) {
        Store(to, Load<VecF>(to) * keep[r] + sum[r][v]);
      } else {
        Store(to, sum[r][v]);
      }
    }
  }
}

// One panel, `width` columns (rounded up to whole vectors), for kBlockRows rows or fewer.
template <bool kDot, bool kAdd>
HTC_INLINE void MultiplyPanel(int64_t rows, int64_t width, const float* a, int64_t a_stride,
                              const float* b, int64_t b_stride, int64_t depth, float* c,
                              int64_t c_stride, const float* keep) {
  const int64_t vectors = DivideUp(width, kLanes);
  for (int64_t r = 0; r < rows; r += kMicroRows) {
    const float* left = a + r * a_stride;
    float* to = c + r * c_stride;
    const float* factor = keep + r;
#define HTC_CASE(n)                                                                              \
  case n:                                                                                        \
    if constexpr (n <= kMicroVectors) {                                                          \
      MicroKernel<kDot, n, kAdd>(left, a_stride, b, b_stride, depth, to, c_stride, factor);      \
    }                                                                                            \
    break;
    switch (vectors) { HTC_CASE(1) HTC_CASE(2) HTC_CASE(3) HTC_CASE(4) }
#undef HTC_CASE
  }
}

// ---- packing ------------------------------------------------------------------------------------

// Words per key row: pairs of dims when bfloat16 pairs are multiplied, else one dim each.
template <DType kType>
HTC_INLINE int64_t KeyWords(int64_t key_dim) {
  return kUsesDot<kType> ? DivideUp(key_dim, 2) : key_dim;
}

// Keys [tokens][key_dim] to panels of kPanel tokens, each [word][kPanel]; tokens beyond are 0. The
// last panel may be narrower, by whole vectors, but keeps the stride.
template <DType kType>
void PackKeys(const Element<kType>* keys, int64_t key_dim, int64_t tokens, float* packed) {
  constexpr int kElements = kType == DType::kFloat32 ? kLanes : kChunk;  // per vector of words
  const int64_t words = KeyWords<kType>(key_dim);
  for (int64_t t = 0; t < tokens; t += kLanes) {
    float* panel = packed + t / kPanel * words * kPanel + t % kPanel;
    for (int64_t d = 0; d < key_dim; d += kElements) {
      const int count = static_cast<int>(Min(kElements, key_dim - d));
      VecU square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const Element<kType>* from = keys + Min(t + i, tokens - 1) * key_dim + d;
        VecU row;
        if constexpr (kType == DType::kFloat32) {
          row = (VecU)(count == kElements ? Load<VecF>(from) : LoadFloatsTail(from, count));
        } else {
          row = count == kElements ? Load<VecU>(from) : LoadWordsTail(from, count);
        }
        square[i] = t + i < tokens ? row : VecU{};
      }
      Transpose(square);
      if constexpr (kType == DType::kFloat32) {
        for (int i = 0; i < count; ++i) Store(panel + (d + i) * kPanel, square[i]);
      } else if constexpr (kUsesDot<kType>) {
        const int64_t word = d / 2;
        for (int i = 0; i < (count + 1) / 2; ++i) Store(panel + (word + i) * kPanel, square[i]);
      } else {
        for (int i = 0; i < count; ++i) {
          const VecU word = square[i / 2];
          VecF wide;
          if constexpr (kType == DType::kBFloat16) {
            wide = (VecF)(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
          } else {
            wide = HalfToFloat(i % 2 == 0 ? word & 0xffffu : word >> 16);
          }
          Store(panel + (d + i) * kPanel, wide);
        }
      }
    }
  }
}

// Values [tokens][value_dim] to rows of `stride` words: widened floats, or bfloat16 pairs of the
// tokens t and t + 1. Tokens that no row attends become 0 (they may hold NaN).
template <DType kType>
void PackValues(const Element<kType>* values, int64_t value_dim, int64_t tokens,
                const uint8_t* used, float* packed, int64_t stride) {
  if constexpr (kUsesDot<kType>) {
    for (int64_t t = 0; t < tokens; t += 2, packed += stride) {
      const bool has_first = used == nullptr || used[t] != 0;
      const bool has_second = t + 1 < tokens && (used == nullptr || used[t + 1] != 0);
      const Element<kType>* first = values + t * value_dim;
      const Element<kType>* second = first + value_dim;
      for (int64_t d = 0; d < value_dim; d += kChunk) {
        const int count = static_cast<int>(Min(kChunk, value_dim - d));
        VecU a = {}, b = {};
        if (count == kChunk) {
          if (has_first) a = Load<VecU>(first + d);
          if (has_second) b = Load<VecU>(second + d);
        } else {
          if (has_first) a = LoadWordsTail(first + d, count);
          if (has_second) b = LoadWordsTail(second + d, count);
        }
        const VecU even = (a & 0xffffu) | (b << 16);
        const VecU odd = (a >> 16) | (b & 0xffff0000u);
        Store(packed + d, ZipFirst(even, odd));
        Store(packed + d + kLanes, ZipSecond(even, odd));
      }
    }
  } else {
    for (int64_t t = 0; t < tokens; ++t, packed += stride) {
      if (used == nullptr || used[t] != 0) {
        WidenRow<kType>(values + t * value_dim, value_dim, packed);
      } else {
        for (int64_t d = 0; d < stride; d += kLanes) Store(packed + d, VecF{});
      }
    }
  }
}

// One row of products to weights, with the row's running max and sum brought up to date. Returns
// what the row's earlier values must be multiplied by.
template <DType kType>
HTC_INLINE float SoftmaxTileRow(float* scores, int64_t count, const ScoreRule& rule, float& max,
                                float& sum) {
  const float tile_max = MakeScores(scores, count, rule);
  const float new_max = tile_max > max ? tile_max : max;
  const float tile_sum = MakeWeights<kType>(scores, count, new_max);
  const float keep = new_max == max ? 1.0f : Exp(max - new_max);
  sum = __builtin_fmaf(sum, keep, tile_sum);
  max = new_max;
  return keep;
}

// ---- the call -----------------------------------------------------------------------------------

struct PrefillCall {
  const AttentionParams* params;
  int64_t rows;       // per kv_head: row = query * group + head in group
  int64_t item_rows;
  int64_t items_per_head;
};

// The memory of one item, carved out of the worker's scratch.
struct PrefillBuffers {
  int64_t query_stride;
  int64_t acc_stride;
  int64_t score_stride;
  int64_t value_stride;
  int32_t* row_query;  // [rows] which query and which head a row is: divided once, not per tile
  int32_t* row_head;   // [rows]
  float* query;        // [rows][query_stride] words
  float* acc;          // [rows][acc_stride]
  float* max;          // [rows]
  float* sum;          // [rows]
  float* keys;         // packed
  float* values;       // packed
  float* scores;       // [kBlockRows][score_stride]
  float* keep;         // [kBlockRows]
  uint8_t* used;       // [kTileTokens]
  void* planes;        // for a tile of unpacked tokens
};

HTC_INLINE PrefillBuffers CarveBuffers(const AttentionParams& p, int64_t rows) {
  PrefillBuffers b;
  const int64_t padded = RoundUp(rows, kBlockRows);
  b.query_stride = RoundUp(p.view.key_dim, kChunk);
  b.acc_stride = RoundUp(p.view.value_dim, kChunk);
  b.score_stride = kTileTokens + kLanes;  // rows start in different cache sets
  b.value_stride = RoundUp(p.view.value_dim, kChunk);
  const int64_t floats = padded * (b.query_stride + b.acc_stride + 4) +
                         (p.view.key_dim + 2 + b.value_stride) * (kTileTokens + kPanel) +
                         kBlockRows * (b.score_stride + kLanes) + 16 * kLanes;
  float* next = static_cast<float*>(
      scratch(Scratch::kWorker, floats * 4 + kTileTokens +
                                    PlaneBytes(p.view, kTileTokens, kTileTokens)));
  const auto take = [&next](int64_t count) {
    float* taken = next;
    next += RoundUp(count, 16);
    return taken;
  };
  b.row_query = reinterpret_cast<int32_t*>(take(padded));
  b.row_head = reinterpret_cast<int32_t*>(take(padded));
  b.query = take(padded * b.query_stride);
  b.acc = take(padded * b.acc_stride);
  b.max = take(padded);
  b.sum = take(padded);
  b.keys = take((p.view.key_dim + 1) * kTileTokens);
  b.values = take((kTileTokens + 1) * b.value_stride);
  b.scores = take(kBlockRows * b.score_stride);
  b.keep = take(kBlockRows);
  b.used = reinterpret_cast<uint8_t*>(next);
  b.planes = b.used + kTileTokens;
  return b;
}

// The item's rows against the tokens [begin, end) of a block.
template <DType kType>
void AttendTile(const AttentionParams& p, const PrefillBuffers& b, int64_t sequence,
                int64_t column, int64_t kv_head, const TokenRange& range, int64_t begin,
                int64_t end, int64_t rows) {
  const int64_t group = p.heads / p.view.kv_heads;
  const int64_t tokens = end - begin;
  const int64_t position = range.position + begin;
  const int64_t key_words = KeyWords<kType>(p.view.key_dim);
  const int64_t value_dim = p.view.value_dim;
  const uint8_t* used = nullptr;
  if (p.mask != nullptr) {
    AnyRowAttends(p, sequence, kv_head * group, group, b.row_query[0], b.row_query[rows - 1] + 1,
                  position, tokens, b.used);
    used = b.used;
  }
  const Planes<kType> planes =
      PlanesOf<kType>(p, sequence, column, kv_head, kTileTokens, b.planes);
  PackKeys<kType>(planes.keys.Tokens(begin, end), p.view.key_dim, tokens, b.keys);
  const Element<kType>* values = planes.values.Tokens(begin, end);
  const float* packed_values = b.values;
  int64_t value_stride = b.value_stride;
  if (kType == DType::kFloat32 && used == nullptr && value_dim % kLanes == 0) {
    packed_values = reinterpret_cast<const float*>(values);  // already what packing would make
    value_stride = value_dim;
  } else {
    PackValues<kType>(values, value_dim, tokens, used, b.values, value_stride);
  }

  for (int64_t row = 0; row < rows; row += kBlockRows) {
    const int64_t count = Min(kBlockRows, rows - row);
    // Tokens that the last query of these rows may attend; the rest is skipped for all of them.
    const int64_t last_query = b.row_query[row + count - 1];
    const int64_t visible = Min(tokens, CausalEnd(p, range, last_query) - begin);
    if (visible <= 0) continue;

    // pass 1: scores
    for (int64_t t = 0; t < visible; t += kPanel) {
      MultiplyPanel<kUsesDot<kType>, false>(
          count, Min(kPanel, visible - t), b.query + row * b.query_stride, b.query_stride,
          b.keys + t * key_words, kPanel, key_words, b.scores + t, b.score_stride, b.keep);
    }
    // pass 2: weights
    for (int64_t r = 0; r < count; ++r) {
      const int64_t query = b.row_query[row + r];
      const int64_t head = b.row_head[row + r];
      const int64_t row_end = Min(visible, CausalEnd(p, range, query) - begin);
      const ScoreRule rule = {p.scale, p.softcap, row_end,
                              MaskRow(p, sequence, head, query, position), p.mask_stride[3]};
      b.keep[r] = SoftmaxTileRow<kType>(b.scores + r * b.score_stride, visible, rule,
                                        b.max[row + r], b.sum[row + r]);
    }
    // pass 3: weighted values
    const int64_t depth = kUsesDot<kType> ? DivideUp(visible, 2) : visible;
    for (int64_t d = 0; d < value_dim; d += kPanel) {
      MultiplyPanel<kUsesDot<kType>, true>(count, Min(kPanel, value_dim - d), b.scores,
                                           b.score_stride, packed_values + d, value_stride, depth,
                                           b.acc + row * b.acc_stride + d, b.acc_stride, b.keep);
    }
  }
}

template <DType kType>
void PrefillItem(void* context, int64_t item) {
  const PrefillCall& call = *static_cast<const PrefillCall*>(context);
  const AttentionParams& p = *call.params;
  const int64_t group = p.heads / p.view.kv_heads;
  // The last rows of a causal chunk see the most: begin with them, so that the end is even.
  const int64_t piece = call.items_per_head - 1 - item / (p.batch * p.view.kv_heads);
  const int64_t kv_head = item % p.view.kv_heads;
  const int64_t sequence = item / p.view.kv_heads % p.batch;
  const int64_t first_row = piece * call.item_rows;
  const int64_t rows = Min(call.item_rows, call.rows - first_row);
  const int64_t value_dim = p.view.value_dim;
  const PrefillBuffers b = CarveBuffers(p, rows);

  const auto row_index = [&](int64_t row) {  // of the running state and the log-sum-exp
    return (sequence * p.heads + b.row_head[row]) * p.queries + b.row_query[row];
  };

  // pass 1: rows in, widened or as words; rows that only fill up the last micro-kernel are 0
  for (int64_t row = 0; row < RoundUp(rows, kBlockRows); ++row) {
    float* query = b.query + row * b.query_stride;
    float* acc = b.acc + row * b.acc_stride;
    for (int64_t d = 0; d < b.query_stride; d += kLanes) Store(query + d, VecF{});
    for (int64_t d = 0; d < b.acc_stride; d += kLanes) Store(acc + d, VecF{});
    b.max[row] = kMinusInfinity;
    b.sum[row] = 0.0f;
    if (row >= rows) continue;
    b.row_query[row] = static_cast<int32_t>((first_row + row) / group);
    b.row_head[row] = static_cast<int32_t>(kv_head * group + (first_row + row) % group);
    const Element<kType>* from =
        QueryRow<kType>(p, sequence, b.row_head[row], b.row_query[row]);
    if constexpr (kUsesDot<kType>) {
      __builtin_memcpy(query, from, p.view.key_dim * 2);
    } else {
      WidenRow<kType>(from, p.view.key_dim, query);
    }
    if (p.state.acc != nullptr) {
      const int64_t index = row_index(row);
      __builtin_memcpy(acc, p.state.acc + index * value_dim, value_dim * 4);
      b.max[row] = p.state.max[index];
      b.sum[row] = p.state.sum[index];
    }
  }
  for (int64_t i = 0; i < kBlockRows; ++i) b.keep[i] = 1.0f;
  for (int64_t i = 0; i < kBlockRows * b.score_stride; ++i) b.scores[i] = 0.0f;

  // pass 2: every tile of every block, in order
  const int64_t last_query = b.row_query[rows - 1];
  for (int64_t column = 0; column < p.view.num_columns; ++column) {
    const TokenRange range = AttendedTokens(p, sequence, column);
    const int64_t end = Min(range.end, CausalEnd(p, range, last_query));
    for (int64_t tile = 0; tile < end; tile += kTileTokens) {
      const int64_t tile_begin = Max(tile, range.begin);
      const int64_t tile_end = Min(tile + kTileTokens, end);
      if (tile_begin >= tile_end) continue;
      AttendTile<kType>(p, b, sequence, column, kv_head, range, tile_begin, tile_end, rows);
    }
  }

  // pass 3: rows out
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t index = row_index(row);
    const float* acc = b.acc + row * b.acc_stride;
    if (p.state.acc != nullptr) {
      __builtin_memcpy(p.state.acc + index * value_dim, acc, value_dim * 4);
      p.state.max[index] = b.max[row];
      p.state.sum[index] = b.sum[row];
    }
    if (p.output.out != nullptr) {
      FinishOutput<kType>(p.output, index, sequence, b.row_head[row], b.row_query[row], acc,
                          b.max[row], b.sum[row], value_dim);
    }
  }
}

template <DType kType>
void Prefill(const AttentionParams& p) {
  PrefillCall call;
  call.params = &p;
  call.rows = p.heads / p.view.kv_heads * p.queries;
  const int64_t heads = p.batch * p.view.kv_heads;
  // Four items per thread even out what other programs take; packing wants many rows per item.
  const int64_t pieces = Max(1, DivideUp(4 * p.num_threads, heads));
  int64_t item_rows = RoundUp(DivideUp(call.rows, pieces), kBlockRows);
  item_rows = Min(Max(item_rows, kMinItemRows), kMaxItemRows);
  call.item_rows = item_rows;
  call.items_per_head = DivideUp(call.rows, item_rows);
  parallel_for(p.num_threads, heads * call.items_per_head, PrefillItem<kType>, &call);
}

}  // namespace
}  // namespace HTC_ISA
}  // namespace hf_tiered_cache
