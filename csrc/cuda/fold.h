// Folding partials into running states, one row at a time: how decode merges, how two states
// join, how attention is finished.
#pragma once

#include "cuda_api.h"

namespace hf_tiered_cache {

// The running states of [batch, heads, queries of a round], inside those of all queries.
struct RoundRows {
  RunningStateRows rows;
  int64_t all_queries;
  int64_t first_query;
};

struct FoldParams {
  DType dtype;  // of the output
  int64_t batch;
  int64_t heads;
  int64_t queries;  // of the round
  int64_t value_dim;
  int64_t num_partials;       // per row, folded in their order
  RunningStateRows partials;  // [num_partials][batch, heads, queries]; acc 0 where sum is 0
  RoundRows from;             // without rows: nothing was attended yet
  RoundRows to;               // without rows: not stored
  OutputRows output;          // without out: not finished
  int64_t output_queries;
  int64_t output_first_query;
};

CudaStatus fold_partials(void* stream, const FoldParams& params);

}  // namespace hf_tiered_cache
