// Which groups of neurons a token uses: the products with the router's rows, the score, and the largest of them.
#pragma once
#include <omp.h>

#include "rows.h"

namespace ec {

// In the order of SCORES and WEIGHTS in effcompile/kernels/ffn_ops.py.
enum Score : int64_t { SOFTMAX, ABS_SOFTMAX, SIGMOID, ABS };
enum Weigh : int64_t { SCORE, NORMALIZED, UNIT };

struct RouteArgs {
  const void* x;     // [rows, size]
  const void* gate;  // [groups, size]
  const void* up;    // [groups, size] or null
  const float* choice_bias;  // [groups] or null, and so the next two
  const float* logit_bias;
  const float* scale;
  int32_t* chosen;  // [rows, slots]
  float* weights;
  int32_t* counts;  // [groups]
  int64_t rows, size, groups, slots, score, weigh, activation, limited;
  double threshold;
  int64_t threads;
};

// p of one token, in place of its logits.
inline void score_of(Score kind, float* p, int64_t count) {
  if (kind == ABS_SOFTMAX || kind == ABS)
    for (int64_t i = 0; i < count; ++i) p[i] = std::fabs(p[i]);
  if (kind == ABS) return;
  if (kind == SIGMOID) {
    for (int64_t i = 0; i < count; ++i) p[i] = 1.f / (1.f + std::exp(-p[i]));
    return;
  }
  float top = -INF, sum = 0.f;
  for (int64_t i = 0; i < count; ++i) top = p[i] > top ? p[i] : top;
  for (int64_t i = 0; i < count; ++i) sum += p[i] = std::exp(p[i] - top);
  for (int64_t i = 0; i < count; ++i) p[i] /= sum;
}

// The slots of one token, from its scores.
inline void choose(const RouteArgs& a, const float* p, float* rank, int32_t* order, int32_t* chosen, float* weights) {
  for (int64_t i = 0; i < a.groups; ++i) {
    rank[i] = a.choice_bias ? p[i] + a.choice_bias[i] : p[i];
    order[i] = static_cast<int32_t>(i);
  }
  std::partial_sort(order, order + a.slots, order + a.groups, [&](int32_t i, int32_t j) {
    const bool odd = std::isnan(rank[i]), other = std::isnan(rank[j]);
    if (odd != other) return odd;
    return !odd && rank[i] != rank[j] ? rank[i] > rank[j] : i < j;
  });
  const float threshold = static_cast<float>(a.threshold);
  float sum = 0.f;
  for (int64_t s = 0; s < a.slots; ++s) {
    const int32_t g = order[s];
    const bool used = !(a.limited && rank[g] <= threshold);
    chosen[s] = used ? g : -1;
    weights[s] = !used ? 0.f : a.weigh != UNIT ? p[g] : a.scale ? 1.f + p[g] * a.scale[g] : 1.f;
    sum += weights[s];
  }
  if (a.weigh == NORMALIZED && chosen[0] >= 0)
    for (int64_t s = 0; s < a.slots; ++s) weights[s] /= sum;
}

template <class T>
inline int64_t route(const RouteArgs& a) {
  struct Input;
  struct Scores;
  const int64_t ld = round_up(a.groups, ROWS) + VL;
  const float* x = as_f32<Input>(static_cast<const T*>(a.x), a.rows * a.size);
  const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.threads > 1)
  for (int64_t first = 0; first < a.rows; first += TOKENS) {
    const int64_t tokens = least(a.rows - first, TOKENS);
    float* logits = scratch<Scores>((TOKENS + 2) * ld);
    auto* order = reinterpret_cast<int32_t*>(logits + TOKENS * ld);
    float* rank = logits + (TOKENS + 1) * ld;
    const float* from[TOKENS];
    for (int64_t m = 0; m < tokens; ++m) from[m] = x + (first + m) * a.size;
    for (int64_t g = 0; g < a.groups; g += ROWS) {
      alignas(64) float gates[TOKENS * ROWS + VL], values[TOKENS * ROWS + VL];
      int32_t ids[ROWS];
      for (int64_t n = 0; n < ROWS; ++n) ids[n] = static_cast<int32_t>(g + n);
      const int64_t count = least(a.groups - g, ROWS);
      const Rows<T> gate_rows = rows_of(gate, a.size, ids, 1, count);
      dots(tokens, from, gate_rows, gate_rows, a.size, values);
      if (up) {
        std::copy_n(values, tokens * ROWS, gates);
        const Rows<T> up_rows = rows_of(up, a.size, ids, 1, count);
        dots(tokens, from, up_rows, up_rows, a.size, values);
        activate(a.activation, gates, values, tokens * ROWS);
      }
      for (int64_t m = 0; m < tokens; ++m)
        for (int64_t n = 0; n < count; ++n)
          logits[m * ld + g + n] = values[m * ROWS + n] + (a.logit_bias ? a.logit_bias[g + n] : 0.f);
    }
    for (int64_t m = 0; m < tokens; ++m) {
      const int64_t row = first + m;
      score_of(static_cast<Score>(a.score), logits + m * ld, a.groups);
      choose(a, logits + m * ld, rank, order, a.chosen + row * a.slots, a.weights + row * a.slots);
    }
  }
  std::fill_n(a.counts, a.groups, 0);
  for (int64_t i = 0; i < a.rows * a.slots; ++i)
    if (a.chosen[i] >= 0) ++a.counts[a.chosen[i]];
  return 0;
}

}  // namespace ec
