// Score parts: what a score goes through between the product and the softmax, besides the scale; and the operands of
// rules that compare data. See ScoreParts and Predicate in effcompile/kernels/program.py.
#pragma once
#include "side.h"

namespace ec {

// Which parts program P has; a program without any says nothing about them.
template <class P, class = void>
struct Parts {
  static constexpr bool softcap = false, bias = false, sinks = false, segments = false, prefix = false;
};
template <class P>
struct Parts<P, std::void_t<typename P::score>> : P::score {};

// Whether scores change before the softmax, so that they must be scaled first.
template <class P>
inline constexpr bool SCORES_CHANGE = Parts<P>::softcap || Parts<P>::bias;

// What the softmax is left to multiply by.
template <class P>
inline double softmax_scale(const AttendArgs& a) {
  return SCORES_CHANGE<P> ? 1. : a.scale;
}

inline const ScoreArgs& score_args(const AttendArgs& a) { return *reinterpret_cast<const ScoreArgs*>(&a + 1); }
inline const LatentArgs& latent_args(const AttendArgs& a) {
  return *reinterpret_cast<const LatentArgs*>(&score_args(a) + 1);
}

// The query head of row `row` of key/value head `head`, within its batch entry; rows count the heads of one token first.
template <class P>
inline int64_t head_of(const AttendArgs& a, int64_t head, int64_t row) {
  return head % a.groups * P::ratio + row % P::ratio;
}

// Scores of one row and the keys [t, t + n), or those whose numbers are at[0, n), in place: scaled, capped, biased. What
// lies behind n is not read again.
template <class P>
inline void change_scores(const AttendArgs& a, int64_t head, int64_t row, int64_t t, int64_t n, float* s,
                          const int32_t* at = nullptr) {
  if constexpr (SCORES_CHANGE<P>) {
    const ScoreArgs& parts = score_args(a);
    const Vec scale(static_cast<float>(a.scale));
    const Vec cap(static_cast<float>(parts.softcap));
    const float* bias = parts.bias;
    if constexpr (Parts<P>::bias)
      bias += head / a.groups * parts.bias_stride[0] + head_of<P>(a, head, row) * parts.bias_stride[1] +
              row / P::ratio * parts.bias_stride[2] + (at ? 0 : t);
    for (int64_t i = 0; i < n; i += VL) {
      Vec x = Vec::loadu(s + i) * scale;
      if constexpr (Parts<P>::softcap) x = (x / cap).tanh() * cap;
      if constexpr (Parts<P>::bias)
        if (!at) x = x + load_f32(bias + i, n - i);
      x.store(s + i);
    }
    if constexpr (Parts<P>::bias)
      for (int64_t i = 0; at && i < n; ++i) s[i] += bias[at[i]];
  }
}

// The sequences that tokens of this batch entry belong to, null if there are no such.
template <class P>
inline const int64_t* segments_of(const AttendArgs& a, int64_t head) {
  if constexpr (Parts<P>::segments) return score_args(a).segments + head / a.groups * score_args(a).segments_stride;
  return nullptr;
}

// Keys of this batch entry that every query sees.
template <class P>
inline int64_t prefix_of(const AttendArgs& a, int64_t head) {
  if constexpr (Parts<P>::prefix) return score_args(a).prefix[head / a.groups * score_args(a).prefix_stride];
  return 0;
}

// The sink of a row, -inf if there is none.
template <class P>
inline double sink_of(const AttendArgs& a, int64_t head, int64_t row) {
  if constexpr (Parts<P>::sinks) return score_args(a).sinks[head_of<P>(a, head, row)];
  return -INF;
}

}  // namespace ec
