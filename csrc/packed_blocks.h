// Blocks of bfloat16 in 12 bits a value, losslessly: where the parts of an encoded block lie. What
// it means is hf_tiered_cache/tiers/codecs/bf16_12bit.py.
//
// The lower byte of a bfloat16 (the last bit of its exponent, and its mantissa) is kept as it is. Of
// the upper byte, a sign and seven bits, four bits are kept: the sign, and how far the rest is below
// a base of its channel, from 0 to 7. Values further away are exceptions. Encoded, a plane (one
// head's keys or values, `values` = tokens x dim of them, channel = index % dim) is
//
//     lower bytes  [values]
//     codes        [values / 2]  sign << 3 | (base - upper); of 32 values 16 bytes: value i in the
//                                lower half of byte i, value 16 + i in the upper half
//     bases        [dim]
//     count        uint16        of exceptions, then
//     indices      uint16 [most] ascending; those that are not used are 0
//     words        uint16 [most] the values that stand at these indices
//
// with `values` rounded up to a multiple of 32 (by zeros), padded to 64 bytes. A block is its planes
// in the order of a raw one: the keys of every head, then the values.
#pragma once

#include <cstdint>

#include "paged_attention.h"

// Also inside of units that are compiled for some processors only: nothing here may be left to the
// linker, see cpu/vector.h.
#define HTC_PLAIN static inline __attribute__((always_inline))

namespace hf_tiered_cache {

constexpr int64_t kPackedGroup = 32;         // values whose codes are interleaved
constexpr int64_t kMostPackedValues = 65536;  // of a plane: an index is 16 bits
constexpr int64_t kMostPackedDim = 1024;
constexpr int kReach = 8;  // upper bytes that a base reaches

struct PackedPlane {
  int64_t codes;       // offsets from the plane's start; the lower bytes come first
  int64_t bases;
  int64_t exceptions;  // the count, then indices and words
  int64_t most;        // exceptions that there is room for
  int64_t num_bytes;
};

HTC_PLAIN PackedPlane packed_plane(int64_t tokens, int64_t dim) {
  const int64_t values = (tokens * dim + kPackedGroup - 1) / kPackedGroup * kPackedGroup;
  PackedPlane plane;
  plane.codes = values;
  plane.bases = values + values / 2;
  plane.exceptions = (plane.bases + dim + 1) / 2 * 2;
  plane.most = values < 512 ? 1 : values < 512 * 64 ? values / 512 : 64;
  plane.num_bytes = (plane.exceptions + 2 + 4 * plane.most + 63) / 64 * 64;
  return plane;
}

}  // namespace hf_tiered_cache
