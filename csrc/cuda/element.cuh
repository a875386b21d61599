// Elements of keys, values and outputs: 16-byte loads, widening to float, rounding back.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "../paged_attention.h"

namespace hf_tiered_cache {
namespace {

template <DType kType>
struct ElementOf {
  using Type = uint16_t;  // the bits of a bfloat16 or a float16
};
template <>
struct ElementOf<DType::kFloat32> {
  using Type = float;
};
template <DType kType>
using Element = typename ElementOf<kType>::Type;

template <DType kType>
__device__ __forceinline__ float Widen(Element<kType> element) {
  if constexpr (kType == DType::kFloat32) {
    return element;
  } else if constexpr (kType == DType::kBFloat16) {
    return __uint_as_float(static_cast<uint32_t>(element) << 16);
  } else {
    return __half2float(__ushort_as_half(element));
  }
}

// To the nearest, ties to even; NaN stays NaN.
template <DType kType>
__device__ __forceinline__ Element<kType> Narrow(float value) {
  if constexpr (kType == DType::kFloat32) {
    return value;
  } else if constexpr (kType == DType::kBFloat16) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  } else {
    return __half_as_ushort(__float2half_rn(value));
  }
}

// Consecutive elements that one thread takes of a row: 16 bytes of a 16-bit type.
constexpr int kPack = 8;

template <DType kType>
struct Pack {
  uint4 words[kPack * sizeof(Element<kType>) / sizeof(uint4)];
};

// Elements [first, first + kPack) of a row of `dim`, 0 behind its end. With kAligned, rows begin
// at 16 bytes and `dim` is a multiple of kPack. Read once, so not kept in the caches (`cs`).
template <DType kType, bool kAligned>
__device__ __forceinline__ Pack<kType> LoadPack(const Element<kType>* row, int first, int dim) {
  Pack<kType> pack = {};
  if constexpr (kAligned) {
    if (first < dim) {
      const auto* from = reinterpret_cast<const uint4*>(row + first);
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(pack) / sizeof(uint4)); ++i) {
        pack.words[i] = __ldcs(from + i);
      }
    }
  } else {
    auto* elements = reinterpret_cast<Element<kType>*>(pack.words);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      if (first + i < dim) elements[i] = row[first + i];
    }
  }
  return pack;
}

template <DType kType>
__device__ __forceinline__ void WidenPack(const Pack<kType>& pack, float (&to)[kPack]) {
  const auto* elements = reinterpret_cast<const Element<kType>*>(pack.words);
#pragma unroll
  for (int i = 0; i < kPack; ++i) to[i] = Widen<kType>(elements[i]);
}

}  // namespace
}  // namespace hf_tiered_cache
