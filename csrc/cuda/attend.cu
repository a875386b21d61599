// Attention over a table of blocks, for few queries: one partial per unit and row, then a left
// fold of the partials in block order. Right, if slower, for any number of queries.
//
// Partials are bounded: what does not fit is done in rounds, over queries and then over units,
// with the running state in between. A partial depends on its unit and its row alone, so neither
// rounds nor the splitting of a table over calls can change a bit.
#include "fold.h"
#include "launch.cuh"
#include "partial.cuh"
#include "tensor_partial.cuh"

namespace hf_tiered_cache {
namespace {

// Partials of one round; a decode step over 128K tokens with 32 heads of 128 needs 8.5 MiB. Tests
// set less, to see more rounds.
#if !defined(HTC_PARTIAL_BYTES)
#define HTC_PARTIAL_BYTES (64 << 20)
#endif
constexpr int64_t kPartialBytes = HTC_PARTIAL_BYTES;
// Units that a round should do for its queries before the fold is worth its launch.
constexpr int64_t kMinRoundUnits = 16;
constexpr int64_t kMaxHeadDim = 256;

// How a call is cut into rounds, and where the scratch memory goes.
struct Plan {
  int64_t units_per_block;
  int64_t units;
  int64_t queries_per_round;
  int64_t units_per_round;
  bool has_running;  // the state between the rounds of some queries is in scratch memory

  Plan(const AttentionParams& p, bool has_state) {
    const BlockView& view = p.view;
    int64_t kv_tokens = p.kv_tokens;
    if (p.causal) kv_tokens = Min(kv_tokens, p.query_start + p.queries);
    const int64_t tokens = Max(0, kv_tokens - p.first_token);
    const int64_t columns = Min(view.num_columns, DivideUp(tokens, view.block_tokens));
    units_per_block = DivideUp(view.block_tokens, kUnitTokens);
    units = columns * units_per_block;
    const int64_t per_query = p.batch * p.heads * RowBytes(p);
    const int64_t wanted = Max(1, Min(units, kMinRoundUnits));
    queries_per_round = Max(1, Min(p.queries, kPartialBytes / (per_query * wanted)));
    units_per_round = Max(1, Min(units, kPartialBytes / (per_query * queries_per_round)));
    has_running = !has_state && units_per_round < units;
  }

  static int64_t RowBytes(const AttentionParams& p) {
    return (p.view.value_dim + 2) * static_cast<int64_t>(sizeof(float));
  }

  int64_t RowsPerRound(const AttentionParams& p) const {
    return p.batch * p.heads * queries_per_round;
  }

  int64_t ScratchBytes(const AttentionParams& p) const {
    return RowsPerRound(p) * RowBytes(p) * (units_per_round + (has_running ? 1 : 0));
  }
};

// `rows` rows of a state in memory, behind each other; `memory` moves behind them.
RunningStateRows take_rows(float*& memory, int64_t rows, int64_t value_dim) {
  const RunningStateRows taken = {memory, memory + rows * value_dim,
                                  memory + rows * (value_dim + 1)};
  memory += rows * (value_dim + 2);
  return taken;
}

using Kernel = void (*)(AttentionParams, Round);

struct Variant {
  Kernel kernel;
  int rows;
  int threads;
  int shared_bytes;
};

template <DType kType, int kRows, int kLanes, bool kAligned>
Variant variant() {
  return {&PartialKernel<kType, kRows, kLanes, kAligned>, kRows, kThreads,
          static_cast<int>(sizeof(PartialMemory<kRows, kLanes>))};
}

template <DType kType, int kChunks, bool kIsExact>
Variant tensor_variant(int64_t rows) {
  if (rows > kHalfRows) {
    return {&TensorPartialKernel<kType, 2 * kHalfRows, kChunks, kIsExact>, 2 * kHalfRows,
            kTensorThreads, static_cast<int>(sizeof(TensorMemory<2 * kHalfRows, kChunks>))};
  }
  return {&TensorPartialKernel<kType, kHalfRows, kChunks, kIsExact>, kHalfRows, kTensorThreads,
          static_cast<int>(sizeof(TensorMemory<kHalfRows, kChunks>))};
}

bool is_aligned(const AttentionParams& p) {
  const BlockView& view = p.view;
  return view.key_dim % kPack == 0 && view.value_dim % kPack == 0 &&
         view.slot_bytes % sizeof(uint4) == 0 &&
         reinterpret_cast<uintptr_t>(view.blocks) % sizeof(uint4) == 0;
}

// The kernel for `rows` rows per kv_head. The bits do not depend on the number of rows.
template <DType kType>
Variant choose_variant(const AttentionParams& p, int64_t rows) {
  if (!is_aligned(p)) return variant<kType, 4, 32, false>();
  const int64_t dim = Max(p.view.key_dim, p.view.value_dim);
  if constexpr (kType == DType::kFloat32) {
    if (dim <= 8 * kPack) return variant<kType, 4, 8, true>();
    if (dim <= 16 * kPack) return variant<kType, 4, 16, true>();
    return variant<kType, 4, 32, true>();
  } else {
    if (p.view.key_dim == p.view.value_dim) {
      if (dim == kChunkDims) return tensor_variant<kType, 1, true>(rows);
      if (dim == 2 * kChunkDims) return tensor_variant<kType, 2, true>(rows);
      if (dim == 4 * kChunkDims) return tensor_variant<kType, 4, true>(rows);
    }
    if (dim <= 2 * kChunkDims) return tensor_variant<kType, 2, false>(rows);
    return tensor_variant<kType, 4, false>(rows);
  }
}

cudaError_t make_partials(void* stream, const AttentionParams& p, Round round) {
  const int64_t rows = static_cast<int64_t>(round.group) * round.queries;
  const Variant variant =
      with_dtype(p.dtype, [&](auto type) { return choose_variant<type.value>(p, rows); });
  round.row_tiles = static_cast<uint32_t>(DivideUp(rows, variant.rows));
  const dim3 grid(round.units * round.row_tiles, p.view.kv_heads, p.batch);
  return launch(stream, grid, variant.threads, variant.shared_bytes, variant.kernel, p, round);
}

// All units of the queries [first_query, first_query + queries).
CudaStatus attend_queries(void* stream, const AttentionParams& p, const Plan& plan,
                          int64_t first_query, int64_t queries, float* scratch) {
  const int64_t rows = p.batch * p.heads * queries;
  RoundRows running = {p.state, p.queries, first_query};
  if (plan.has_running) {
    // Behind the partials, which begin at 16 bytes: their rows are written in words of that size.
    float* behind = scratch + plan.units_per_round * rows * (p.view.value_dim + 2);
    running = {take_rows(behind, rows, p.view.value_dim), queries, 0};
  }
  int64_t unit = 0;
  do {
    Round round = {};
    round.first_unit = unit;
    round.units = Min(plan.units_per_round, plan.units - unit);
    while (int64_t{1} << round.block_shift < plan.units_per_block) ++round.block_shift;
    round.first_query = first_query;
    round.queries = static_cast<uint32_t>(queries);
    round.group = static_cast<uint32_t>(p.heads / p.view.kv_heads);
    float* memory = scratch;
    round.partials = take_rows(memory, rows * round.units, p.view.value_dim);
    if (round.units > 0) {
      const cudaError_t error = make_partials(stream, p, round);
      if (error != cudaSuccess) return status_of(error);
    }
    const bool is_first = unit == 0;
    unit += round.units;
    const bool is_last = unit == plan.units;

    FoldParams fold = {};
    fold.dtype = p.dtype;
    fold.batch = p.batch;
    fold.heads = p.heads;
    fold.queries = queries;
    fold.value_dim = p.view.value_dim;
    fold.num_partials = round.units;
    fold.partials = round.partials;
    if (!is_first || !plan.has_running) fold.from = running;
    if (!is_last || !plan.has_running) fold.to = running;
    if (is_last) {
      fold.output = p.output;
      fold.output_queries = p.queries;
      fold.output_first_query = first_query;
    }
    const CudaStatus status = fold_partials(stream, fold);
    if (status.code != 0) return status;
  } while (unit < plan.units);
  return {0, ""};
}

}  // namespace

int64_t htc_cuda_scratch_bytes(const AttentionParams* params, bool has_state) {
  if (params->batch * params->heads * params->queries == 0) return 0;
  return Plan(*params, has_state).ScratchBytes(*params);
}

CudaStatus htc_cuda_attend(CudaPlace place, const AttentionParams* params, void* scratch,
                           int64_t scratch_bytes) {
  const AttentionParams& p = *params;
  if (p.batch * p.heads * p.queries == 0) return {0, ""};
  if (Max(p.view.key_dim, p.view.value_dim) > kMaxHeadDim) {
    return {cudaErrorInvalidValue, "head_dim is greater than 256"};
  }
  const Plan plan(p, p.state.acc != nullptr);
  if (scratch_bytes < plan.ScratchBytes(p)) {
    return {cudaErrorInvalidValue, "the scratch memory is smaller than scratch_bytes"};
  }
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  for (int64_t first = 0; first < p.queries; first += plan.queries_per_round) {
    const CudaStatus status =
        attend_queries(place.stream, p, plan, first, Min(plan.queries_per_round, p.queries - first),
                       static_cast<float*>(scratch));
    if (status.code != 0) return status;
  }
  return {0, ""};
}

}  // namespace hf_tiered_cache
