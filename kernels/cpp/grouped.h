// An FFN over the neurons that tokens have chosen, in one pass: a neuron's gate and up rows give a number for each of its
// tokens, times which its down row is added to their results. Nothing waits between up and down; threads share out the
// neurons, and their results are added up at the end.
#pragma once
#include <omp.h>

#include "rows.h"

namespace ec {

struct GroupedArgs {
  const void* x;  // [rows, size]
  const void* gate;  // [neurons, size] or null
  const void* up;
  const void* down;  // [neurons, size]
  const void* bias[3];  // of gate and up [neurons], of down [size], or null
  const int32_t* chosen;  // [chosen_rows, slots] or null
  const float* weights;  // as chosen, or null
  void* out;  // [rows, size]
  int64_t rows, size, neurons, shared, width, activation, chosen_rows, slots, threads;
};

// The tokens of each group, one group after another; a token that lists a group twice is there twice.
struct Routes {
  const int32_t* begin;  // [groups + 1]
  const int32_t* token;
  const float* weight;
};

// False if a slot names a group that is not there.
inline bool sort_by_group(const GroupedArgs& a, int64_t groups, Routes& routes) {
  struct Ints;
  struct Floats;
  const int64_t slots = a.chosen ? a.slots : 0;
  auto* begin = reinterpret_cast<int32_t*>(scratch<Ints>(groups + 2 + a.rows * slots));
  int32_t* token = begin + groups + 2;
  float* weight = scratch<Floats>(a.rows * slots);
  std::fill(begin, begin + groups + 2, 0);
  const auto row = [&](int64_t r) { return (a.chosen_rows == 1 ? 0 : r) * slots; };
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t s = 0; s < slots; ++s) {
      const int32_t g = a.chosen[row(r) + s];
      if (g >= groups) return false;
      if (g >= 0) ++begin[g + 2];
    }
  }
  for (int64_t g = 0; g < groups; ++g) begin[g + 2] += begin[g + 1];
  // begin[g + 1] is where the next token of g goes, and in the end where those of g + 1 begin.
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t s = 0; s < slots; ++s) {
      const int32_t g = a.chosen[row(r) + s];
      if (g < 0) continue;
      const int32_t at = begin[g + 1]++;
      token[at] = static_cast<int32_t>(r);
      weight[at] = a.weights ? a.weights[row(r) + s] : 1.f;
    }
  }
  routes = {begin, token, weight};
  return true;
}

// Neurons with the same tokens and weights, taken in steps of ROWS. Those of a step are far from each other, so that the
// rows of one step after another are ROWS long stretches of each matrix, which the hardware fetches ahead.
struct Segment {
  const int32_t* neurons;
  const int32_t* token;
  const float* weight;
  int64_t count, tokens;

  int64_t steps() const { return (count + ROWS - 1) / ROWS; }
  // What a step costs: reading its rows takes as long as computing them for some tokens.
  int64_t cost() const { return most(tokens, TOKENS); }
};

// The segments of a call. Groups that share tokens and weights share one: single neurons would fill no step.
inline const Segment* segments_of(const GroupedArgs& a, int64_t groups, const Routes& routes, int64_t& count) {
  struct Tag;
  struct All;
  const int64_t words = (groups + 1) * static_cast<int64_t>(sizeof(Segment) / sizeof(float));
  auto* segments = reinterpret_cast<Segment*>(scratch<Tag>(words + a.neurons));
  auto* neuron = reinterpret_cast<int32_t*>(segments + groups + 1);
  float* ones = scratch<All>(2 * a.rows);
  auto* every = reinterpret_cast<int32_t*>(ones + a.rows);
  for (int64_t r = 0; r < a.rows; ++r) {
    ones[r] = 1.f;
    every[r] = static_cast<int32_t>(r);
  }
  count = 0;
  const auto add = [&](int64_t first, int64_t width, const int32_t* token, const float* weight, int64_t tokens) {
    Segment* last = segments + count - 1;
    if (count && last->tokens == tokens && std::equal(token, token + tokens, last->token) &&
        std::equal(weight, weight + tokens, last->weight))
      last->count += width;
    else
      segments[count++] = {neuron, token, weight, width, tokens};
    for (int64_t n = 0; n < width; ++n) *neuron++ = static_cast<int32_t>(first + n);
  };
  if (a.shared) add(0, a.shared, every, ones, a.rows);
  for (int64_t g = 0; g < groups; ++g) {
    const int32_t from = routes.begin[g], tokens = routes.begin[g + 1] - from;
    if (tokens) add(a.shared + g * a.width, a.width, routes.token + from, routes.weight + from, tokens);
  }
  return segments;
}

// Adds to `result` what the neurons of one step give.
template <class T>
inline void grouped_step(const GroupedArgs& a, const Segment& s, int64_t step, const float* x, float* result) {
  const int64_t size = a.size, steps = s.steps();
  const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up), *down = static_cast<const T*>(a.down);
  const T *gate_bias = static_cast<const T*>(a.bias[0]), *up_bias = static_cast<const T*>(a.bias[1]);
  const auto neurons = [&](int64_t of) { return (s.count - of + steps - 1) / steps; };
  const auto rows = [&](const T* matrix, int64_t of) {
    return rows_of(matrix, size, s.neurons + of, steps, neurons(of));
  };
  const Rows<T> up_rows = rows(up, step), down_rows = rows(down, step), gate_rows = gate ? rows(gate, step) : up_rows;
  const Rows<T> next = rows(gate ? gate : up, least(step + 1, steps - 1));
  const int64_t count = neurons(step);
  for (int64_t first = 0; first < s.tokens; first += TOKENS) {
    const int64_t tokens = least(s.tokens - first, TOKENS);
    const float* from[TOKENS];
    float* to[TOKENS];
    for (int64_t m = 0; m < tokens; ++m) {
      from[m] = x + s.token[first + m] * size;
      to[m] = result + s.token[first + m] * size;
    }
    alignas(64) float g[TOKENS * ROWS + VL], h[TOKENS * ROWS + VL];
    if (gate) dots(tokens, from, gate_rows, up_rows, size, g);
    dots(tokens, from, up_rows, down_rows, size, h);
    for (int64_t n = 0; n < count && (gate_bias || up_bias); ++n) {
      const int32_t neuron = s.neurons[step + n * steps];
      for (int64_t m = 0; m < tokens; ++m) {
        if (gate_bias) g[m * ROWS + n] += static_cast<float>(gate_bias[neuron]);
        if (up_bias) h[m * ROWS + n] += static_cast<float>(up_bias[neuron]);
      }
    }
    activate(a.activation, gate ? g : nullptr, h, tokens * ROWS);
    for (int64_t m = 0; m < tokens; ++m)
      for (int64_t n = 0; n < ROWS; ++n) h[m * ROWS + n] = n < count ? h[m * ROWS + n] * s.weight[first + m] : 0.f;
    add_rows(tokens, to, h, ROWS, down_rows, next, size);
  }
}

template <class T>
inline int64_t grouped_ffn(const GroupedArgs& a) {
  struct Input;
  struct Results;
  const int64_t part = a.rows * a.size, groups = (a.neurons - a.shared) / a.width;
  Routes routes;
  if (!sort_by_group(a, groups, routes)) return 2;
  int64_t count;
  const Segment* segments = segments_of(a, groups, routes, count);
  const float* x = as_f32<Input>(static_cast<const T*>(a.x), part);
  float* results = scratch<Results>(a.threads * part);
  int64_t work = 0;
  for (int64_t i = 0; i < count; ++i) work += segments[i].steps() * segments[i].cost();

#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    const int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
    float* result = results + t * part;
    std::fill(result, result + part, 0.f);
    // This thread's part of the work, and where in it each segment begins.
    const int64_t begin = work * t / threads, end = work * (t + 1) / threads;
    int64_t before = 0;
    for (const Segment* s = segments; s < segments + count; before += s->steps() * s->cost(), ++s) {
      const auto step_at = [&](int64_t at) { return least(most(at - before + s->cost() - 1, 0) / s->cost(), s->steps()); };
      const int64_t last = step_at(end);
      for (int64_t step = step_at(begin); step < last; ++step) grouped_step<T>(a, *s, step, x, result);
    }
#pragma omp barrier
    sum_parts(results, threads, a.rows, a.size, Slab(a.size, t, threads), static_cast<const T*>(a.bias[2]),
              static_cast<T*>(a.out));
  }
  return 0;
}

}  // namespace ec
