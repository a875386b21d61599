// Where things lie and who may attend what: shared by the decode and the prefill kernel. Included
// once per instruction set, see vector.h.
#pragma once

#include "../online_softmax.h"
#include "../thread_pool.h"
#include "vector.h"

namespace hf_tiered_cache {
namespace HTC_ISA {
namespace {

HTC_INLINE int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
HTC_INLINE int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
HTC_INLINE int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A complemented slot in the table holds a packed block, see packing.h.
HTC_INLINE bool IsPacked(const BlockView& view, int64_t sequence, int64_t column) {
  return view.table[sequence * view.table_stride + column] < 0;
}

HTC_INLINE const uint8_t* BlockStart(const BlockView& view, int64_t sequence, int64_t column) {
  const int64_t slot = view.table[sequence * view.table_stride + column];
  return view.blocks + (slot < 0 ? ~slot : slot) * view.slot_bytes;
}

// Where the keys of a head lie in a raw block.
template <DType kType>
HTC_INLINE const Element<kType>* KeyPlane(const AttentionParams& p, int64_t sequence,
                                          int64_t column, int64_t kv_head) {
  const BlockView& view = p.view;
  const auto* block = reinterpret_cast<const Element<kType>*>(BlockStart(view, sequence, column));
  return block + kv_head * view.block_tokens * view.key_dim;
}

template <DType kType>
HTC_INLINE const Element<kType>* ValuePlane(const AttentionParams& p, int64_t sequence,
                                            int64_t column, int64_t kv_head) {
  const BlockView& view = p.view;
  return KeyPlane<kType>(p, sequence, column, 0) +
         view.block_tokens * (view.kv_heads * view.key_dim + kv_head * view.value_dim);
}

// Tokens [begin, end) of a block, counted from its first, that some query may attend. Nothing
// outside is ever read: the rest of the block may hold anything.
struct TokenRange {
  int64_t position;  // of the block's first token
  int64_t begin;
  int64_t end;
};

HTC_INLINE TokenRange AttendedTokens(const AttentionParams& p, int64_t sequence, int64_t column) {
  TokenRange range;
  range.position = p.first_token + column * p.view.block_tokens;
  range.begin = 0;
  range.end = Min(p.view.block_tokens, p.kv_tokens - range.position);
  if (p.starts != nullptr) range.begin = Max(0, p.starts[sequence] - range.position);
  if (p.causal) range.end = Min(range.end, p.query_start + p.queries - range.position);
  return range;
}

// Tokens of the block before this one may be attended by query `query`, as far as causality goes.
HTC_INLINE int64_t CausalEnd(const AttentionParams& p, const TokenRange& range, int64_t query) {
  return p.causal ? Min(range.end, p.query_start + query + 1 - range.position) : range.end;
}

// The mask of one row from absolute position `position` on, or null.
HTC_INLINE const uint8_t* MaskRow(const AttentionParams& p, int64_t sequence, int64_t head,
                                  int64_t query, int64_t position) {
  if (p.mask == nullptr) return nullptr;
  return p.mask + sequence * p.mask_stride[0] + head * p.mask_stride[1] +
         query * p.mask_stride[2] + position * p.mask_stride[3];
}

// used[t] = 1 where the mask lets some row of (heads [head, head + num_heads), queries
// [query, query_end)) attend token t of [0, count) behind `position`.
HTC_INLINE void AnyRowAttends(const AttentionParams& p, int64_t sequence, int64_t head,
                              int64_t num_heads, int64_t query, int64_t query_end,
                              int64_t position, int64_t count, uint8_t* used) {
  for (int64_t t = 0; t < count; ++t) used[t] = 0;
  const int64_t head_end = p.mask_stride[1] == 0 ? head + 1 : head + num_heads;
  if (p.mask_stride[2] == 0) query_end = query + 1;
  for (int64_t h = head; h < head_end; ++h) {
    for (int64_t q = query; q < query_end; ++q) {
      const uint8_t* row = MaskRow(p, sequence, h, q, position);
      if (p.mask_stride[3] == 1) {
        for (int64_t t = 0; t < count; ++t) used[t] |= row[t];
      } else {
        for (int64_t t = 0; t < count; ++t) used[t] |= row[t * p.mask_stride[3]];
      }
    }
  }
}

template <DType kType>
HTC_INLINE const Element<kType>* QueryRow(const AttentionParams& p, int64_t sequence, int64_t head,
                                          int64_t query) {
  return static_cast<const Element<kType>*>(p.query) + sequence * p.query_stride[0] +
         head * p.query_stride[1] + query * p.query_stride[2];
}

// Normalise the row of one query into the output; `index` counts [batch, heads, queries].
template <DType kType>
HTC_INLINE void FinishOutput(const OutputRows& output, int64_t index, int64_t sequence,
                             int64_t head, int64_t query, const float* acc, float max, float sum,
                             int64_t value_dim) {
  auto* out = static_cast<Element<kType>*>(output.out) + sequence * output.stride[0] +
              head * output.stride[1] + query * output.stride[2];
  const float* sink = output.sinks == nullptr ? nullptr : output.sinks + head;
  const float lse = FinishRow<kType>(acc, max, sum, sink, value_dim, out, output.stride[3]);
  if (output.lse != nullptr) output.lse[index] = lse;
}

}  // namespace
}  // namespace HTC_ISA
}  // namespace hf_tiered_cache
