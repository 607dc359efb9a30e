// Attention of a few query rows over a store: split over keys, each part with an online softmax, merged by lse.
#pragma once
#include <omp.h>

#include <vector>

#include "score.h"
#include "weigh.h"

namespace ec {

// Rows handled together: the heads of one token that share a key/value head, or a divisor that fits the registers.
constexpr int row_block(int ratio) {
  for (int n = ratio < 8 ? ratio : 8; n > 1; --n)
    if (ratio % n == 0) return n;
  return 1;
}

// Turns scores s[0, n) into weights and updates the row's running maximum and sum; returns the factor for what was summed
// before. s is padded with zeros to a whole vector. NaN scores make the row NaN, as in the reference.
inline float softmax_step(float* s, int64_t n, float& max, float& sum) {
  for (int64_t i = n; i % VL; ++i) s[i] = -INF;
  Vec top(-INF);
  for (int64_t i = 0; i < n; i += VL) top = at::vec::maximum(top, Vec::loadu(s + i));
  const float block = max_of(top);
  const float next = block <= max ? max : block;
  if (next == -INF) {  // no key visible so far
    for (int64_t i = 0; i < n; i += VL) Vec(0.f).store(s + i);
    return 1.f;
  }
  Vec total(0.f);
  for (int64_t i = 0; i < n; i += VL) {
    const Vec w = exp_nonpositive(Vec::loadu(s + i) - Vec(next));
    w.store(s + i);
    total = total + w;
  }
  const float factor = std::exp(max - next);
  sum = sum * factor + total.reduce_add();
  max = next;
  return factor;
}

// Keys that query t may see lie in [first, last).
template <class P>
struct Visible {
  int64_t first, last;
  Visible(int64_t t, int64_t queries, int64_t length) {
    const int64_t position = length - queries + t;
    first = P::window >= 0 ? most(0, position - P::window + 1) : 0;
    last = P::causal ? least(length, position + 1) : length;
  }
};

// Hides keys outside [seen.first, seen.last) and keys whose mask is false in s, the scores of keys [t, t + n).
template <class P>
inline void hide(float* s, int64_t t, int64_t n, Visible<P> seen, const bool* mask) {
  const int64_t from = least(n, most(0, seen.first - t)), to = most(from, least(n, seen.last - t));
  for (int64_t i = 0; i < from; ++i) s[i] = -INF;
  for (int64_t i = to; i < n; ++i) s[i] = -INF;
  if constexpr (P::key_mask)
    for (int64_t i = from; i < to; ++i)
      if (!mask[t + i]) s[i] = -INF;
}


template <class P>
int64_t decode(const AttendArgs& a) {
  using T = typename P::scalar;
  constexpr int64_t D = P::key_size, E = P::value_size, DP = round_up(D, VL), EP = round_up(E, VL);
  constexpr int RB = row_block(P::ratio);
  constexpr int64_t BK = P::group * most(1, 128 / P::group), ld = round_up(BK, VL) + VL;
  const int64_t length = *a.state.length, rows = a.queries * P::ratio, heads = a.batch * a.groups;
  const int64_t stop = packed_length<P>(length);
  // Parts start on whole blocks, so that packed runs hold whole groups; keys before the window are hidden one by one.
  const int64_t start = Visible<P>(0, a.queries, length).first / BK * BK;
  const int64_t blocks = most(0, (length - start + BK - 1) / BK);
  const int64_t threads = heads * blocks < 8 ? 1 : a.threads;
  // About eight parts a thread even out what other processes take; a part is at least four blocks.
  const int64_t per = threads == 1 ? most(1, blocks) : most(4, (heads * blocks + threads * 8 - 1) / (threads * 8));
  const int64_t parts = most(1, (blocks + per - 1) / per);
  // [head][part][row]: EP values, max, sum
  constexpr int64_t cell = EP + 2;
  struct Partials;
  float* partial = scratch<Partials>(heads * parts * rows * cell);

#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t item = 0; item < heads * parts; ++item) {
    const int64_t head = item / parts, from = start + item % parts * per * BK, to = least(length, from + per * BK);
    const int64_t b = head / a.groups, group = head % a.groups;
    const Side<P, Kind::key> keys(a.state, head, a.capacity);
    const Side<P, Kind::value> values(a.state, head, a.capacity);
    const bool* mask = P::key_mask ? a.mask + b * a.mask_stride : nullptr;
    struct Work;
    float* q = scratch<Work>(rows * DP + RB * ld);
    float* s = q + rows * DP;
    float* cells = partial + item * rows * cell;
    for (int64_t row = 0; row < rows; ++row) {
      const T* query = static_cast<const T*>(a.query) + b * a.query_stride[0] +
                       (group * P::ratio + row % P::ratio) * a.query_stride[1] + row / P::ratio * a.query_stride[2];
      for (int64_t d = 0; d < D; d += VL)
        (load_f32(query + d, D - d) * Vec(static_cast<float>(a.scale))).store(q + row * DP + d);
    }
    // Within a part, [all o of the rows] [all max] [all sum], so that a row block's o is one matrix.
    float *o = cells, *max = cells + rows * EP, *sum = max + rows;
    for (int64_t i = 0; i < rows * EP; ++i) o[i] = 0.f;
    for (int64_t i = 0; i < rows; ++i) max[i] = -INF, sum[i] = 0.f;
    for_runs<P>(from, to, stop, BK, [&](int64_t t, int64_t n, bool tail) {
      for (int64_t row = 0; row < rows; row += RB) {
        const Visible<P> seen(row / P::ratio, a.queries, length);
        if (t >= seen.last || t + n <= seen.first) continue;
        score<P, RB>(keys, t, n, tail, q + row * DP, s, ld);
        float alpha[RB];
        for (int r = 0; r < RB; ++r) {
          if (P::key_mask || t < seen.first || t + n > seen.last) hide<P>(s + r * ld, t, n, seen, mask);
          alpha[r] = softmax_step(s + r * ld, n, max[row + r], sum[row + r]);
        }
        weigh<P, RB>(values, t, n, tail, s, ld, alpha, o + row * EP);
      }
    });
  }

  for (int64_t head = 0; head < heads; ++head) {
    const int64_t b = head / a.groups, group = head % a.groups;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = (b * a.groups * P::ratio + group * P::ratio + row % P::ratio) * a.queries + row / P::ratio;
      const float* cells = partial + head * parts * rows * cell;
      const auto max = [&](int64_t part) { return cells[part * rows * cell + rows * EP + row]; };
      const auto sum = [&](int64_t part) { return cells[part * rows * cell + rows * EP + rows + row]; };
      float top = -INF, total = 0.f;
      for (int64_t part = 0; part < parts; ++part) top = max(part) <= top ? top : max(part);
      alignas(64) float o[EP] = {};
      for (int64_t part = 0; part < parts && top != -INF; ++part) {
        const float weight = std::exp(max(part) - top);
        total += weight * sum(part);
        for (int64_t e = 0; e < EP; e += VL)
          at::vec::fmadd(Vec(weight), Vec::loadu(cells + part * rows * cell + row * EP + e), Vec::loadu(o + e)).store(o + e);
      }
      const float norm = total == 0.f ? 0.f : 1.f / total;
      T* out = static_cast<T*>(a.out) + at * E;
      for (int64_t e = 0; e < E; e += VL) store_f32(out + e, Vec::loadu(o + e) * Vec(norm), E - e);
      a.lse[at] = total == 0.f ? -INF : top + std::log(total);
    }
  }
  return 0;
}

}  // namespace ec
