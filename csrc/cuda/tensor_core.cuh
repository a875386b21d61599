// The tensor cores' instruction, and what brings operands of 16 bits into its order.
//
// mma.m16n8k16 gives [16 x 8] += [16 x 16] x [16 x 8]. Lane 4 g + t of a warp holds of
//   a: row g, columns 2t and 2t + 1;  row g + 8, the same;  both again 8 columns further right;
//   b: column g, rows 2t and 2t + 1;  the same 8 rows further down;
//   c: row g, columns 2t and 2t + 1;  row g + 8, the same.
#pragma once

#include "element.cuh"

namespace hf_tiered_cache {
namespace {

template <DType kType>
__device__ __forceinline__ void MultiplyAdd(float (&c)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
#if !defined(__CUDACC__)
  emulation::multiply_add(c, a, b, &Widen<kType>);
#else
  if constexpr (kType == DType::kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// Two elements in a word, the first one low.
template <DType kType>
__device__ __forceinline__ uint32_t NarrowPair(float first, float second) {
#if !defined(__CUDACC__)
  return Narrow<kType>(first) | static_cast<uint32_t>(Narrow<kType>(second)) << 16;
#else
  uint32_t pair;
  if constexpr (kType == DType::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
#endif
}

// Two floats as a pair of elements and a pair of what rounding took from them: together 16 bits and
// more, where one bfloat16 has 8.
template <DType kType>
__device__ __forceinline__ void SplitPair(float first, float second, uint32_t& pair,
                                          uint32_t& rest) {
  pair = NarrowPair<kType>(first, second);
  rest = NarrowPair<kType>(first - Widen<kType>(static_cast<uint16_t>(pair)),
                           second - Widen<kType>(static_cast<uint16_t>(pair >> 16)));
}

// Of two words of two elements each: the first elements, the second elements.
__device__ __forceinline__ uint32_t FirstOfEach(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x5410);
}
__device__ __forceinline__ uint32_t SecondOfEach(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x7632);
}

}  // namespace
}  // namespace hf_tiered_cache
