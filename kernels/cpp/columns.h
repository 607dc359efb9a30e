// Single keys that attention visits besides blocks, and keys that stand elsewhere than their slots say
// (effcompile/kernels/columns.py).
#pragma once
#include "prefill.h"

namespace ec {

// What P derives from, each for its arguments behind BlockArgs.
struct gathered_columns {};
struct key_positions {};

struct ColumnArgs {
  const int32_t* columns;  // [B or 1, H or 1, nR, C]
  const int32_t* counts;   // [B or 1, H or 1, nR]
  int64_t stride[2];       // of counts over batch and head, in elements; 0 where one serves all
  int64_t room, span;      // C, and how many query blocks a list serves
};

struct PositionArgs {
  const int32_t* positions;  // [B or 1, G or 1, length], each within the length
  int64_t stride[2];         // over batch and key/value head; 0 where one serves all
};

// Hides those of the keys that stand at positions at[0, n) which the query does not see.
template <class P>
inline void hide_at(float* s, const int32_t* at, int64_t n, Visible<P> seen, const bool* mask) {
  for (int64_t i = 0; i < n; ++i) {
    bool hidden = at[i] < seen.first || at[i] >= seen.last;
    if constexpr (P::key_mask) hidden = hidden || !mask[at[i]];
    if (hidden) s[i] = -INF;
  }
}

// The columns of a head for a query block; null if one is not there, does not follow the one before, or lies in a block
// that `marks` says is visited, so that its key would count twice.
inline const int32_t* read_columns(const ColumnArgs& c, int64_t batch, int64_t head, int64_t row, const uint8_t* marks,
                                   int64_t block, int64_t length, int64_t& count) {
  const int64_t list = batch * c.stride[0] + head * c.stride[1] + row / c.span;
  const int32_t* at = c.columns + list * c.room;
  count = c.counts[list];
  if (count < 0 || count > c.room) return nullptr;
  for (int64_t i = 0, before = -1; i < count; before = at[i++])
    if (at[i] <= before || at[i] >= length || marks[at[i] / block]) return nullptr;
  return at;
}

// The keys at[0, n), transposed as key_tile gives them, and their values as rows of EP.
template <class P>
inline void gather_tiles(const Side<P, Kind::key>& keys, const Side<P, Kind::value>& values, const int32_t* at, int64_t n,
                         float* key, int64_t ld, float* value) {
  constexpr int64_t D = P::key_size, E = P::value_size, DP = round_up(D, VL), EP = round_up(E, VL);
  struct Rows;
  float* rows = scratch<Rows>(n * DP);
  for (int64_t i = 0; i < n; ++i) {
    const auto* from = keys.rows(at[i]);
    for (int64_t d = 0; d < D; d += VL) load_f32(from + d, D - d).store(rows + i * DP + d);
  }
  transpose(rows, DP, n, D, key, ld);
  for (int64_t i = 0; i < n; ++i) {
    const auto* from = values.rows(at[i]);
    for (int64_t e = 0; e < E; e += VL) load_f32(from + e, E - e).store(value + i * EP + e);
  }
}

}  // namespace ec
