// What decode and prefill share: which keys a query sees, one step of the online softmax, and rows in and out.
#pragma once
#include "parts.h"
#include "side.h"

namespace ec {

// Scores stay as they come out of the product, and the scale goes into the exponent: e^(scale * (s - max)) =
// 2^(factor * (s - max)). Near the maximum, where weights matter, that difference is exact. A negative scale changes the
// sign of the query, which is exact too.
struct Scale {
  float factor, sign;
  double scale;
  explicit Scale(double x)
      : factor(static_cast<float>((x == 0 ? 1. : std::fabs(x)) * 1.4426950408889634074)),
        sign(x == 0 ? 0.f : x < 0 ? -1.f : 1.f),
        scale(x == 0 ? 1. : std::fabs(x)) {}
  // What sums over weights relative to `from` are worth relative to `to`, a larger maximum.
  float rescale(float from, float to) const { return from == to ? 1.f : std::exp2(factor * (from - to)); }
};

// Turns scores s[0, n) into weights and updates the row's running maximum and sum; returns the factor for what was summed
// before. s is padded with zeros to a whole vector. NaN scores make the row NaN, as in the reference.
inline float softmax_step(float* s, int64_t n, const Scale& scale, float& max, float& sum) {
  for (int64_t i = n; i % VL; ++i) s[i] = -INF;
  Vec top(-INF);
  for (int64_t i = 0; i < n; i += VL) top = at::vec::maximum(top, Vec::loadu(s + i));
  const float block = max_of(top);
  const float next = block <= max ? max : block;
  if (next == -INF) {  // no key visible so far
    for (int64_t i = 0; i < n; i += VL) Vec(0.f).store(s + i);
    return 1.f;
  }
  const Vec factor(scale.factor), highest(next);
  Vec total(0.f);
  for (int64_t i = 0; i < n; i += VL) {
    const Vec w = exp2_nonpositive((Vec::loadu(s + i) - highest) * factor);
    w.store(s + i);
    total = total + w;
  }
  const float before = scale.rescale(max, next);
  sum = sum * before + sum_of(total);
  max = next;
  return before;
}

// Keys that query t may see lie in [first, last). A prefix only moves `last`, which never falls from query to query.
template <class P>
struct Visible {
  int64_t first, last, position;
  Visible(const AttendArgs& a, int64_t head, int64_t t, int64_t length)
      : Visible(length - a.queries + t, length, prefix_of<P>(a, head)) {}
  // A query that stands at `position`, with no key from `length` on.
  Visible(int64_t position, int64_t length, int64_t prefix) : position(position) {
    first = P::window >= 0 ? most(0, position - P::window + 1) : 0;
    last = P::causal ? least(length, most(position + 1, prefix)) : length;
  }
};

// Whether each key has to be asked for, also between `first` and `last`.
template <class P>
inline constexpr bool EVERY_KEY = P::key_mask || Parts<P>::segments;

// Hides keys outside [seen.first, seen.last), keys whose mask is false and those of other sequences than the query's
// in s, the scores of keys [t, t + n).
template <class P>
inline void hide(float* s, int64_t t, int64_t n, Visible<P> seen, const bool* mask, const int64_t* segments) {
  const int64_t from = least(n, most(0, seen.first - t)), to = most(from, least(n, seen.last - t));
  for (int64_t i = 0; i < from; ++i) s[i] = -INF;
  for (int64_t i = to; i < n; ++i) s[i] = -INF;
  if constexpr (P::key_mask)
    for (int64_t i = from; i < to; ++i)
      if (!mask[t + i]) s[i] = -INF;
  if constexpr (Parts<P>::segments)
    for (int64_t i = from; i < to; ++i)
      if (segments[t + i] != segments[seen.position]) s[i] = -INF;
}

// Where row `row` of a key/value head is in [B, H, T]: rows count the heads of one token first.
template <class P>
inline int64_t row_index(const AttendArgs& a, int64_t head, int64_t row) {
  return (head * P::ratio + row % P::ratio) * a.queries + row / P::ratio;
}

// The query of that row as fp32, with the sign of the scale, padded with zeros.
template <class P>
inline void read_query(const AttendArgs& a, const Scale& scale, int64_t head, int64_t row, float* q) {
  const auto* from = static_cast<const typename P::scalar*>(a.query) + head / a.groups * a.query_stride[0] +
                     (head % a.groups * P::ratio + row % P::ratio) * a.query_stride[1] +
                     row / P::ratio * a.query_stride[2];
  for (int64_t d = 0; d < P::key_size; d += VL) (load_f32(from + d, P::key_size - d) * Vec(scale.sign)).store(q + d);
}

// Writes a finished row: o / sum in model dtype, and its lse. A row without keys is 0 and -inf, or its sink.
template <class P>
inline void write_row(const AttendArgs& a, const Scale& scale, int64_t head, int64_t row, const float* o, float max,
                      float sum) {
  const int64_t at = row_index<P>(a, head, row);
  auto* out = static_cast<typename P::scalar*>(a.out) + at * P::value_size;
  if constexpr (Parts<P>::sinks) {
    // The sink's mass relative to the largest score; infinite, it leaves nothing to the keys.
    const double sink = sink_of<P>(a, head, row), top = max * scale.scale;
    const double mass = sum == 0.f ? 1. : sum + (sink == -INF ? 0. : std::exp(sink - top));
    const Vec share(sum == 0.f ? 0.f : static_cast<float>(1. / mass));
    for (int64_t e = 0; e < P::value_size; e += VL) store_f32(out + e, Vec::loadu(o + e) * share, P::value_size - e);
    a.lse[at] = static_cast<float>(sum == 0.f || std::isinf(mass) ? sink : top + std::log(mass));
    return;
  }
  const float norm = sum == 0.f ? 0.f : 1.f / sum;
  for (int64_t e = 0; e < P::value_size; e += VL) store_f32(out + e, Vec::loadu(o + e) * Vec(norm), P::value_size - e);
  a.lse[at] = sum == 0.f ? -INF : static_cast<float>(max * scale.scale + std::log(double(sum)));
}

}  // namespace ec
