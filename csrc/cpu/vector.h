// Vectors of one instruction set, written once for all widths with the compilers' vector
// extensions; intrinsics only where an instruction has no other name.
//
// Included by one translation unit per instruction set, which defines HTC_ISA (a namespace),
// HTC_VECTOR_BYTES and HTC_BF16_DOT. Everything lives in unnamed namespaces, without static
// initialisers and without std:: templates: the linker must never keep, for everyone, a copy that
// was compiled for instructions which not everyone has.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../paged_attention.h"

#define HTC_INLINE inline __attribute__((always_inline))
#define HTC_UNROLL _Pragma("GCC unroll 32")

namespace hf_tiered_cache {
namespace HTC_ISA {
namespace {

constexpr int kLanes = HTC_VECTOR_BYTES / 4;
constexpr int kChunk = 2 * kLanes;  // elements of a row that are loaded and multiplied together

typedef float VecF __attribute__((vector_size(HTC_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(HTC_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(HTC_VECTOR_BYTES)));
typedef uint16_t HalfVecU __attribute__((vector_size(HTC_VECTOR_BYTES / 2)));
typedef uint8_t QuarterVecU __attribute__((vector_size(HTC_VECTOR_BYTES / 4)));

struct VecPair {
  VecF first, second;
};

template <class Vec>
HTC_INLINE Vec Load(const void* from) {
  Vec value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

// Load once and keep: without this the compiler folds the load into every use.
HTC_INLINE VecU LoadOnce(const void* from) {
  VecU value = Load<VecU>(from);
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#endif
  return value;
}

template <class Vec>
HTC_INLINE void Store(void* to, Vec value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

HTC_INLINE VecF Broadcast(float value) { return value - VecF{}; }
HTC_INLINE VecF Max(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);  // the compiler would compare and blend
#else
  return a > b ? a : b;
#endif
}

HTC_INLINE VecI LaneNumbers() {
  VecI lanes;
  HTC_UNROLL for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

constexpr float kMinusInfinity = -__builtin_inff();

// ---- shuffles -----------------------------------------------------------------------------------
// Low<s>(a, b): in every run of 2s lanes, the first s lanes of a, then the first s lanes of b.
// High<s>(a, b): the same with the last s lanes. With s = lanes/2, .., 1 they transpose a square,
// and added together they sum the lanes of many vectors at once.

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HTC_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef HTC_SHUFFLE  // GCC before 12
#define HTC_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (VecI){__VA_ARGS__})
#endif

#if HTC_VECTOR_BYTES == 64
template <int kRun, class Vec>
HTC_INLINE Vec Low(Vec a, Vec b) {
  if constexpr (kRun == 8) {
    return HTC_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  } else if constexpr (kRun == 4) {
    return HTC_SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  } else if constexpr (kRun == 2) {
    return HTC_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  } else {
    return HTC_SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
  }
}
template <int kRun, class Vec>
HTC_INLINE Vec High(Vec a, Vec b) {
  if constexpr (kRun == 8) {
    return HTC_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  } else if constexpr (kRun == 4) {
    return HTC_SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  } else if constexpr (kRun == 2) {
    return HTC_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  } else {
    return HTC_SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
}
template <class Vec>
HTC_INLINE Vec ZipFirst(Vec a, Vec b) {  // a0 b0 a1 b1 .. of the first halves
  return HTC_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
template <class Vec>
HTC_INLINE Vec ZipSecond(Vec a, Vec b) {
  return HTC_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif HTC_VECTOR_BYTES == 32
template <int kRun, class Vec>
HTC_INLINE Vec Low(Vec a, Vec b) {
  if constexpr (kRun == 4) {
    return HTC_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
  } else if constexpr (kRun == 2) {
    return HTC_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
  } else {
    return HTC_SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
  }
}
template <int kRun, class Vec>
HTC_INLINE Vec High(Vec a, Vec b) {
  if constexpr (kRun == 4) {
    return HTC_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  } else if constexpr (kRun == 2) {
    return HTC_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  } else {
    return HTC_SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
}
template <class Vec>
HTC_INLINE Vec ZipFirst(Vec a, Vec b) {
  return HTC_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
template <class Vec>
HTC_INLINE Vec ZipSecond(Vec a, Vec b) {
  return HTC_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#else
template <int kRun, class Vec>
HTC_INLINE Vec Low(Vec a, Vec b) {
  if constexpr (kRun == 2) {
    return HTC_SHUFFLE(a, b, 0, 1, 4, 5);
  } else {
    return HTC_SHUFFLE(a, b, 0, 4, 2, 6);
  }
}
template <int kRun, class Vec>
HTC_INLINE Vec High(Vec a, Vec b) {
  if constexpr (kRun == 2) {
    return HTC_SHUFFLE(a, b, 2, 3, 6, 7);
  } else {
    return HTC_SHUFFLE(a, b, 1, 5, 3, 7);
  }
}
template <class Vec>
HTC_INLINE Vec ZipFirst(Vec a, Vec b) {
  return HTC_SHUFFLE(a, b, 0, 4, 1, 5);
}
template <class Vec>
HTC_INLINE Vec ZipSecond(Vec a, Vec b) {
  return HTC_SHUFFLE(a, b, 2, 6, 3, 7);
}
#endif

template <int kCount>
HTC_INLINE void SumStep(VecF* v) {
  HTC_UNROLL for (int i = 0; i < kCount; ++i) {
    v[i] = Low<kCount>(v[i], v[i + kCount]) + High<kCount>(v[i], v[i + kCount]);
  }
  if constexpr (kCount > 1) SumStep<kCount / 2>(v);
}

// Lane i of the result is the sum of the lanes of v[i]; v is overwritten.
HTC_INLINE VecF SumEach(VecF (&v)[kLanes]) {
  SumStep<kLanes / 2>(v);
  return v[0];
}

HTC_INLINE float SumLanes(VecF v) {
  float sum = 0.0f;
  HTC_UNROLL for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

HTC_INLINE float MaxLanes(VecF v) {
  float most = v[0];
  HTC_UNROLL for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

template <int kRun>
HTC_INLINE void TransposeStep(VecU* v) {
  HTC_UNROLL for (int i = 0; i < kLanes; ++i) {
    if ((i & kRun) == 0) {
      const VecU low = Low<kRun>(v[i], v[i + kRun]);
      v[i + kRun] = High<kRun>(v[i], v[i + kRun]);
      v[i] = low;
    }
  }
  if constexpr (kRun > 1) TransposeStep<kRun / 2>(v);
}

HTC_INLINE void Transpose(VecU (&v)[kLanes]) { TransposeStep<kLanes / 2>(v); }

// ---- elements in memory -------------------------------------------------------------------------

template <DType kType>
struct Stored {
  using Element = uint16_t;
};
template <>
struct Stored<DType::kFloat32> {
  using Element = float;
};
template <DType kType>
using Element = typename Stored<kType>::Element;

// 16-bit floats in the low halves of the lanes. Exact for every value, infinities and NaN too.
HTC_INLINE VecF HalfToFloat(VecU half) {
  const VecU magnitude = (half & 0x7fffu) << 13;
  const VecF scaled = (VecF)magnitude * 0x1p112f;  // moves the exponent bias, subnormals included
  const VecU special = (VecU)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return (VecF)((VecU)scaled | special | ((half & 0x8000u) << 16));
}

// The first count < kChunk elements as raw words, then zeros. Nothing behind them is read.
HTC_INLINE VecU LoadWordsTail(const uint16_t* from, int count) {
#if defined(__AVX512BW__)
  return (VecU)_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), from);
#else
  uint16_t copy[kChunk] = {};
  for (int i = 0; i < count; ++i) copy[i] = from[i];
  return Load<VecU>(copy);
#endif
}
HTC_INLINE VecF LoadFloatsTail(const float* from, int count) {  // count may be <= 0
#if defined(__AVX512F__)
  const unsigned mask = count >= 16 ? 0xffffu : count <= 0 ? 0u : (1u << count) - 1;
  return (VecF)_mm512_maskz_loadu_ps((__mmask16)mask, from);
#else
  float copy[kLanes] = {};
  for (int i = 0; i < count && i < kLanes; ++i) copy[i] = from[i];
  return Load<VecF>(copy);
#endif
}

// A chunk of kChunk elements widened to float32 comes as two vectors in an order of its own:
// bfloat16 as (even elements, odd elements), because then widening is one instruction per vector;
// float32, and float16 where the processor converts, as (first half, second half).
#if defined(__AVX512F__) || defined(__F16C__)
constexpr bool kHalfIsZipped = false;
#else
constexpr bool kHalfIsZipped = true;
#endif
template <DType kType>
constexpr bool kIsZipped =
    kType == DType::kBFloat16 || (kType == DType::kFloat16 && kHalfIsZipped);

template <DType kType>
HTC_INLINE VecPair WidenWords(VecU words) {
  if constexpr (kType == DType::kBFloat16) {
    return {(VecF)(words << 16), (VecF)(words & 0xffff0000u)};
  } else {
#if defined(__AVX512F__)
    return {(VecF)_mm512_cvtph_ps(_mm512_castsi512_si256((__m512i)words)),
            (VecF)_mm512_cvtph_ps(_mm512_extracti64x4_epi64((__m512i)words, 1))};
#elif defined(__F16C__)
    return {(VecF)_mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)words)),
            (VecF)_mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)words, 1))};
#else
    return {HalfToFloat(words & 0xffffu), HalfToFloat(words >> 16)};
#endif
  }
}

template <DType kType>
HTC_INLINE VecPair LoadChunk(const Element<kType>* from) {
  if constexpr (kType == DType::kFloat32) {
    return {Load<VecF>(from), Load<VecF>(from + kLanes)};
  } else {
    return WidenWords<kType>(LoadOnce(from));
  }
}

template <DType kType>
HTC_INLINE VecPair LoadChunkTail(const Element<kType>* from, int count) {
  if constexpr (kType == DType::kFloat32) {
    const int second = count - kLanes;
    return {LoadFloatsTail(from, count),
            second > 0 ? LoadFloatsTail(from + kLanes, second) : VecF{}};
  } else {
    return WidenWords<kType>(LoadWordsTail(from, count));
  }
}

// Back to the order of the elements in memory.
template <DType kType>
HTC_INLINE VecPair InOrder(VecPair chunk) {
  if constexpr (kIsZipped<kType>) {
    return {ZipFirst(chunk.first, chunk.second), ZipSecond(chunk.first, chunk.second)};
  } else {
    return chunk;
  }
}

constexpr int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Widen `count` elements, in order, to RoundUp(count, kChunk) floats; the rest is 0.
template <DType kType>
HTC_INLINE void WidenRow(const Element<kType>* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kChunk <= count; i += kChunk) {
    const VecPair chunk = InOrder<kType>(LoadChunk<kType>(from + i));
    Store(to + i, chunk.first);
    Store(to + i + kLanes, chunk.second);
  }
  if (i < count) {
    const VecPair chunk =
        InOrder<kType>(LoadChunkTail<kType>(from + i, static_cast<int>(count - i)));
    Store(to + i, chunk.first);
    Store(to + i + kLanes, chunk.second);
  }
}

// ---- narrowing, round to nearest even -----------------------------------------------------------

template <DType kType>
HTC_INLINE Element<kType> Narrow(float value) {
  if constexpr (kType == DType::kFloat32) {
    return value;
  } else {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if constexpr (kType == DType::kBFloat16) {
      if (magnitude > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // NaN
      return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    } else {
      const uint32_t sign = (bits >> 16) & 0x8000u;
      if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
      if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // infinity
      if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
        float shifted;
        __builtin_memcpy(&shifted, &magnitude, 4);
        shifted += 0.5f;
        uint32_t rounded;
        __builtin_memcpy(&rounded, &shifted, 4);
        return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
      }
      const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
      return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
    }
  }
}

// Float32 to bfloat16 in the upper halves of the lanes (the lower halves 0); finite values only.
HTC_INLINE VecU RoundToBFloat16(VecF value) {
  const VecU bits = (VecU)value;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
}

// ---- bfloat16 pairs -----------------------------------------------------------------------------

// Whether scores and sums of this dtype are made by multiplying pairs of bfloat16.
template <DType kType>
constexpr bool kUsesDot = HTC_BF16_DOT && kType == DType::kBFloat16;

#if HTC_BF16_DOT
// acc + a.odd * b.odd + a.even * b.even in float32: VDPBF16PS.
HTC_INLINE VecF DotPairs(VecF acc, VecU a, VecU b) {
#if defined(__AVX512BF16__)
  return (VecF)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  // The same sums by multiply-add: products of two bfloat16 are exact in float32. The instruction
  // also takes subnormal inputs and results for 0, which this does not.
  acc += (VecF)(a & 0xffff0000u) * (VecF)(b & 0xffff0000u);
  acc += (VecF)(a << 16) * (VecF)(b << 16);
  return acc;
#endif
}
#else
HTC_INLINE VecF DotPairs(VecF acc, VecU, VecU) { return acc; }
#endif

}  // namespace
}  // namespace HTC_ISA
}  // namespace hf_tiered_cache
