// Attention of many query rows over a store: tiles of queries against runs of keys, as two matrix products and an online
// softmax. The heads that share a key/value head are rows of one tile, so a tile of the store is read (and dequantised)
// once for all of them.
#pragma once
#include <omp.h>

#include "softmax.h"
#include "tile.h"

namespace ec {

// Values [t, t + n) as fp32, rows of EP; the store itself where it already is that.
template <class P>
inline const float* value_tile(const Side<P, Kind::value>& values, int64_t t, int64_t n, bool tail, float* out) {
  using S = Side<P, Kind::value>;
  constexpr int64_t E = S::size, EP = round_up(E, VL);
  if constexpr (S::packed) {
    if (!tail) {
      if constexpr (S::per_channel) {
        struct Columns;
        float* columns = scratch<Columns>(E * S::g);
        for (int64_t i = 0; i < n; i += S::g) {
          group_columns(values, t + i, columns, S::g);
          transpose(columns, S::g, E, S::g, out + i * EP, EP);
        }
      } else {
        for (int64_t i = 0; i < n; ++i) token_row(values, t + i, out + i * EP);
      }
      return out;
    }
  }
  const auto* rows = values.rows(t);
  if constexpr (std::is_same_v<typename P::scalar, float> && E == EP) return rows;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t e = 0; e < E; e += VL) load_f32(rows + i * E + e, E - e).store(out + i * EP + e);
  return out;
}

template <class P>
inline void prefill_tile(const AttendArgs& a, int64_t head, int64_t first, int64_t last, int64_t stop) {
  constexpr int64_t D = P::key_size, E = P::value_size, DP = round_up(D, VL), EP = round_up(E, VL);
  constexpr int64_t BK = P::group * most(1, 128 / P::group);
  constexpr Block wide = best_block(BK / VL), deep = best_block(EP / VL);
  const int64_t length = *a.state.length, rows = (last - first) * P::ratio, padded = rows + ACCUMULATORS;
  const Scale scale(softmax_scale<P>(a));
  const Side<P, Kind::key> keys(a.state, head, a.capacity);
  const Side<P, Kind::value> values(a.state, head, a.capacity);
  const Rope<P> rope(a.state, head / a.groups, a.capacity);
  const bool* mask = P::key_mask ? a.mask + head / a.groups * a.mask_stride : nullptr;
  const int64_t* segments = segments_of<P>(a, head);
  struct Work;
  float* q = scratch<Work>(padded * (DP + BK + EP + 3) + D * BK + BK * EP);
  float *s = q + padded * DP, *o = s + padded * BK, *key = o + padded * EP, *value = key + D * BK;
  float *max = value + BK * EP, *sum = max + padded, *alpha = sum + padded;
  for (int64_t row = 0; row < rows; ++row) read_query<P>(a, scale, head, first * P::ratio + row, q + row * DP);
  for (int64_t i = 0; i < padded * EP; ++i) o[i] = 0.f;
  for (int64_t row = 0; row < padded; ++row) max[row] = -INF, sum[row] = 0.f, alpha[row] = 1.f;

  const int64_t from = Visible<P>(a, head, first, length).first / BK * BK;
  const int64_t to = Visible<P>(a, head, last - 1, length).last;
  for_runs<P>(from, to, stop, BK, [&](int64_t t, int64_t n, bool tail) {
    // Tokens before the first that sees any of these keys are skipped. Those behind the last are not, because multiply()
    // writes up to a whole block of rows behind the last: their keys are hidden instead.
    int64_t begin = first;
    while (begin < last && Visible<P>(a, head, begin, length).last <= t) ++begin;
    const int64_t low = (begin - first) * P::ratio, count = (last - begin) * P::ratio;
    if (count == 0) return;
    key_tile<P>(keys, rope, t, n, tail, key, BK);
    multiply<float, wide.rows, wide.columns>(count, round_up(n, VL), D, q + low * DP, DP, key, BK, nullptr, s + low * BK, BK);
    for (int64_t row = low; row < low + count; ++row) {
      const Visible<P> seen(a, head, first + row / P::ratio, length);
      change_scores<P>(a, head, first * P::ratio + row, t, n, s + row * BK);
      if (EVERY_KEY<P> || t < seen.first || t + n > seen.last) hide<P>(s + row * BK, t, n, seen, mask, segments);
      alpha[row] = softmax_step(s + row * BK, n, scale, max[row], sum[row]);
    }
    const float* v = value_tile<P>(values, t, n, tail, value);
    multiply<float, deep.rows, deep.columns>(count, EP, n, s + low * BK, BK, v, EP, alpha + low, o + low * EP, EP);
  });
  for (int64_t row = 0; row < rows; ++row)
    write_row<P>(a, scale, head, first * P::ratio + row, o + row * EP, max[row], sum[row]);
}

// Returns 1, having written nothing, if the length is not within the capacity.
template <class P>
int64_t prefill(const AttendArgs& a) {
  if (*a.state.length < 0 || *a.state.length > a.capacity) return 1;
  const int64_t heads = a.batch * a.groups, stop = packed_length<P>(*a.state.length);
  // Large tiles reuse a tile of keys more often; small ones keep all threads busy when there is little to do.
  const int64_t whole = most(1, 192 / P::ratio), least_tokens = most(1, 48 / P::ratio);
  const int64_t fair = heads * a.queries / (4 * a.threads);
  const int64_t tokens = most(least_tokens, least(whole, fair)), tiles = (a.queries + tokens - 1) / tokens;
  // The last queries see the most keys: they go first, so that no long tile is left for the end.
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 1) if (heads * tiles > 1)
  for (int64_t item = 0; item < heads * tiles; ++item) {
    const int64_t first = (tiles - 1 - item / heads) * tokens;
    prefill_tile<P>(a, item % heads, first, least(a.queries, first + tokens), stop);
  }
  return 0;
}

}  // namespace ec
