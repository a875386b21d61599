// New tokens into their blocks, and the check of slots. The same for every instruction set.
#include <cstring>
#include <stdexcept>
#include <string>

#include "../paged_attention.h"
#include "../thread_pool.h"

namespace hf_tiered_cache {
namespace {

// Tokens of one (sequence, kv_head) that one item copies.
constexpr int64_t kItemTokens = 64;
// Below this many bytes the calling thread copies alone: waking another costs more.
constexpr int64_t kAloneBytes = 256 << 10;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

[[noreturn]] void refuse_slot(const BlockView& view, int64_t sequence, int64_t column) {
  throw std::invalid_argument(
      "table [" + std::to_string(sequence) + ", " + std::to_string(column) + "]: got slot " +
      std::to_string(view.table[sequence * view.table_stride + column]) + ", expected 0 .. " +
      std::to_string(view.num_slots - 1));
}

void check_columns(const BlockView& view, int64_t batch, int64_t first, int64_t last,
                   bool may_be_packed) {
  for (int64_t sequence = 0; sequence < batch; ++sequence) {
    for (int64_t column = first; column < last; ++column) {
      int64_t slot = view.table[sequence * view.table_stride + column];
      if (slot < 0 && may_be_packed) slot = ~slot;
      if (slot < 0 || slot >= view.num_slots) refuse_slot(view, sequence, column);
    }
  }
}

// Copy one row of `dim` elements with element stride `stride` behind each other.
void copy_row(uint8_t* to, const uint8_t* from, int64_t dim, int64_t stride, int64_t bytes) {
  if (stride == 1) {
    std::memcpy(to, from, dim * bytes);
    return;
  }
  for (int64_t i = 0; i < dim; ++i) std::memcpy(to + i * bytes, from + i * stride * bytes, bytes);
}

void append_item(void* context, int64_t item) {
  const AppendParams& p = *static_cast<const AppendParams*>(context);
  const BlockView& view = p.view;
  const int64_t pieces = divide_up(p.tokens, kItemTokens);
  const int64_t piece = item % pieces;
  const int64_t kv_head = item / pieces % view.kv_heads;
  const int64_t sequence = item / pieces / view.kv_heads;
  const int64_t bytes = p.element_bytes;
  const int64_t end = piece * kItemTokens + kItemTokens;
  const uint8_t* keys =
      p.keys + (sequence * p.key_stride[0] + kv_head * p.key_stride[1]) * bytes;
  const uint8_t* values =
      p.values + (sequence * p.value_stride[0] + kv_head * p.value_stride[1]) * bytes;
  for (int64_t token = piece * kItemTokens; token < end && token < p.tokens; ++token) {
    const int64_t column = (p.start_token + token) / view.block_tokens;
    const int64_t row = kv_head * view.block_tokens + (p.start_token + token) % view.block_tokens;
    const int64_t slot = view.table[sequence * view.table_stride + column];
    uint8_t* block = p.blocks + slot * view.slot_bytes;
    uint8_t* value_plane = block + view.kv_heads * view.block_tokens * view.key_dim * bytes;
    copy_row(block + row * view.key_dim * bytes, keys + token * p.key_stride[2] * bytes,
             view.key_dim, p.key_stride[3], bytes);
    copy_row(value_plane + row * view.value_dim * bytes,
             values + token * p.value_stride[2] * bytes, view.value_dim, p.value_stride[3], bytes);
  }
}

}  // namespace

void check_slots(const AttentionParams& params) {
  check_columns(params.view, params.batch, 0, params.view.num_columns,
                params.view.may_be_packed && params.dtype == DType::kBFloat16);
}

void append_tokens(const AppendParams& params) {
  const BlockView& view = params.view;
  if (params.tokens == 0) return;
  check_columns(view, params.batch, params.start_token / view.block_tokens,
                divide_up(params.start_token + params.tokens, view.block_tokens), false);
  const int64_t rows = params.batch * view.kv_heads;
  const int64_t bytes = rows * params.tokens * (view.key_dim + view.value_dim) *
                        params.element_bytes;
  parallel_for(bytes < kAloneBytes ? 1 : params.num_threads,
               rows * divide_up(params.tokens, kItemTokens), append_item,
               const_cast<AppendParams*>(&params));
}

}  // namespace hf_tiered_cache
