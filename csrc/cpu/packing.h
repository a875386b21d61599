// Packing and unpacking of bfloat16 blocks, see packed_blocks.h. Included once per instruction set,
// see vector.h.
//
// 16 values at a time (8 where vectors have 16 bytes); the same bytes come out whatever it is.
#pragma once

#include "../packed_blocks.h"
#include "geometry.h"

namespace hf_tiered_cache {
namespace HTC_ISA {
namespace {

constexpr int64_t kWords = HTC_VECTOR_BYTES < 32 ? 8 : 16;
typedef uint16_t Words __attribute__((vector_size(2 * kWords)));
typedef uint8_t Bytes __attribute__((vector_size(kWords)));
constexpr int64_t kHalfGroup = kPackedGroup / 2;

HTC_INLINE Words Widen(Bytes bytes) { return __builtin_convertvector(bytes, Words); }
HTC_INLINE Bytes ToBytes(Words words) { return __builtin_convertvector(words, Bytes); }
HTC_INLINE Words Smaller(Words a, Words b) { return a < b ? a : b; }
HTC_INLINE Words Larger(Words a, Words b) { return a > b ? a : b; }

HTC_INLINE bool HasAny(Words words) {
  uint64_t parts[kWords / 4];
  Store(parts, words);
  uint64_t any = 0;
  HTC_UNROLL for (int64_t i = 0; i < kWords / 4; ++i) any |= parts[i];
  return any != 0;
}

HTC_INLINE uint16_t LoadWord(const uint8_t* from) {
  uint16_t word;
  __builtin_memcpy(&word, from, 2);
  return word;
}

// ---- unpacking ----------------------------------------------------------------------------------

// Room for the bases of a plane's channels, in bytes, and for `tokens` unpacked tokens, in words.
HTC_INLINE int64_t BaseBytes(int64_t dim) { return RoundUp(dim + kPackedGroup, 64); }
HTC_INLINE int64_t UnpackedWords(int64_t tokens, int64_t dim) {
  return RoundUp(tokens * dim + 2 * kPackedGroup, 32);
}

// The bases, and once more from the first: 32 of them can be read from any channel on.
HTC_INLINE void RepeatBases(const uint8_t* bases, int64_t dim, uint8_t* repeated) {
  __builtin_memcpy(repeated, bases, dim);
  for (int64_t i = dim; i < dim + kPackedGroup; ++i) repeated[i] = repeated[i - dim];
}

HTC_INLINE void UnpackGroup(const uint8_t* lower, const uint8_t* codes, const uint8_t* bases,
                            uint16_t* to) {
#if defined(__AVX2__)
  // What is to be added to the base, by code: 0 to -7, the same and the sign.
  const __m256i steps = _mm256_setr_epi8(
      0, -1, -2, -3, -4, -5, -6, -7, -128, 127, 126, 125, 124, 123, 122, 121,  //
      0, -1, -2, -3, -4, -5, -6, -7, -128, 127, 126, 125, 124, 123, 122, 121);
  const __m256i twice = _mm256_broadcastsi128_si256(Load<__m128i>(codes));
  const __m256i halves =
      _mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
  const __m256i code = _mm256_and_si256(halves, _mm256_set1_epi8(15));
  const __m256i upper =
      _mm256_add_epi8(Load<__m256i>(bases), _mm256_shuffle_epi8(steps, code));
  const __m256i low = Load<__m256i>(lower);
  const __m256i even = _mm256_unpacklo_epi8(low, upper);  // values 0 .. 7 and 16 .. 23
  const __m256i odd = _mm256_unpackhi_epi8(low, upper);   // values 8 .. 15 and 24 .. 31
  Store(to, _mm256_permute2x128_si256(even, odd, 0x20));
  Store(to + kHalfGroup, _mm256_permute2x128_si256(even, odd, 0x31));
#else
  HTC_UNROLL for (int64_t i = 0; i < kPackedGroup; i += kWords) {
    const Words both = Widen(Load<Bytes>(codes + i % kHalfGroup));
    const Words code = i < kHalfGroup ? both : both >> 4;
    const Words upper = (Widen(Load<Bytes>(bases + i)) - (code & 7)) | ((code & 8) << 4);
    Store(to + i, Widen(Load<Bytes>(lower + i)) | (upper << 8));
  }
#endif
}

// The tokens [begin, end) of an encoded plane, which has `tokens`, unpacked into `room`; where the
// first of them is there.
HTC_INLINE const uint16_t* UnpackTokens(const uint8_t* plane, int64_t tokens, int64_t dim,
                                        int64_t begin, int64_t end, const uint8_t* bases,
                                        uint16_t* room) {
  const PackedPlane parts = packed_plane(tokens, dim);
  const int64_t first = begin * dim / kPackedGroup * kPackedGroup;
  const int64_t last = end * dim;
  int64_t channel = first % dim;
  for (int64_t i = first; i < last; i += kPackedGroup) {
    UnpackGroup(plane + i, plane + parts.codes + i / 2, bases + channel, room + (i - first));
    channel += kPackedGroup;
    while (channel >= dim) channel -= dim;
  }
  const uint8_t* exceptions = plane + parts.exceptions;
  const int64_t count = Min(LoadWord(exceptions), parts.most);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = LoadWord(exceptions + 2 + 2 * i);
    if (index >= first && index < last) {
      room[index - first] = LoadWord(exceptions + 2 + 2 * (parts.most + i));
    }
  }
  return room + (begin * dim - first);
}

// One plane of a block, as the kernels read it.
template <DType kType>
struct Plane {
  const uint8_t* start;
  int64_t tokens;
  int64_t dim;
  const uint8_t* bases;  // null: the plane is raw
  uint16_t* room;        // for as many tokens as are asked for at once

  // The tokens [begin, end), until the next ones are asked for.
  HTC_INLINE const Element<kType>* Tokens(int64_t begin, int64_t end) const {
    if constexpr (kType == DType::kBFloat16) {
      if (bases != nullptr) return UnpackTokens(start, tokens, dim, begin, end, bases, room);
    }
    return reinterpret_cast<const Element<kType>*>(start) + begin * dim;
  }
};

// Memory, in bytes, for the two planes of a block of which so many tokens are read at once.
HTC_INLINE int64_t PlaneBytes(const BlockView& view, int64_t key_tokens, int64_t value_tokens) {
  return BaseBytes(view.key_dim) + BaseBytes(view.value_dim) +
         2 * (UnpackedWords(key_tokens, view.key_dim) +
              UnpackedWords(value_tokens, view.value_dim));
}

template <DType kType>
struct Planes {
  Plane<kType> keys;
  Plane<kType> values;
};

// The planes of one head of a block. memory: of `PlaneBytes`, used where the block is packed.
template <DType kType>
HTC_INLINE Planes<kType> PlanesOf(const AttentionParams& p, int64_t sequence, int64_t column,
                                  int64_t kv_head, int64_t key_tokens, void* memory) {
  const BlockView& view = p.view;
  const int64_t tokens = view.block_tokens, key_dim = view.key_dim, value_dim = view.value_dim;
  if (kType != DType::kBFloat16 || !IsPacked(view, sequence, column)) {
    const auto* key_plane = KeyPlane<kType>(p, sequence, column, kv_head);
    const auto* value_plane = ValuePlane<kType>(p, sequence, column, kv_head);
    return {{reinterpret_cast<const uint8_t*>(key_plane), tokens, key_dim, nullptr, nullptr},
            {reinterpret_cast<const uint8_t*>(value_plane), tokens, value_dim, nullptr, nullptr}};
  }
  const PackedPlane key_parts = packed_plane(tokens, key_dim);
  const PackedPlane value_parts = packed_plane(tokens, value_dim);
  const uint8_t* keys = BlockStart(view, sequence, column) + kv_head * key_parts.num_bytes;
  const uint8_t* values = BlockStart(view, sequence, column) +
                          view.kv_heads * key_parts.num_bytes + kv_head * value_parts.num_bytes;
  auto* key_bases = static_cast<uint8_t*>(memory);
  uint8_t* value_bases = key_bases + BaseBytes(key_dim);
  auto* key_room = reinterpret_cast<uint16_t*>(value_bases + BaseBytes(value_dim));
  uint16_t* value_room = key_room + UnpackedWords(key_tokens, key_dim);
  RepeatBases(keys + key_parts.bases, key_dim, key_bases);
  RepeatBases(values + value_parts.bases, value_dim, value_bases);
  return {{keys, tokens, key_dim, key_bases, key_room},
          {values, tokens, value_dim, value_bases, value_room}};
}

void UnpackPlane(const uint8_t* plane, int64_t tokens, int64_t dim, uint16_t* to) {
  uint8_t bases[kMostPackedDim + kPackedGroup];
  RepeatBases(plane + packed_plane(tokens, dim).bases, dim, bases);
  if (tokens * dim % kPackedGroup == 0) {
    UnpackTokens(plane, tokens, dim, 0, tokens, bases, to);
    return;
  }
  uint16_t room[2 * kMostPackedDim + 2 * kPackedGroup];
  const int64_t step = 2 * kMostPackedDim / dim;
  for (int64_t t = 0; t < tokens; t += step) {
    const int64_t end = Min(t + step, tokens);
    __builtin_memcpy(to + t * dim, UnpackTokens(plane, tokens, dim, t, end, bases, room),
                     (end - t) * dim * 2);
  }
}

// ---- packing ------------------------------------------------------------------------------------

// The smallest base that reaches the upper bytes of most values of a channel.
uint8_t BestBase(const uint16_t* values, int64_t tokens, int64_t dim) {
  int32_t counts[128] = {};
  for (int64_t t = 0; t < tokens; ++t) ++counts[(values[t * dim] >> 8) & 0x7f];
  int32_t reached = 0, most = 0;
  int best = 0;
  for (int base = 0; base < 128; ++base) {
    reached += counts[base];
    if (base >= kReach) reached -= counts[base - kReach];
    if (reached > most) {
      most = reached;
      best = base;
    }
  }
  return static_cast<uint8_t>(best);
}

// Of `count` <= kWords channels from `values` on.
HTC_INLINE void FindBases(const uint16_t* values, int64_t tokens, int64_t dim, int64_t count,
                          uint8_t* bases) {
  Words largest = {}, smallest = ~Words{};
  for (int64_t t = 0; t < tokens; ++t) {
    Words row = {};
    if (count == kWords) {
      row = Load<Words>(values + t * dim);
    } else {
      for (int64_t i = 0; i < count; ++i) row[i] = values[t * dim + i];
    }
    const Words upper = row & 0x7f00;
    largest = Larger(largest, upper);
    smallest = Smaller(smallest, upper);
  }
  for (int64_t i = 0; i < count; ++i) {
    bases[i] = (largest[i] - smallest[i]) >> 8 < kReach ? static_cast<uint8_t>(largest[i] >> 8)
                                                        : BestBase(values + i, tokens, dim);
  }
}

// Whether there was room for the exceptions.
bool PackPlane(const uint16_t* values, int64_t tokens, int64_t dim, uint8_t* plane) {
  const PackedPlane parts = packed_plane(tokens, dim);
  __builtin_memset(plane + parts.bases, 0, parts.num_bytes - parts.bases);
  for (int64_t d = 0; d < dim; d += kWords) {
    FindBases(values + d, tokens, dim, Min(kWords, dim - d), plane + parts.bases + d);
  }
  uint8_t bases[kMostPackedDim + kPackedGroup];
  RepeatBases(plane + parts.bases, dim, bases);

  const int64_t num_values = tokens * dim;
  int64_t num_exceptions = 0;
  int64_t channel = 0;
  for (int64_t i = 0; i < num_values; i += kPackedGroup) {
    uint16_t group[kPackedGroup];
    const uint16_t* from = values + i;
    if (i + kPackedGroup > num_values) {  // what fills the last group up has the code 0
      for (int64_t j = 0; j < kPackedGroup; ++j) {
        group[j] = i + j < num_values ? from[j] : static_cast<uint16_t>(bases[channel + j] << 8);
      }
      from = group;
    }
    Words codes[kPackedGroup / kWords], any = {};
    HTC_UNROLL for (int64_t j = 0; j < kPackedGroup; j += kWords) {
      const Words word = Load<Words>(from + j);
      const Words below = Widen(Load<Bytes>(bases + channel + j)) - ((word >> 8) & 0x7f);
      Store(plane + i + j, ToBytes(word & 0xff));
      codes[j / kWords] = ((word >> 12) & 8) | (below & 7);
      any |= below & static_cast<uint16_t>(~7);
    }
    HTC_UNROLL for (int64_t j = 0; j < kHalfGroup; j += kWords) {
      const Words upper = codes[(j + kHalfGroup) / kWords];
      Store(plane + parts.codes + i / 2 + j, ToBytes(codes[j / kWords] | (upper << 4)));
    }
    if (HasAny(any)) {
      for (int64_t j = 0; j < kPackedGroup; ++j) {
        const int below = bases[channel + j] - ((from[j] >> 8) & 0x7f);
        if (below >= 0 && below < kReach) continue;
        if (num_exceptions == parts.most) return false;
        const uint16_t index = static_cast<uint16_t>(i + j);
        uint8_t* to = plane + parts.exceptions + 2 + 2 * num_exceptions++;
        __builtin_memcpy(to, &index, 2);
        __builtin_memcpy(to + 2 * parts.most, from + j, 2);
      }
    }
    channel += kPackedGroup;
    while (channel >= dim) channel -= dim;
  }
  const uint16_t count = static_cast<uint16_t>(num_exceptions);
  __builtin_memcpy(plane + parts.exceptions, &count, 2);
  return true;
}

// ---- blocks -------------------------------------------------------------------------------------

// Calls f(raw plane, packed plane, dim) for every plane of a block, until one returns false.
template <class Function>
bool EachPlane(const PackParams& p, uint8_t* raw, uint8_t* packed, const Function& f) {
  for (int64_t plane = 0; plane < 2 * p.kv_heads; ++plane) {
    const int64_t dim = plane < p.kv_heads ? p.key_dim : p.value_dim;
    if (!f(reinterpret_cast<uint16_t*>(raw), packed, dim)) return false;
    raw += p.block_tokens * dim * 2;
    packed += packed_plane(p.block_tokens, dim).num_bytes;
  }
  return true;
}

bool PackBlock(const PackParams& p, const uint8_t* raw, uint8_t* packed) {
  return EachPlane(p, const_cast<uint8_t*>(raw), packed,
                   [&](const uint16_t* from, uint8_t* to, int64_t dim) {
                     return PackPlane(from, p.block_tokens, dim, to);
                   });
}

void UnpackBlock(const PackParams& p, const uint8_t* packed, uint8_t* raw) {
  EachPlane(p, raw, const_cast<uint8_t*>(packed),
            [&](uint16_t* to, const uint8_t* from, int64_t dim) {
              UnpackPlane(from, p.block_tokens, dim, to);
              return true;
            });
}

}  // namespace
}  // namespace HTC_ISA
}  // namespace hf_tiered_cache
