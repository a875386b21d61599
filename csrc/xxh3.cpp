#include "xxh3.h"

#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hf_tiered_cache {
namespace {

constexpr uint64_t kPrime32_1 = 0x9E3779B1U, kPrime32_2 = 0x85EBCA77U, kPrime32_3 = 0xC2B2AE3DU;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87ULL, kPrime64_2 = 0xC2B2AE3D27D4EB4FULL,
                   kPrime64_3 = 0x165667B19E3779F9ULL, kPrime64_4 = 0x85EBCA77C2B2AE63ULL,
                   kPrime64_5 = 0x27D4EB2F165667C5ULL;

constexpr std::size_t kStripeBytes = 64, kSecretBytes = 192, kStripesPerBlock = 16;

// The default secret of the specification.
alignas(64) constexpr unsigned char kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

constexpr const unsigned char* kScrambleSecret = kSecret + kSecretBytes - kStripeBytes;

// As a little-endian processor reads it.
inline uint64_t read64(const unsigned char* p) {
  uint64_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Mixes all stripes but the last into `acc`. Lane i takes the product of its own 32-bit halves and
// the plain value of its neighbour i ^ 1; after every 16 stripes the lanes are scrambled.
void accumulate_portable(uint64_t acc[8], const unsigned char* data, std::size_t num_stripes) {
  for (std::size_t n = 0; n < num_stripes; ++n) {
    const std::size_t in_block = n % kStripesPerBlock;
    for (int i = 0; i < 8; ++i) {
      const uint64_t value = read64(data + n * kStripeBytes + 8 * i);
      const uint64_t mixed = value ^ read64(kSecret + 8 * in_block + 8 * i);
      acc[i ^ 1] += value;
      acc[i] += (mixed & 0xFFFFFFFFU) * (mixed >> 32);
    }
    if (in_block == kStripesPerBlock - 1) {
      for (int i = 0; i < 8; ++i) {
        acc[i] = (acc[i] ^ (acc[i] >> 47) ^ read64(kScrambleSecret + 8 * i)) * kPrime32_1;
      }
    }
  }
}

#if defined(__x86_64__)
// The same, four lanes to a register.
__attribute__((target("avx2"))) inline __m256i load(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

__attribute__((target("avx2"))) inline __m256i mix(__m256i lane, const unsigned char* data,
                                                   const unsigned char* secret) {
  const __m256i value = load(data);
  const __m256i mixed = _mm256_xor_si256(value, load(secret));
  const __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
  return _mm256_add_epi64(lane, _mm256_add_epi64(product, _mm256_shuffle_epi32(value, 0x4E)));
}

__attribute__((target("avx2"))) inline __m256i scramble(__m256i lane, const unsigned char* secret) {
  const __m256i prime = _mm256_set1_epi64x(kPrime32_1);
  lane = _mm256_xor_si256(lane, _mm256_srli_epi64(lane, 47));
  lane = _mm256_xor_si256(lane, load(secret));
  const __m256i low = _mm256_mul_epu32(lane, prime);
  const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(lane, 32), prime);
  return _mm256_add_epi64(low, _mm256_slli_epi64(high, 32));
}

__attribute__((target("avx2"))) void accumulate_avx2(uint64_t acc[8], const unsigned char* data,
                                                     std::size_t num_stripes) {
  __m256i low = load(acc), high = load(acc + 4);
  while (num_stripes >= kStripesPerBlock) {
    for (std::size_t s = 0; s < kStripesPerBlock; ++s, data += kStripeBytes) {
      _mm_prefetch(reinterpret_cast<const char*>(data + 384), _MM_HINT_T0);
      low = mix(low, data, kSecret + 8 * s);
      high = mix(high, data + 32, kSecret + 8 * s + 32);
    }
    low = scramble(low, kScrambleSecret);
    high = scramble(high, kScrambleSecret + 32);
    num_stripes -= kStripesPerBlock;
  }
  for (std::size_t s = 0; s < num_stripes; ++s, data += kStripeBytes) {
    low = mix(low, data, kSecret + 8 * s);
    high = mix(high, data + 32, kSecret + 8 * s + 32);
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc), low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + 4), high);
}
#endif

void accumulate(uint64_t acc[8], const unsigned char* data, std::size_t num_bytes) {
  const std::size_t num_stripes = (num_bytes - 1) / kStripeBytes;
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  if (has_avx2) return accumulate_avx2(acc, data, num_stripes);
#endif
  accumulate_portable(acc, data, num_stripes);
}

uint64_t merge(const uint64_t acc[8], const unsigned char* secret, uint64_t start) {
  uint64_t h = start;
  for (int i = 0; i < 4; ++i) {
    const unsigned __int128 product =
        static_cast<unsigned __int128>(acc[2 * i] ^ read64(secret + 16 * i)) *
        (acc[2 * i + 1] ^ read64(secret + 16 * i + 8));
    h += static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  }
  h ^= h >> 37;
  h *= 0x165667919E3779F9ULL;
  return h ^ (h >> 32);
}

void write_big_endian(uint64_t v, unsigned char* out) {
  for (int i = 7; i >= 0; --i, v >>= 8) out[i] = static_cast<unsigned char>(v);
}

}  // namespace

void xxh3_128(const void* data, std::size_t num_bytes, unsigned char out[16]) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  uint64_t acc[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                     kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
  accumulate(acc, bytes, num_bytes);
  const unsigned char* last = bytes + num_bytes - kStripeBytes;
  const unsigned char* secret = kSecret + kSecretBytes - kStripeBytes - 7;
  for (int i = 0; i < 8; ++i) {
    const uint64_t value = read64(last + 8 * i), mixed = value ^ read64(secret + 8 * i);
    acc[i ^ 1] += value;
    acc[i] += (mixed & 0xFFFFFFFFU) * (mixed >> 32);
  }
  const uint64_t low = merge(acc, kSecret + 11, num_bytes * kPrime64_1);
  const uint64_t high =
      merge(acc, kSecret + kSecretBytes - kStripeBytes - 11, ~(num_bytes * kPrime64_2));
  write_big_endian(high, out);
  write_big_endian(low, out + 8);
}

}  // namespace hf_tiered_cache
