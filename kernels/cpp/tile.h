// Tiles of a side as fp32 with lanes of tokens, which is how matrix products take keys.
#pragma once
#include "matmul.h"
#include "side.h"

namespace ec {

// Tokens [t, t + n) of a side, transposed: out[channel][token], row length ld. columns(t, out) writes one group that is
// packed per channel.
template <class S, class Columns>
inline void transposed(const S& side, int64_t t, int64_t n, bool tail, float* out, int64_t ld, Columns&& columns) {
  if constexpr (S::packed) {
    if (!tail) {
      if constexpr (S::per_channel) {
        for (int64_t i = 0; i < n; i += S::g) columns(t + i, out + i);
      } else {
        struct Rows;
        float* rows = scratch<Rows>(n * S::size);
        for (int64_t i = 0; i < n; ++i) token_row(side, t + i, rows + i * S::size);
        transpose(rows, S::size, n, S::size, out, ld);
      }
      return;
    }
  }
  transpose(side.rows(t), S::size, n, S::size, out, ld);
}

// Keys [t, t + n), turned if they are stored before RoPE.
template <class P>
inline void key_tile(const Side<P, Kind::key>& keys, const Rope<P>& rope, int64_t t, int64_t n, bool tail, float* out, int64_t ld) {
  transposed(keys, t, n, tail, out, ld, [&](int64_t at, float* to) { key_columns(keys, rope, at, to, ld); });
}

}  // namespace ec
