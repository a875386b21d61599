// The online softmax (Milakov & Gimelshein 2018, arXiv 1805.02867; FlashAttention-2, 2307.08691):
// exponentials, the joining of two partials, and the finish. Included like cpu/vector.h, once per
// instruction set.
#pragma once

#include "cpu/vector.h"

namespace hf_tiered_cache {
namespace HTC_ISA {
namespace {

// exp(x) for x <= 0, within 1 ulp; 0 below -87.3 (where the result would be subnormal), so also
// for -inf. x = n ln 2 + r: n by the rounding of an addition, ln 2 in two parts, degree 7 in r.
HTC_INLINE VecF Exp(VecF x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23
  constexpr float kSmallest = -87.3f;
  const VecF clamped = x > kSmallest ? x : Broadcast(kSmallest);
  const VecF shifted = clamped * kLog2E + kRounder;
  const VecF n = shifted - kRounder;
  VecF r = clamped - n * kLn2High;
  r = r - n * kLn2Low;
  VecF y = r * (1.0f / 5040) + (1.0f / 720);  // Taylor: |r| <= 0.35, so the rest is < 6e-9
  y = y * r + (1.0f / 120);
  y = y * r + (1.0f / 24);
  y = y * r + (1.0f / 6);
  y = y * r + 0.5f;
  y = y * (r * r) + r;
  y = y + 1.0f;
  const VecI exponent = ((VecI)shifted) << 23;  // the low bits of `shifted` are n
  const VecF result = (VecF)((VecI)y + exponent);
  return x > kSmallest ? result : VecF{};
}

HTC_INLINE float Exp(float x) { return Exp(Broadcast(x))[0]; }

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
