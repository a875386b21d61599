// New tokens into their blocks: one warp per token and kv_head copies a row of keys and a row of
// values, in words as wide as the rows allow.
#include "block.cuh"
#include "launch.cuh"

namespace hf_tiered_cache {
namespace {

constexpr int kAppendThreads = 128;

// Rows of `dim` words; all counts are in words of the kernel.
struct NewRows {
  const uint8_t* from;
  int64_t dim;
  int64_t stride[4];
  int64_t plane_offset;  // from the block's start
};

struct AppendCall {
  NewRows keys;
  NewRows values;
  uint8_t* blocks;
  BlockView view;
  int64_t batch;
  int64_t tokens;
  int64_t start_token;
};

template <class Word>
__device__ void CopyRow(const NewRows& rows, Word* block, int64_t block_tokens, int64_t sequence,
                        int64_t kv_head, int64_t token, int64_t inside) {
  const Word* from = reinterpret_cast<const Word*>(rows.from) + sequence * rows.stride[0] +
                     kv_head * rows.stride[1] + token * rows.stride[2];
  Word* to = block + rows.plane_offset + (kv_head * block_tokens + inside) * rows.dim;
  for (int64_t i = threadIdx.x % kWarpLanes; i < rows.dim; i += kWarpLanes) {
    to[i] = from[i * rows.stride[3]];
  }
}

template <class Word>
__global__ void __launch_bounds__(kAppendThreads)
    AppendKernel(const __grid_constant__ AppendCall p) {
  const BlockView& view = p.view;
  const int64_t number =
      (int64_t{blockIdx.x} * kAppendThreads + threadIdx.x) / kWarpLanes;  // of the warp
  const int64_t kv_head = number % view.kv_heads;
  const int64_t token = number / view.kv_heads % p.tokens;
  const int64_t sequence = number / view.kv_heads / p.tokens;
  if (sequence >= p.batch) return;
  const int64_t at = p.start_token + token;
  const int64_t slot = view.table[sequence * view.table_stride + at / view.block_tokens];
  if (slot < 0 || slot >= view.num_slots) return;
  auto* block = reinterpret_cast<Word*>(p.blocks + slot * view.slot_bytes);
  const int64_t inside = at % view.block_tokens;
  CopyRow(p.keys, block, view.block_tokens, sequence, kv_head, token, inside);
  CopyRow(p.values, block, view.block_tokens, sequence, kv_head, token, inside);
}

// Whether rows of `dim` elements and everything between them are whole words.
bool is_whole(const uint8_t* from, const int64_t (&stride)[4], int64_t dim, int64_t element_bytes,
              int64_t word_bytes) {
  if (word_bytes == element_bytes) return true;
  if (stride[3] != 1 || dim * element_bytes % word_bytes != 0) return false;
  if (reinterpret_cast<uintptr_t>(from) % word_bytes != 0) return false;
  for (int i = 0; i < 3; ++i) {
    if (stride[i] * element_bytes % word_bytes != 0) return false;
  }
  return true;
}

bool is_whole(const AppendParams& p, int64_t word_bytes) {
  const BlockView& view = p.view;
  return is_whole(p.keys, p.key_stride, view.key_dim, p.element_bytes, word_bytes) &&
         is_whole(p.values, p.value_stride, view.value_dim, p.element_bytes, word_bytes) &&
         view.slot_bytes % word_bytes == 0 &&
         reinterpret_cast<uintptr_t>(p.blocks) % word_bytes == 0;
}

NewRows in_words(const uint8_t* from, const int64_t (&stride)[4], int64_t dim, int64_t plane_offset,
                 int64_t element_bytes, int64_t word_bytes) {
  const int64_t elements = word_bytes / element_bytes;  // of a word
  NewRows rows = {from, dim / elements, {}, plane_offset / elements};
  for (int i = 0; i < 3; ++i) rows.stride[i] = stride[i] / elements;
  rows.stride[3] = elements == 1 ? stride[3] : 1;
  return rows;
}

template <class Word>
CudaStatus append_words(void* stream, const AppendParams& p) {
  const BlockView& view = p.view;
  AppendCall call = {};
  call.keys = in_words(p.keys, p.key_stride, view.key_dim, 0, p.element_bytes, sizeof(Word));
  call.values =
      in_words(p.values, p.value_stride, view.value_dim,
               view.kv_heads * view.block_tokens * view.key_dim, p.element_bytes, sizeof(Word));
  call.blocks = p.blocks;
  call.view = view;
  call.batch = p.batch;
  call.tokens = p.tokens;
  call.start_token = p.start_token;
  const int64_t warps = p.batch * p.tokens * view.kv_heads;
  const dim3 grid(DivideUp(warps, kAppendThreads / kWarpLanes));
  return status_of(launch(stream, grid, kAppendThreads, 0, &AppendKernel<Word>, call));
}

}  // namespace

CudaStatus htc_cuda_append(CudaPlace place, const AppendParams* params) {
  const AppendParams& p = *params;
  if (p.batch * p.tokens == 0) return {0, ""};
  const DeviceGuard guard(place.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  if (is_whole(p, sizeof(uint4))) return append_words<uint4>(place.stream, p);
  if (p.element_bytes == 4) return append_words<uint32_t>(place.stream, p);
  if (p.element_bytes == 2) return append_words<uint16_t>(place.stream, p);
  return {cudaErrorInvalidValue, "elements are neither 2 nor 4 bytes"};
}

}  // namespace hf_tiered_cache
