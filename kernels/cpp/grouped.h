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
  const float* threshold;  // null to keep every neuron
  const float* scale;  // [neurons] or null
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
  int64_t neurons_of(int64_t step) const { return (count - step + steps() - 1) / steps(); }
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

// Some tokens of a segment, at most TOKENS: what they read, and where their results are.
struct Some {
  const float* from[TOKENS];
  float* to[TOKENS];
  int64_t first, tokens;

  Some(const Segment& s, int64_t first_, const float* x, float* result, int64_t size)
      : first(first_), tokens(least(s.tokens - first_, TOKENS)) {
    for (int64_t m = 0; m < tokens; ++m) {
      from[m] = x + s.token[first + m] * size;
      to[m] = result + s.token[first + m] * size;
    }
  }
};

// The rows of one step in a matrix.
template <class T>
inline Rows<T> rows_at(const T* matrix, int64_t size, const Segment& s, int64_t step) {
  return rows_of(matrix, size, s.neurons + step, s.steps(), s.neurons_of(step));
}

// What the neurons of one step say of some tokens: h [TOKENS, ROWS] and a vector behind it. `next` is what is read then.
template <class T>
inline void say(const GroupedArgs& a, const Segment& s, int64_t step, const Some& some, const Rows<T>& next, float* h) {
  const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
  const T *gate_bias = static_cast<const T*>(a.bias[0]), *up_bias = static_cast<const T*>(a.bias[1]);
  alignas(64) float g[TOKENS * ROWS + VL];
  const Rows<T> up_rows = rows_at(up, a.size, s, step);
  if (gate) dots(some.tokens, some.from, rows_at(gate, a.size, s, step), up_rows, a.size, g);
  dots(some.tokens, some.from, up_rows, next, a.size, h);
  const int64_t count = s.neurons_of(step), steps = s.steps();
  for (int64_t n = 0; n < count && (gate_bias || up_bias); ++n) {
    const int32_t neuron = s.neurons[step + n * steps];
    for (int64_t m = 0; m < some.tokens; ++m) {
      if (gate_bias) g[m * ROWS + n] += static_cast<float>(gate_bias[neuron]);
      if (up_bias) h[m * ROWS + n] += static_cast<float>(up_bias[neuron]);
    }
  }
  activate(a.activation, gate ? g : nullptr, h, some.tokens * ROWS);
}

// Adds to `result` what the neurons of one step give.
template <class T>
inline void grouped_step(const GroupedArgs& a, const Segment& s, int64_t step, const float* x, float* result) {
  const Rows<T> down = rows_at(static_cast<const T*>(a.down), a.size, s, step);
  const Rows<T> next = rows_at(static_cast<const T*>(a.gate ? a.gate : a.up), a.size, s, least(step + 1, s.steps() - 1));
  const int64_t count = s.neurons_of(step);
  for (int64_t first = 0; first < s.tokens; first += TOKENS) {
    const Some some(s, first, x, result, a.size);
    alignas(64) float h[TOKENS * ROWS + VL];
    say(a, s, step, some, down, h);
    for (int64_t m = 0; m < some.tokens; ++m)
      for (int64_t n = 0; n < ROWS; ++n) h[m * ROWS + n] = n < count ? h[m * ROWS + n] * s.weight[first + m] : 0.f;
    add_rows(some.tokens, some.to, h, ROWS, down, next, a.size);
  }
}

// Steps after which rows of down are read where a threshold leaves some out: which, is known only then. Few enough that
// the weights of a run stay in a cache for the next tokens.
inline constexpr int64_t RUN = 32;

// The same of steps [step, stop), at most RUN, without the rows of down that no token keeps.
template <class T>
inline void grouped_run(const GroupedArgs& a, const Segment& s, int64_t step, int64_t stop, const float* x, float* result) {
  const int64_t steps = s.steps();
  int32_t ids[RUN * ROWS];
  float factor[TOKENS * RUN * ROWS];
  for (int64_t first = 0; first < s.tokens; first += TOKENS) {
    const Some some(s, first, x, result, a.size);
    Kept k{ids, factor, 0, RUN * ROWS};
    for (int64_t i = step; i < stop; ++i) {
      alignas(64) float h[TOKENS * ROWS + VL];
      const T* matrix = static_cast<const T*>(a.gate ? a.gate : a.up);
      say(a, s, i, some, rows_at(matrix, a.size, s, least(i + 1, steps - 1)), h);
      const int64_t count = s.neurons_of(i);
      for (int64_t n = 0; n < count; ++n) {
        const int32_t neuron = s.neurons[i + n * steps];
        const float scale = a.scale ? a.scale[neuron] : 1.f;
        bool any = false;
        for (int64_t m = 0; m < some.tokens; ++m) {
          const float v = h[m * ROWS + n];
          const bool small = std::fabs(v) * scale <= *a.threshold;  // never of NaN
          factor[m * k.ld + k.count] = small ? 0.f : v * s.weight[first + m];
          any |= !small;
        }
        ids[k.count] = neuron;
        k.count += any;
      }
    }
    add_kept(static_cast<const T*>(a.down), a.size, a.size, k, some.tokens, some.to);
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
      for (int64_t step = step_at(begin); step < last; step += a.threshold ? RUN : 1)
        if (a.threshold)
          grouped_run<T>(a, *s, step, least(step + RUN, last), x, result);
        else
          grouped_step<T>(a, *s, step, x, result);
    }
#pragma omp barrier
    sum_parts(results, threads, a.rows, a.size, Slab(a.size, t, threads), static_cast<const T*>(a.bias[2]),
              static_cast<T*>(a.out));
  }
  return 0;
}

}  // namespace ec
