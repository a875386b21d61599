// What the compiled core is asked to do: raw pointers, sizes, strides. Knows no Python and no
// torch. The meaning is hf_tiered_cache/kernels/reference.py; the shapes are described in
// hf_tiered_cache/kernels/ops.py and checked there.
//
// Strides are in elements unless the name says bytes. Everything here is read only, except the
// memory of RunningStateRows, OutputRows and the blocks in AppendParams.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hf_tiered_cache {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Blocks of one layer: [K then V][kv_heads][block_tokens][head_dim] at blocks + slot * slot_bytes.
// Where some may be packed, a table that is attended has ~slot for a block that is (packed_blocks.h).
struct BlockView {
  const uint8_t* blocks;
  int64_t slot_bytes;
  int64_t num_slots;
  int64_t kv_heads;
  int64_t block_tokens;
  int64_t key_dim;
  int64_t value_dim;
  const int32_t* table;  // [batch][table_stride], num_columns used
  int64_t table_stride;
  int64_t num_columns;
  bool may_be_packed;
};

// Unnormalised attention so far, all contiguous; null when the call is one shot.
struct RunningStateRows {
  float* acc;  // [batch, heads, queries, value_dim]
  float* max;  // [batch, heads, queries], -inf where nothing was attended
  float* sum;  // [batch, heads, queries]
};

// Where finished attention goes; out is null when the call only folds into the running state.
struct OutputRows {
  void* out;  // [batch, heads, queries, value_dim] of the call's dtype
  int64_t stride[4];
  float* lse;          // [batch, heads, queries] contiguous, natural log; or null
  const float* sinks;  // [heads] or null
};

struct AttentionParams {
  DType dtype;  // of query, blocks and out
  int num_threads;
  int64_t batch;
  int64_t heads;
  int64_t queries;
  const void* query;  // [batch, heads, queries, key_dim], last dimension contiguous
  int64_t query_stride[3];
  BlockView view;
  int64_t kv_tokens;    // positions from here on do not exist
  int64_t first_token;  // position of table column 0
  int64_t query_start;  // position of query 0
  bool causal;
  float scale;
  float softcap;           // scores become softcap * tanh(score / softcap); 0: they do not
  bool has_prefetch;       // prefetch blocks in software
  const int32_t* starts;  // [batch] or null: first attended position
  const uint8_t* mask;    // by absolute position, non-zero = attend; or null
  int64_t mask_stride[4];
  RunningStateRows state;
  OutputRows output;
};

struct FinishParams {
  DType dtype;  // of out
  int num_threads;
  int64_t batch;
  int64_t heads;
  int64_t queries;
  int64_t value_dim;
  RunningStateRows state;
  OutputRows output;
};

struct AppendParams {
  const uint8_t* keys;  // [batch, kv_heads, tokens, key_dim]
  const uint8_t* values;
  int64_t key_stride[4];
  int64_t value_stride[4];
  uint8_t* blocks;
  BlockView view;  // start_token counts from its column 0
  int64_t batch;
  int64_t tokens;
  int64_t element_bytes;
  int64_t start_token;
  int num_threads;
};

// A block of bfloat16 and its shape, for packed_blocks.h.
struct PackParams {
  int64_t kv_heads;
  int64_t block_tokens;
  int64_t key_dim;
  int64_t value_dim;
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  void (*attend)(const AttentionParams&);
  void (*finish)(const FinishParams&);
  // Reads every byte of the planes that `attend` would read, in the same pieces on the same
  // threads, and does nothing with them: the bandwidth the machine has to offer.
  uint32_t (*read_probe)(const AttentionParams&);
  // The same bytes on every instruction set. Packing says whether the block could be packed; if
  // not, what is at `packed` is undefined.
  bool (*pack)(const PackParams&, const uint8_t* raw, uint8_t* packed);
  void (*unpack)(const PackParams&, const uint8_t* packed, uint8_t* raw);
};

// One entry per known kernel, the preferred first; `reason` is null for those that can run here.
struct KernelChoice {
  const Kernels* kernels;
  const char* name;
  const char* reason;
};
int num_kernels();
KernelChoice kernel_choice(int number);

// Whether software prefetch pays on this processor.
bool wants_prefetch();

// Throws std::invalid_argument when a slot that would be read or written is outside the slab.
void check_slots(const AttentionParams& params);
void append_tokens(const AppendParams& params);

}  // namespace hf_tiered_cache
