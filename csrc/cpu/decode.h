// Attention of few rows (query heads of a group x queries): bound by reading the blocks once.
//
// Phase 1, parallel over (sequence, block, kv_head): one float32 partial (acc, max, sum) per block
// and row, from nothing but that block. Phase 2, parallel over rows: partials are folded into the
// running state in block order. So neither threads nor the splitting of the table over calls can
// change a bit. Included once per instruction set, see vector.h.
#pragma once

#include "../online_softmax.h"
#include "packing.h"

namespace hf_tiered_cache {
namespace HTC_ISA {
namespace {

// Rows up to which this kernel is used: above, the prefill kernel is faster (bench_kernels.py).
constexpr int64_t kDecodeMaxRows = 16;
// Partials waiting to be folded, per call: more blocks than fit are done in several rounds.
constexpr int64_t kPartialBytes = 8 << 20;
// Bytes of keys and values of the largest item: long runs to prefetch along, short enough that a
// thread which loses its CPU holds up little.
constexpr int64_t kItemBytes = 512 << 10;
constexpr int64_t kKeyTile = 64;
// How far ahead keys are prefetched: 4 KiB.
template <DType kType>
constexpr int64_t kAheadElements = 4096 / sizeof(Element<kType>);
// Tokens (an even number) whose values, 8 KiB, stay in the L1 cache while every row passes over
// them and the next tile comes in.
HTC_INLINE int64_t ValueTile(int64_t row_bytes) {
  return Max(8, Min(64, 8192 / row_bytes / 2 * 2));
}

// ---- scores of one block ------------------------------------------------------------------------

// Words of a query row per chunk of kChunk elements: raw bfloat16 pairs, or widened floats.
template <DType kType>
constexpr int kQueryWords = kUsesDot<kType> ? kLanes : kChunk;

template <int kCount, class Element>
HTC_INLINE void PrefetchElements(const Element* from) {
  HTC_UNROLL for (int i = 0; i < kCount; i += 64 / int{sizeof(Element)}) {
    __builtin_prefetch(from + i);
  }
}

// acc[n][r] += the products of one chunk of key n and query r, kChunk dims from `dim` on. As
// many elements are prefetched at `ahead`, unless that is null.
template <DType kType, int kKeys, int kRows, bool kIsTail>
HTC_INLINE void ScoreChunk(const Element<kType>* const (&key)[kKeys], int64_t dim, int count,
                           const float* query, int64_t query_stride, const Element<kType>* ahead,
                           VecF (&acc)[kKeys][kRows]) {
  if (ahead != nullptr) PrefetchElements<kKeys * kChunk>(ahead);
  if constexpr (kUsesDot<kType>) {
    VecU words[kKeys];
    HTC_UNROLL for (int n = 0; n < kKeys; ++n) {
      words[n] = kIsTail ? LoadWordsTail(key[n] + dim, count) : Load<VecU>(key[n] + dim);
    }
    HTC_UNROLL for (int r = 0; r < kRows; ++r) {
      const VecU with = Load<VecU>(query + r * query_stride);
      HTC_UNROLL for (int n = 0; n < kKeys; ++n) acc[n][r] = DotPairs(acc[n][r], words[n], with);
    }
  } else {
    VecPair chunk[kKeys];
    HTC_UNROLL for (int n = 0; n < kKeys; ++n) {
      const Element<kType>* from = key[n] + dim;
      chunk[n] = kIsTail ? LoadChunkTail<kType>(from, count) : LoadChunk<kType>(from);
    }
    HTC_UNROLL for (int r = 0; r < kRows; ++r) {
      const VecF first = Load<VecF>(query + r * query_stride);
      HTC_UNROLL for (int n = 0; n < kKeys; ++n) acc[n][r] += chunk[n].first * first;
      const VecF second = Load<VecF>(query + r * query_stride + kLanes);
      HTC_UNROLL for (int n = 0; n < kKeys; ++n) acc[n][r] += chunk[n].second * second;
    }
  }
}

// Key rows that share the loads of the query: the fewer loads, the more room for what memory
// delivers (measured: 16 more L1 loads per row cost 10 % of the read bandwidth).
constexpr int kMaxKeysAtOnce = HTC_VECTOR_BYTES == 64 ? 4 : 2;

constexpr int PowerOfTwoUpTo(int value) {
  int power = 1;
  while (2 * power <= value) power *= 2;
  return power;
}

// scores[row][t] = query[row] . keys[t] for kRows rows. A few tokens at once share the loads of the
// query and keep the adders busy; their key rows are neighbours, so memory still sees one ascending
// stream. The sums of kTokens tokens share one reduction.
template <DType kType, int kRows>
void ScoreTokens(const Element<kType>* keys, int64_t key_dim, int64_t tokens, const float* query,
                 int64_t query_stride, float* scores, int64_t score_stride,
                 bool has_prefetch) {
  constexpr int kTokens = PowerOfTwoUpTo(kLanes / kRows);
  constexpr int kAtOnce = kTokens < kMaxKeysAtOnce ? kTokens : kMaxKeysAtOnce;
  const int64_t full = key_dim / kChunk;
  const int tail = static_cast<int>(key_dim % kChunk);
  const Element<kType>* end = keys + tokens * key_dim;
  for (int64_t t = 0; t < tokens; t += kTokens) {
    VecF sums[kLanes] = {};
    HTC_UNROLL for (int i = 0; i < kTokens; i += kAtOnce) {
      const Element<kType>* key[kAtOnce];
      HTC_UNROLL for (int n = 0; n < kAtOnce; ++n) {
        key[n] = keys + Min(t + i + n, tokens - 1) * key_dim;
      }
      const Element<kType>* ahead = key[0] + kAheadElements<kType>;
      if (!has_prefetch || ahead + kAtOnce * key_dim > end) ahead = nullptr;
      VecF acc[kAtOnce][kRows] = {};
      for (int64_t c = 0; c < full; ++c) {
        ScoreChunk<kType, kAtOnce, kRows, false>(key, c * kChunk, 0,
                                                 query + c * kQueryWords<kType>, query_stride,
                                                 ahead, acc);
        if (ahead != nullptr) ahead += kAtOnce * kChunk;
      }
      if (tail != 0) {
        ScoreChunk<kType, kAtOnce, kRows, true>(key, full * kChunk, tail,
                                                query + full * kQueryWords<kType>, query_stride,
                                                ahead, acc);
      }
      HTC_UNROLL for (int n = 0; n < kAtOnce; ++n) {
        HTC_UNROLL for (int r = 0; r < kRows; ++r) sums[r * kTokens + i + n] = acc[n][r];
      }
    }
    float folded[kLanes];
    Store(folded, SumEach(sums));
    HTC_UNROLL for (int r = 0; r < kRows; ++r) {
      __builtin_memcpy(scores + r * score_stride + t, folded + r * kTokens, kTokens * 4);
    }
  }
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// What `make` gives for a number of rows from 1 to kMax, known to it at compile time; else null.
template <int kMax, class Function, class Make>
Function SelectRows(int64_t rows, const Make& make) {
  if constexpr (kMax == 0) {
    return nullptr;
  } else {
    return rows == kMax ? make(Constant<kMax>{}) : SelectRows<kMax - 1, Function>(rows, make);
  }
}

constexpr int kMaxScoreRows = kLanes < 8 ? kLanes : 8;

template <DType kType>
using ScoreFunction = void (*)(const Element<kType>* keys, int64_t key_dim, int64_t tokens,
                               const float* query, int64_t query_stride, float* scores,
                               int64_t score_stride, bool has_prefetch);

template <DType kType>
ScoreFunction<kType> SelectScore(int64_t rows) {
  return SelectRows<kMaxScoreRows, ScoreFunction<kType>>(
      rows, [](auto n) -> ScoreFunction<kType> { return ScoreTokens<kType, n.value>; });
}

// ---- weighted values of one block ---------------------------------------------------------------

// acc[row] += sum over tokens of weights[row][t] * values[t], for kRows rows and kChunks chunks of
// every value row; acc in the order of LoadChunk. Tokens that no row attends (unused) are skipped.
template <DType kType, int kRows, int kChunks, bool kHasTail>
void AddValues(const Element<kType>* values, int64_t value_dim, int64_t tokens, int tail,
               const float* weights, int64_t weight_stride, const uint8_t* used, float* acc,
               int64_t acc_stride, const Element<kType>* ahead) {
  VecF sum[kRows][kChunks][2];
  HTC_UNROLL for (int r = 0; r < kRows; ++r) {
    HTC_UNROLL for (int c = 0; c < kChunks; ++c) {
      sum[r][c][0] = Load<VecF>(acc + r * acc_stride + c * kChunk);
      sum[r][c][1] = Load<VecF>(acc + r * acc_stride + c * kChunk + kLanes);
    }
  }
  if constexpr (kUsesDot<kType>) {
    const auto* words = reinterpret_cast<const uint16_t*>(weights);
    for (int64_t t = 0; t < tokens; t += 2) {
      const bool has_first = used == nullptr || used[t] != 0;
      const bool has_second = t + 1 < tokens && (used == nullptr || used[t + 1] != 0);
      const Element<kType>* first = values + t * value_dim;
      const Element<kType>* second = first + value_dim;
      if (ahead != nullptr) PrefetchElements<2 * kChunks * kChunk>(ahead + t * kChunks * kChunk);
      HTC_UNROLL for (int c = 0; c < kChunks; ++c) {
        VecU a = {}, b = {};
        if (kHasTail && c == kChunks - 1) {
          if (has_first) a = LoadWordsTail(first + c * kChunk, tail);
          if (has_second) b = LoadWordsTail(second + c * kChunk, tail);
        } else {
          if (has_first) a = Load<VecU>(first + c * kChunk);
          if (has_second) b = Load<VecU>(second + c * kChunk);
        }
        const VecU even = (a & 0xffffu) | (b << 16);
        const VecU odd = (a >> 16) | (b & 0xffff0000u);
        HTC_UNROLL for (int r = 0; r < kRows; ++r) {
          uint32_t pair;
          __builtin_memcpy(&pair, words + r * weight_stride * 2 + t, 4);
          const VecU both = pair - VecU{};
          sum[r][c][0] = DotPairs(sum[r][c][0], even, both);
          sum[r][c][1] = DotPairs(sum[r][c][1], odd, both);
        }
      }
    }
  } else {
    for (int64_t t = 0; t < tokens; ++t) {
      if (used != nullptr && used[t] == 0) continue;
      const Element<kType>* value = values + t * value_dim;
      if (ahead != nullptr) PrefetchElements<kChunks * kChunk>(ahead + t * kChunks * kChunk);
      HTC_UNROLL for (int c = 0; c < kChunks; ++c) {
        const VecPair chunk = kHasTail && c == kChunks - 1
                                  ? LoadChunkTail<kType>(value + c * kChunk, tail)
                                  : LoadChunk<kType>(value + c * kChunk);
        HTC_UNROLL for (int r = 0; r < kRows; ++r) {
          const float weight = weights[r * weight_stride + t];
          sum[r][c][0] += chunk.first * weight;
          sum[r][c][1] += chunk.second * weight;
        }
      }
    }
  }
  HTC_UNROLL for (int r = 0; r < kRows; ++r) {
    HTC_UNROLL for (int c = 0; c < kChunks; ++c) {
      Store(acc + r * acc_stride + c * kChunk, sum[r][c][0]);
      Store(acc + r * acc_stride + c * kChunk + kLanes, sum[r][c][1]);
    }
  }
}

// Sums that fit the registers beside the loaded values: 28 of 32, or 12 of 16.
constexpr int kSumRegisters = HTC_VECTOR_BYTES == 64 ? 28 : 12;
constexpr int kMaxChunks = HTC_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int MaxValueRows(int chunks) {
  return kSumRegisters / (2 * chunks) < 8 ? kSumRegisters / (2 * chunks) : 8;
}

template <DType kType>
using AddFunction = void (*)(const Element<kType>* values, int64_t value_dim, int64_t tokens,
                             int tail, const float* weights, int64_t weight_stride,
                             const uint8_t* used, float* acc, int64_t acc_stride,
                             const Element<kType>* ahead);

template <DType kType, int kChunks>
AddFunction<kType> SelectAdd(int64_t rows, bool has_tail) {
  return SelectRows<MaxValueRows(kChunks), AddFunction<kType>>(
      rows, [has_tail](auto n) -> AddFunction<kType> {
        return has_tail ? AddValues<kType, n.value, kChunks, true>
                        : AddValues<kType, n.value, kChunks, false>;
      });
}

template <DType kType>
AddFunction<kType> SelectAdd(int64_t rows, int64_t chunks, bool has_tail) {
#define HTC_CASE(n) \
  case n:           \
    if constexpr (n <= kMaxChunks) return SelectAdd<kType, n>(rows, has_tail);
  switch (chunks) {
    HTC_CASE(1)
    HTC_CASE(2)
    HTC_CASE(3)
    HTC_CASE(4)
  }
#undef HTC_CASE
  return nullptr;
}

// ---- the plan -----------------------------------------------------------------------------------

// Which functions pass over a tile of keys, and over a tile of values, so that all rows and all
// dims are covered. Made once per call: its divisions would cost as much as a tile.
template <DType kType>
struct DecodePlan {
  static constexpr int kMaxScorePasses = kDecodeMaxRows / 4;
  static constexpr int kMaxValuePasses = 128;  // 16 rows by 6, 256 dims by 8: 96

  struct ScorePass {
    ScoreFunction<kType> score;
    int64_t row;
  };
  struct ValuePass {
    AddFunction<kType> add;
    int64_t row;
    int64_t dim;
  };

  ScorePass score_passes[kMaxScorePasses];
  int num_score_passes = 0;
  ValuePass value_passes[kMaxValuePasses];
  int num_value_passes = 0;
  int value_tail;  // dims of the last, incomplete chunk

  DecodePlan(int64_t rows, int64_t value_dim) {
    const int64_t parts = DivideUp(rows, kMaxScoreRows);
    for (int64_t part = 0, row = 0; part < parts; ++part) {
      const int64_t count = (rows - row) / (parts - part);
      score_passes[num_score_passes++] = {SelectScore<kType>(count), row};
      row += count;
    }
    // Widen every value once for as many rows as possible: narrow columns for many rows.
    const int64_t chunks = DivideUp(value_dim, kChunk);
    const int64_t fitting = kSumRegisters / (2 * Min(rows, MaxValueRows(1)));
    const int64_t columns = DivideUp(chunks, Max(1, Min(fitting, kMaxChunks)));
    value_tail = static_cast<int>(value_dim % kChunk);
    for (int64_t column = 0, chunk = 0; column < columns; ++column) {
      const int64_t width = (chunks - chunk) / (columns - column);
      const bool has_tail = value_tail != 0 && chunk + width == chunks;
      const int64_t row_parts = DivideUp(rows, MaxValueRows(static_cast<int>(width)));
      for (int64_t part = 0, row = 0; part < row_parts; ++part) {
        const int64_t count = (rows - row) / (row_parts - part);
        value_passes[num_value_passes++] = {SelectAdd<kType>(count, width, has_tail), row,
                                            chunk * kChunk};
        row += count;
      }
      chunk += width;
    }
  }
};

// All rows over one tile of values; the passes share the prefetching of the next tile, `ahead`
// (or null), so that memory is never idle.
template <DType kType>
HTC_INLINE void AddValueTile(const DecodePlan<kType>& plan, const Element<kType>* values,
                             int64_t value_dim, int64_t tokens, const float* weights,
                             int64_t weight_stride, const uint8_t* used, float* acc,
                             int64_t acc_stride, const Element<kType>* ahead) {
  for (int i = 0; i < plan.num_value_passes; ++i) {
    const auto& pass = plan.value_passes[i];
    pass.add(values + pass.dim, value_dim, tokens, plan.value_tail,
             weights + pass.row * weight_stride, weight_stride, used,
             acc + pass.row * acc_stride + pass.dim, acc_stride,
             ahead == nullptr || pass.row != 0 ? nullptr : ahead + pass.dim * tokens);
  }
}

// ---- the call -----------------------------------------------------------------------------------

template <DType kType>
struct DecodeCall {
  const AttentionParams* params;
  const DecodePlan<kType>* plan;
  int64_t rows;            // per kv_head: group x queries, head-major as in memory
  int64_t query_stride;    // words per prepared query row
  int64_t acc_stride;      // floats per partial row
  int64_t score_stride;    // floats per row of scores
  int64_t units_per_item;
  int64_t column_begin;    // this round: columns [column_begin, column_end)
  int64_t column_end;
  float* query;            // [batch][heads * queries][query_stride]
  float* running_acc;      // [batch][heads * queries][acc_stride]
  float* running_max;      // [batch][heads * queries]
  float* running_sum;
  float* partial_acc;      // [batch][columns of a round][heads * queries][acc_stride]
  float* partial_max;      // [batch][columns of a round][heads * queries]
  float* partial_sum;
  int64_t round_columns;
};

template <DType kType>
void PrepareQuery(const DecodeCall<kType>& call) {
  const AttentionParams& p = *call.params;
  const int64_t full = p.view.key_dim / kChunk * kChunk;
  const int tail = static_cast<int>(p.view.key_dim % kChunk);
  float* to = call.query;
  for (int64_t sequence = 0; sequence < p.batch; ++sequence) {
    for (int64_t head = 0; head < p.heads; ++head) {
      for (int64_t query = 0; query < p.queries; ++query, to += call.query_stride) {
        const Element<kType>* from = QueryRow<kType>(p, sequence, head, query);
        float* word = to;
        for (int64_t i = 0; i < p.view.key_dim; i += kChunk, word += kQueryWords<kType>) {
          if constexpr (kUsesDot<kType>) {
            Store(word, i < full ? Load<VecU>(from + i) : LoadWordsTail(from + i, tail));
          } else {
            const VecPair chunk =
                i < full ? LoadChunk<kType>(from + i) : LoadChunkTail<kType>(from + i, tail);
            Store(word, chunk.first);
            Store(word + kLanes, chunk.second);
          }
        }
      }
    }
  }
}

// The partial of one (sequence, column, kv_head), for all rows of the head's group. next_keys, or
// null: the keys that this thread reads next. A packed block is unpacked by tiles, into what stays in
// the L1 cache (kKeyTile tokens of keys, a value tile), and attended as a raw one is.
template <DType kType>
void BlockPartial(const DecodeCall<kType>& call, int64_t sequence, int64_t column, int64_t kv_head,
                  const Element<kType>* next_keys) {
  const AttentionParams& p = *call.params;
  const int64_t rows = call.rows;
  const int64_t group = p.heads / p.view.kv_heads;
  const int64_t all_rows = p.heads * p.queries;
  const int64_t first_row = kv_head * rows;
  const int64_t at =
      (sequence * call.round_columns + column - call.column_begin) * all_rows + first_row;
  const TokenRange range = AttendedTokens(p, sequence, column);
  const int64_t tokens = range.end - range.begin;
  if (tokens <= 0) {
    for (int64_t row = 0; row < rows; ++row) call.partial_max[at + row] = kMinusInfinity;
    return;
  }
  const int64_t position = range.position + range.begin;
  const int64_t tile = ValueTile(p.view.value_dim * int64_t{sizeof(Element<kType>)});
  const int64_t plane_bytes = PlaneBytes(p.view, kKeyTile, tile);
  const int64_t used_bytes = RoundUp(p.view.block_tokens, 64);
  float* scores = static_cast<float*>(
      scratch(Scratch::kWorker, (rows * call.score_stride + rows * call.acc_stride) * 4 +
                                    used_bytes + plane_bytes + 64));
  float* acc = scores + rows * call.score_stride;
  auto* used = reinterpret_cast<uint8_t*>(acc + rows * call.acc_stride);
  const Planes<kType> planes =
      PlanesOf<kType>(p, sequence, column, kv_head, kKeyTile, used + used_bytes);
  const bool is_packed = planes.keys.bases != nullptr;
  const bool has_prefetch = p.has_prefetch && !is_packed;

  // pass 1: scores
  const float* query =
      call.query + (sequence * all_rows + first_row) * call.query_stride;
  const DecodePlan<kType>& plan = *call.plan;
  const int64_t step = plan.num_score_passes == 1 && !is_packed ? tokens : kKeyTile;
  for (int64_t t = 0; t < tokens; t += step) {
    const int64_t end = Min(t + step, tokens);
    const Element<kType>* keys = planes.keys.Tokens(range.begin + t, range.begin + end);
    for (int i = 0; i < plan.num_score_passes; ++i) {
      const auto& pass = plan.score_passes[i];
      pass.score(keys, p.view.key_dim, end - t,
                 query + pass.row * call.query_stride, call.query_stride,
                 scores + pass.row * call.score_stride + t, call.score_stride,
                 has_prefetch && i == 0);
    }
  }

  // pass 2: weights, while the first values come in
  const Element<kType>* first_values =
      has_prefetch ? planes.values.Tokens(range.begin, range.begin + 1) : nullptr;
  const int64_t row_values =
      has_prefetch ? RoundUp(Min(tile, tokens) * p.view.value_dim / rows, kChunk) : 0;
  int64_t head = kv_head * group;
  int64_t query_number = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < row_values; i += kChunk) {
      PrefetchElements<kChunk>(first_values + row * row_values + i);
    }
    const int64_t end = Max(0, CausalEnd(p, range, query_number) - range.begin);
    float* row_scores = scores + row * call.score_stride;
    const ScoreRule rule = {p.scale, p.softcap, end,
                            MaskRow(p, sequence, head, query_number, position), p.mask_stride[3]};
    const float max = MakeScores(row_scores, tokens, rule);
    call.partial_max[at + row] = max;
    call.partial_sum[at + row] = MakeWeights<kType>(row_scores, tokens, max);
    if (++query_number == p.queries) {
      query_number = 0;
      ++head;
    }
  }
  if (p.mask != nullptr) {
    AnyRowAttends(p, sequence, kv_head * group, group, 0, p.queries, position, tokens, used);
  }

  // pass 3: weighted values, a tile of tokens at a time for all rows
  for (int64_t i = 0; i < rows * call.acc_stride; i += kLanes) Store(acc + i, VecF{});
  const int64_t weight_step = kUsesDot<kType> ? 2 : 1;  // weights per float of `scores`
  for (int64_t t = 0; t < tokens; t += tile) {
    const int64_t end = Min(t + tile, tokens);
    const Element<kType>* from = planes.values.Tokens(range.begin + t, range.begin + end);
    const Element<kType>* next = end < tokens ? from + tile * p.view.value_dim : next_keys;
    AddValueTile<kType>(plan, from, p.view.value_dim, end - t, scores + t / weight_step,
                        call.score_stride, p.mask == nullptr ? nullptr : used + t, acc,
                        call.acc_stride, has_prefetch ? next : nullptr);
  }

  // pass 4: back into the order of memory
  float* to = call.partial_acc + at * call.acc_stride;
  for (int64_t i = 0; i < rows * call.acc_stride; i += kChunk) {
    const VecPair ordered = InOrder<kType>({Load<VecF>(acc + i), Load<VecF>(acc + i + kLanes)});
    Store(to + i, ordered.first);
    Store(to + i + kLanes, ordered.second);
  }
}

// A unit is the block of one kv_head. Units are numbered as their keys lie in memory: the heads of
// a block one behind the other, then the next block. An item is a run of units.
template <DType kType>
void PartialItem(void* context, int64_t item) {
  const DecodeCall<kType>& call = *static_cast<const DecodeCall<kType>*>(context);
  const AttentionParams& p = *call.params;
  const int64_t kv_heads = p.view.kv_heads;
  const int64_t units = (call.column_end - call.column_begin) * kv_heads;
  const int64_t items = DivideUp(units, call.units_per_item);
  const int64_t sequence = item / items;
  const int64_t begin = item % items * call.units_per_item;
  const int64_t end = Min(begin + call.units_per_item, units);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Element<kType>* next_keys =
        unit + 1 == end ? nullptr
                        : KeyPlane<kType>(p, sequence, call.column_begin + (unit + 1) / kv_heads,
                                          (unit + 1) % kv_heads);
    BlockPartial<kType>(call, sequence, call.column_begin + unit / kv_heads, unit % kv_heads,
                        next_keys);
  }
}

constexpr int64_t kFoldRows = 4;  // rows per item of phase 2

template <DType kType>
void FoldItem(void* context, int64_t item) {
  const DecodeCall<kType>& call = *static_cast<const DecodeCall<kType>*>(context);
  const AttentionParams& p = *call.params;
  const int64_t all_rows = p.heads * p.queries;
  const int64_t total = p.batch * all_rows;
  const bool is_first_round = call.column_begin == 0;
  const bool is_last_round = call.column_end == p.view.num_columns;
  const int64_t value_dim = p.view.value_dim;
  for (int64_t index = item * kFoldRows; index < Min((item + 1) * kFoldRows, total); ++index) {
    const int64_t sequence = index / all_rows;
    const int64_t row = index % all_rows;
    float* acc = call.running_acc + index * call.acc_stride;
    float max, sum;
    if (!is_first_round) {
      max = call.running_max[index];
      sum = call.running_sum[index];
    } else {
      for (int64_t i = 0; i < call.acc_stride; i += kLanes) Store(acc + i, VecF{});
      max = kMinusInfinity;
      sum = 0.0f;
      if (p.state.acc != nullptr) {
        __builtin_memcpy(acc, p.state.acc + index * value_dim, value_dim * 4);
        max = p.state.max[index];
        sum = p.state.sum[index];
      }
    }
    for (int64_t column = call.column_begin; column < call.column_end; ++column) {
      const int64_t at =
          (sequence * call.round_columns + column - call.column_begin) * all_rows + row;
      JoinPartial(acc, max, sum, call.partial_acc + at * call.acc_stride, call.partial_max[at],
                  call.partial_sum[at], RoundUp(value_dim, kLanes));
    }
    call.running_max[index] = max;
    call.running_sum[index] = sum;
    if (!is_last_round) continue;
    if (p.state.acc != nullptr) {
      __builtin_memcpy(p.state.acc + index * value_dim, acc, value_dim * 4);
      p.state.max[index] = max;
      p.state.sum[index] = sum;
    }
    if (p.output.out != nullptr) {
      FinishOutput<kType>(p.output, index, sequence, row / p.queries, row % p.queries, acc, max,
                          sum, value_dim);
    }
  }
}

template <DType kType>
void Decode(const AttentionParams& p) {
  const BlockView& view = p.view;
  const int64_t all_rows = p.heads * p.queries;
  const int64_t total = p.batch * all_rows;
  const int64_t rows = p.heads / view.kv_heads * p.queries;
  const DecodePlan<kType> plan(rows, view.value_dim);
  DecodeCall<kType> call;
  call.params = &p;
  call.plan = &plan;
  call.rows = rows;
  call.query_stride = DivideUp(view.key_dim, kChunk) * kQueryWords<kType>;
  call.acc_stride = RoundUp(view.value_dim, kChunk);
  call.score_stride = RoundUp(view.block_tokens, kLanes) + kLanes;
  const int64_t column_floats = p.batch * all_rows * (call.acc_stride + 2);
  call.round_columns = Max(1, Min(view.num_columns, kPartialBytes / (column_floats * 4)));

  float* memory = static_cast<float*>(scratch(
      Scratch::kShared, 4 * (total * (call.query_stride + call.acc_stride + 2) + 4 * kLanes +
                             call.round_columns * column_floats)));
  call.query = memory;
  call.running_acc = call.query + total * call.query_stride;
  call.partial_acc = call.running_acc + total * call.acc_stride;
  call.partial_max = call.partial_acc + call.round_columns * total * call.acc_stride;
  call.partial_sum = call.partial_max + call.round_columns * total;
  call.running_max = call.partial_sum + call.round_columns * total;
  call.running_sum = call.running_max + total;
  PrepareQuery<kType>(call);

  const int64_t plane_bytes =
      view.block_tokens * (view.key_dim + view.value_dim) * int64_t{sizeof(Element<kType>)};
  const int64_t largest = Max(1, kItemBytes / plane_bytes);
  const int64_t tokens = Min(view.num_columns * view.block_tokens,
                             Max(0, p.kv_tokens - p.first_token));
  const int64_t bytes = p.batch * view.kv_heads * tokens * plane_bytes / view.block_tokens;
  // Waking a thread costs what reading some 100 KB costs.
  const int threads = static_cast<int>(Min(p.num_threads, 1 + bytes / (128 << 10)));

  call.column_begin = 0;
  do {
    call.column_end = Min(call.column_begin + call.round_columns, view.num_columns);
    const int64_t units = (call.column_end - call.column_begin) * view.kv_heads;
    call.units_per_item = Max(1, Min(largest, units / (4 * threads)));
    parallel_for(threads, p.batch * DivideUp(units, call.units_per_item), PartialItem<kType>,
                 &call);
    parallel_for(threads, DivideUp(total, kFoldRows), FoldItem<kType>, &call);
    call.column_begin = call.column_end;
  } while (call.column_begin < view.num_columns);
}

}  // namespace
}  // namespace HTC_ISA
}  // namespace hf_tiered_cache
