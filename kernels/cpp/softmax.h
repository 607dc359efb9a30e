// What decode and prefill share: which keys a query sees, and one step of the online softmax, in base 2.
#pragma once
#include "side.h"

namespace ec {

inline constexpr double LOG2E = 1.4426950408889634074, LN2 = 0.6931471805599453094;

// Turns scores s[0, n), in units of ln 2, into weights and updates the row's running maximum and sum; returns the factor
// for what was summed before. s is padded with zeros to a whole vector. NaN scores make the row NaN, as in the reference.
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
    const Vec w = exp2_nonpositive(Vec::loadu(s + i) - Vec(next));
    w.store(s + i);
    total = total + w;
  }
  const float factor = next == max ? 1.f : std::exp2(max - next);
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

// Where row `row` of a key/value head is in [B, H, T]: rows count the heads of one token first.
template <class P>
inline int64_t row_index(const AttendArgs& a, int64_t head, int64_t row) {
  return (head * P::ratio + row % P::ratio) * a.queries + row / P::ratio;
}

// The query of that row as fp32, times the scale and log2(e), padded with zeros.
template <class P>
inline void read_query(const AttendArgs& a, int64_t head, int64_t row, float* q) {
  const auto* from = static_cast<const typename P::scalar*>(a.query) + head / a.groups * a.query_stride[0] +
                     (head % a.groups * P::ratio + row % P::ratio) * a.query_stride[1] +
                     row / P::ratio * a.query_stride[2];
  const Vec factor(static_cast<float>(a.scale * LOG2E));
  for (int64_t d = 0; d < P::key_size; d += VL) (load_f32(from + d, P::key_size - d) * factor).store(q + d);
}

// Writes a finished row: o / sum in model dtype, and its lse. A row without keys is 0 and -inf.
template <class P>
inline void write_row(const AttendArgs& a, int64_t at, const float* o, float max, float sum) {
  auto* out = static_cast<typename P::scalar*>(a.out) + at * P::value_size;
  const float norm = sum == 0.f ? 0.f : 1.f / sum;
  for (int64_t e = 0; e < P::value_size; e += VL) store_f32(out + e, Vec::loadu(o + e) * Vec(norm), P::value_size - e);
  a.lse[at] = sum == 0.f ? -INF : static_cast<float>((max + std::log2(sum)) * LN2);
}

}  // namespace ec
