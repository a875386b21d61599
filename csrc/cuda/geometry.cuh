// Where things lie and who may attend what, for the tile of rows of one CUDA block.
//
// A unit is a fixed run of tokens of a block: what one partial is made of. A row is one query of
// one head; the rows of a key-value head are numbered query by query, the heads of its group side
// by side, so that a tile of rows is narrow in position. Bits depend on units alone: not on the
// tile a row is in, not on the round it is done in.
#pragma once

#include "block.cuh"
#include "element.cuh"

namespace hf_tiered_cache {
namespace {

constexpr int kUnitTokens = 256;

// What one launch does of a call: units [first_unit, first_unit + units) of queries [first_query,
// first_query + queries), as partials [units][batch, heads, queries]. A block waits for its first
// loads as long as it takes to find them: so 32 bits, and no division where one query is decoded.
struct Round {
  int64_t first_unit;
  int64_t units;
  int block_shift;  // units of a block, as a power of two
  int64_t first_query;
  uint32_t queries;
  uint32_t row_tiles;
  uint32_t group;  // heads of a kv_head
  RunningStateRows partials;
};

struct Row {
  uint32_t head;
  int64_t query;
};

// Tokens [begin, end) of the unit that some row of the tile may attend, counted from its first.
// Nothing outside is ever read: the rest of the block may hold anything.
struct Tile {
  uint32_t sequence;
  uint32_t kv_head;
  uint32_t unit;       // of the round
  uint32_t column;     // of the table
  uint32_t first_row;  // rows [first_row, first_row + rows) of the kv_head
  int rows;
  uint32_t offset;   // tokens from the block's first to the unit's
  int64_t position;  // of the unit's first token
  int begin;
  int end;
};

__device__ __forceinline__ Row RowOf(const Round& round, const Tile& tile, int row) {
  const uint32_t number = tile.first_row + row;
  if (round.queries == 1) return {tile.kv_head * round.group + number, round.first_query};
  return {tile.kv_head * round.group + number % round.group,
          round.first_query + number / round.group};
}

// The tile of this CUDA block: grid (units x row tiles, kv_heads, batch), the tiles that read the
// same unit side by side, so that they find it in the L2 cache.
template <int kRows>
__device__ __forceinline__ Tile ThisTile(const AttentionParams& p, const Round& round) {
  Tile tile;
  tile.sequence = blockIdx.z;
  tile.kv_head = blockIdx.y;
  tile.unit = blockIdx.x;
  tile.first_row = 0;
  if (round.row_tiles > 1) {
    tile.unit = blockIdx.x / round.row_tiles;
    tile.first_row = blockIdx.x % round.row_tiles * kRows;
  }
  tile.rows = static_cast<int>(Min(kRows, round.group * round.queries - tile.first_row));
  const uint32_t number = static_cast<uint32_t>(round.first_unit + tile.unit);
  tile.column = number >> round.block_shift;
  tile.offset = (number - (tile.column << round.block_shift)) * kUnitTokens;
  tile.position = p.first_token + tile.column * p.view.block_tokens + tile.offset;
  int64_t begin = 0;
  int64_t end =
      Min(Min(kUnitTokens, p.view.block_tokens - tile.offset), p.kv_tokens - tile.position);
  if (p.starts != nullptr) begin = Max(0, p.starts[tile.sequence] - tile.position);
  if (p.causal) {
    const int64_t last_query = RowOf(round, tile, tile.rows - 1).query;
    end = Min(end, p.query_start + last_query + 1 - tile.position);
  }
  tile.end = static_cast<int>(Max(0, end));
  tile.begin = static_cast<int>(Min(begin, tile.end));
  return tile;
}

// Where the row's partial is in the round.
__device__ __forceinline__ int64_t PartialIndex(const AttentionParams& p, const Round& round,
                                                const Tile& tile, const Row& row) {
  const uint32_t batch = static_cast<uint32_t>(p.batch);
  const uint32_t heads = static_cast<uint32_t>(p.heads);
  return static_cast<int64_t>((tile.unit * batch + tile.sequence) * heads + row.head) *
             round.queries +
         row.query - round.first_query;
}

// The keys and the values of the unit, one row per token. A block has fewer than 2^32 elements.
template <DType kType>
__device__ __forceinline__ const Element<kType>* KeyRows(const AttentionParams& p, const Tile& tile,
                                                         int64_t slot) {
  const BlockView& view = p.view;
  const auto* block = reinterpret_cast<const Element<kType>*>(view.blocks + slot * view.slot_bytes);
  const uint32_t row = tile.kv_head * static_cast<uint32_t>(view.block_tokens) + tile.offset;
  return block + row * static_cast<uint32_t>(view.key_dim);
}

template <DType kType>
__device__ __forceinline__ const Element<kType>* ValueRows(const AttentionParams& p,
                                                           const Tile& tile, int64_t slot) {
  const BlockView& view = p.view;
  const auto* block = reinterpret_cast<const Element<kType>*>(view.blocks + slot * view.slot_bytes);
  const uint32_t block_tokens = static_cast<uint32_t>(view.block_tokens);
  const uint32_t rows = static_cast<uint32_t>(view.kv_heads) * block_tokens;
  const uint32_t row = tile.kv_head * block_tokens + tile.offset;
  return block + (rows * static_cast<uint32_t>(view.key_dim) +
                  row * static_cast<uint32_t>(view.value_dim));
}

// Whether the row may attend token `t` of the unit, a token of [tile.begin, tile.end).
__device__ __forceinline__ bool MayAttend(const AttentionParams& p, const Tile& tile,
                                          const Row& row, int t) {
  const int64_t position = tile.position + t;
  if (p.causal && position > p.query_start + row.query) return false;
  if (p.mask == nullptr) return true;
  return p.mask[tile.sequence * p.mask_stride[0] + row.head * p.mask_stride[1] +
                row.query * p.mask_stride[2] + position * p.mask_stride[3]] != 0;
}

}  // namespace
}  // namespace hf_tiered_cache
