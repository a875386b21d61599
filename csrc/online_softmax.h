// The online softmax (Milakov & Gimelshein 2018, arXiv 1805.02867; FlashAttention-2, 2307.08691):
// exponentials, the joining of two partials, and the finish. Included like cpu/vector.h, once per
// instruction set.
#pragma once

#include "cpu/vector.h"

namespace hf_tiered_cache {
namespace HTC_ISA {
namespace {

// exp(x) for x <= 0, within 1 ulp; 0 for -inf and wherever the result would round to 0 (without
// AVX-512: be subnormal). x = n ln 2 + r with |r| <= 0.35: n by the rounding of an addition, ln 2
// in two parts, Taylor to degree 7 (the rest is < 6e-9).
HTC_INLINE VecF Exp(VecF x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23
#if defined(__AVX512F__)
  constexpr float kSmallest = -200.0f;  // far enough for the scaling below to give 0
#else
  constexpr float kSmallest = -87.3f;
#endif
  const VecF clamped = Max(Broadcast(kSmallest), x);  // in this order NaN stays NaN
  const VecF shifted = clamped * kLog2E + kRounder;
  const VecF n = shifted - kRounder;
  VecF r = clamped - n * kLn2High;
  r = r - n * kLn2Low;
  VecF y = r * (1.0f / 5040) + (1.0f / 720);
  y = y * r + (1.0f / 120);
  y = y * r + (1.0f / 24);
  y = y * r + (1.0f / 6);
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
#if defined(__AVX512F__)
  return (VecF)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  const VecI exponent = ((VecI)shifted) << 23;  // the low bits of `shifted` are n
  const VecF result = (VecF)((VecI)y + exponent);
  return x < kSmallest ? VecF{} : result;
#endif
}

HTC_INLINE float Exp(float x) { return Exp(Broadcast(x))[0]; }

// cap * tanh(score / cap), within a few ulp: a series where 1 - exp would cancel.
HTC_INLINE VecF SoftCap(VecF score, float cap) {
  const VecF x = score / cap;
  const VecF magnitude = (VecF)((VecU)x & 0x7fffffffu);
  const VecF decay = Exp(-2.0f * magnitude);
  const VecF direct = (1.0f - decay) / (1.0f + decay);
  const VecF square = x * x;
  VecF series = square * (-1382.0f / 155925) + (62.0f / 2835);  // Taylor, for |x| < 0.35
  series = series * square + (-17.0f / 315);
  series = series * square + (2.0f / 15);
  series = series * square + (-1.0f / 3);
  series = series * square * magnitude + magnitude;
  const VecF tanh = magnitude < 0.35f ? series : direct;
  return (VecF)((VecU)tanh | ((VecU)x & 0x80000000u)) * cap;
}

// -1 in the lanes whose token (mask[0], mask[stride], ..) may be attended, for `count` tokens.
HTC_INLINE VecI MaskLanes(const uint8_t* mask, int64_t stride, int64_t count) {
  uint8_t bytes[kLanes] = {};
  const int64_t n = count < kLanes ? count : kLanes;
  if (stride == 1) {
    if (n == kLanes) {
      __builtin_memcpy(bytes, mask, kLanes);
    } else {
      for (int64_t i = 0; i < n; ++i) bytes[i] = mask[i];
    }
  } else {
    for (int64_t i = 0; i < n; ++i) bytes[i] = mask[i * stride];
  }
  return __builtin_convertvector(Load<QuarterVecU>(bytes), VecI) != 0;
}

// What makes a product of query and key the score of a token that one row may attend.
struct ScoreRule {
  float scale;
  float softcap;        // 0: none
  int64_t end;          // tokens from here on may not be attended
  const uint8_t* mask;  // of the row's tokens, or null
  int64_t mask_stride;
};

// Turn `count` products into scores, -inf where not attended; return the largest.
HTC_INLINE float MakeScores(float* scores, int64_t count, const ScoreRule& rule) {
  VecF most = Broadcast(kMinusInfinity);
  const VecI lanes = LaneNumbers();
  for (int64_t t = 0; t < count; t += kLanes) {
    VecF score = Load<VecF>(scores + t) * rule.scale;
    if (rule.softcap != 0.0f) score = SoftCap(score, rule.softcap);
    if (t + kLanes > rule.end) {
      score = lanes < static_cast<int32_t>(rule.end - t) ? score : Broadcast(kMinusInfinity);
    }
    if (rule.mask != nullptr) {
      const VecI attended =
          MaskLanes(rule.mask + t * rule.mask_stride, rule.mask_stride, count - t);
      score = attended ? score : Broadcast(kMinusInfinity);
    }
    Store(scores + t, score);
    most = Max(most, score);
  }
  return MaxLanes(most);
}

// Turn `count` scores into weights exp(score - max); return their sum. Where pairs of bfloat16 are
// multiplied, the weights are rounded, written as 16-bit words over the scores, and summed as
// rounded, so that numerator and denominator use the same weights.
template <DType kType>
HTC_INLINE float MakeWeights(float* scores, int64_t count, float max) {
  const float base = max == kMinusInfinity ? 0.0f : max;
  VecF sum = {};
  auto* words = reinterpret_cast<uint16_t*>(scores);
  for (int64_t t = 0; t < count; t += kLanes) {
    const VecF weight = Exp(Load<VecF>(scores + t) - base);
    if constexpr (kUsesDot<kType>) {
      const VecU rounded = RoundToBFloat16(weight);
      sum += (VecF)rounded;
      const VecU low = rounded >> 16;
      Store(words + t, __builtin_convertvector(low, HalfVecU));
    } else {
      sum += weight;
      Store(scores + t, weight);
    }
  }
  return SumLanes(sum);
}

// acc * keep + add * weight over `count` floats (rounded up to whole vectors). Its own function,
// so that it is compiled, and rounds, in one way.
__attribute__((noinline)) void JoinRow(float* acc, const float* add, float keep, float weight,
                                       int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Store(acc + i, Load<VecF>(acc + i) * keep + Load<VecF>(add + i) * weight);
  }
}

// Fold one block's partial of one row into the running row. acc and add are padded to whole
// vectors. A partial that attended nothing (max -inf) changes nothing.
HTC_INLINE void JoinPartial(float* acc, float& max, float& sum, const float* add, float add_max,
                            float add_sum, int64_t count) {
  if (add_max == kMinusInfinity) return;
  const float new_max = add_max > max ? add_max : max;
  const float keep = Exp(max - new_max);
  const float weight = Exp(add_max - new_max);
  JoinRow(acc, add, keep, weight, count);
  sum = __builtin_fmaf(sum, keep, add_sum * weight);
  max = new_max;
}

// Normalise one row into out (element stride `stride`) and return its log-sum-exp.
template <DType kType>
HTC_INLINE float FinishRow(const float* acc, float max, float sum, const float* sink,
                           int64_t value_dim, Element<kType>* out, int64_t stride) {
  float shrink = 1.0f;
  if (sink != nullptr) {
    const float new_max = *sink > max ? *sink : max;
    shrink = Exp(max - new_max);
    sum = sum * shrink + Exp(*sink - new_max);
    max = new_max;
  }
  if (sum == 0.0f) {
    for (int64_t i = 0; i < value_dim; ++i) out[i * stride] = Narrow<kType>(0.0f);
    return kMinusInfinity;
  }
  if (stride == 1) {
    for (int64_t i = 0; i < value_dim; ++i) out[i] = Narrow<kType>(acc[i] * shrink / sum);
  } else {
    for (int64_t i = 0; i < value_dim; ++i) out[i * stride] = Narrow<kType>(acc[i] * shrink / sum);
  }
  return max + __builtin_logf(sum);
}

}  // namespace
}  // namespace HTC_ISA
}  // namespace hf_tiered_cache
