// XXH3-128 (seed 0) of inputs longer than 240 bytes, as published in the xxHash specification.
// Records are multiples of 4096 bytes, so the short-input cases are not needed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hf_tiered_cache {

// Writes the canonical 16 bytes (big-endian, high half first) of the checksum of `data` to `out`.
void xxh3_128(const void* data, std::size_t num_bytes, unsigned char out[16]);

}  // namespace hf_tiered_cache
