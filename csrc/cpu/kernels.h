// The entry points of one instruction set: what each isa_*.cpp includes after its three settings.
#pragma once

#include "decode.h"
#include "prefill.h"

namespace hf_tiered_cache {
namespace HTC_ISA {
namespace {

template <DType kType>
void AttendType(const AttentionParams& p) {
  // By shape alone, so that the same call always takes the same way.
  if (p.heads / p.view.kv_heads * p.queries <= kDecodeMaxRows) {
    Decode<kType>(p);
  } else {
    Prefill<kType>(p);
  }
}

void Attend(const AttentionParams& p) {
  if (p.batch * p.heads * p.queries == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return AttendType<DType::kFloat32>(p);
    case DType::kBFloat16:
      return AttendType<DType::kBFloat16>(p);
    case DType::kFloat16:
      return AttendType<DType::kFloat16>(p);
  }
}

template <DType kType>
void FinishItem(void* context, int64_t index) {
  const FinishParams& p = *static_cast<const FinishParams*>(context);
  const int64_t query = index % p.queries;
  const int64_t head = index / p.queries % p.heads;
  const int64_t sequence = index / p.queries / p.heads;
  FinishOutput<kType>(p.output, index, sequence, head, query, p.state.acc + index * p.value_dim,
                      p.state.max[index], p.state.sum[index], p.value_dim);
}

void Finish(const FinishParams& p) {
  const int64_t rows = p.batch * p.heads * p.queries;
  const int threads = rows * p.value_dim < (1 << 16) ? 1 : p.num_threads;
  auto* context = const_cast<FinishParams*>(&p);
  switch (p.dtype) {
    case DType::kFloat32:
      return parallel_for(threads, rows, FinishItem<DType::kFloat32>, context);
    case DType::kBFloat16:
      return parallel_for(threads, rows, FinishItem<DType::kBFloat16>, context);
    case DType::kFloat16:
      return parallel_for(threads, rows, FinishItem<DType::kFloat16>, context);
  }
}

struct ProbeCall {
  const AttentionParams* params;
  int64_t element_bytes;
  uint32_t result;
};

// Four loads at a time, all of the plane.
HTC_INLINE VecU ReadPlane(const uint8_t* plane, int64_t num_bytes) {
  VecU a = {}, b = {}, c = {}, d = {};
  constexpr int64_t kStep = 4 * HTC_VECTOR_BYTES;
  for (int64_t i = 0; i + kStep <= num_bytes; i += kStep) {
    a ^= Load<VecU>(plane + i);
    b ^= Load<VecU>(plane + i + HTC_VECTOR_BYTES);
    c ^= Load<VecU>(plane + i + 2 * HTC_VECTOR_BYTES);
    d ^= Load<VecU>(plane + i + 3 * HTC_VECTOR_BYTES);
  }
  return a ^ b ^ c ^ d;
}

void ProbeItem(void* context, int64_t item) {
  ProbeCall& call = *static_cast<ProbeCall*>(context);
  const AttentionParams& p = *call.params;
  const BlockView& view = p.view;
  const int64_t kv_head = item % view.kv_heads;
  const int64_t column = item / view.kv_heads % view.num_columns;
  const int64_t sequence = item / view.kv_heads / view.num_columns;
  const uint8_t* block = BlockStart(view, sequence, column);
  const int64_t key_bytes = view.block_tokens * view.key_dim * call.element_bytes;
  const int64_t value_bytes = view.block_tokens * view.value_dim * call.element_bytes;
  const VecU read = ReadPlane(block + kv_head * key_bytes, key_bytes) ^
                    ReadPlane(block + view.kv_heads * key_bytes + kv_head * value_bytes,
                              value_bytes);
  __atomic_fetch_xor(&call.result, read[0], __ATOMIC_RELAXED);
}

uint32_t ReadProbe(const AttentionParams& p) {
  ProbeCall call{&p, p.dtype == DType::kFloat32 ? 4 : 2, 0};
  parallel_for(p.num_threads, p.batch * p.view.num_columns * p.view.kv_heads, ProbeItem, &call);
  return call.result;
}

}  // namespace

#define HTC_STRING_OF(name) #name
#define HTC_STRING(name) HTC_STRING_OF(name)
extern const Kernels kKernels;
const Kernels kKernels = {HTC_STRING(HTC_ISA), Attend, Finish, ReadProbe,
                          PackBlock, UnpackBlock};

}  // namespace HTC_ISA
}  // namespace hf_tiered_cache
