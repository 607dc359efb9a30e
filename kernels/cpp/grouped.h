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

// At most ROWS neurons, and the tokens that use them.
struct Unit {
  const int32_t* neurons;
  const int32_t* token;
  const float* weight;
  int32_t count, tokens;
};

// The units of a call. Groups with the same tokens and weights share units: single neurons would fill none.
inline const Unit* units_of(const GroupedArgs& a, int64_t groups, const Routes& routes, int64_t& count) {
  struct Tag;
  struct All;
  const int64_t most_units = a.neurons / ROWS + groups + 2;
  const int64_t words = most_units * static_cast<int64_t>(sizeof(Unit) / sizeof(float));
  auto* units = reinterpret_cast<Unit*>(scratch<Tag>(words + a.neurons));
  auto* neuron = reinterpret_cast<int32_t*>(units + most_units);
  float* ones = scratch<All>(2 * a.rows);
  auto* every = reinterpret_cast<int32_t*>(ones + a.rows);
  for (int64_t r = 0; r < a.rows; ++r) {
    ones[r] = 1.f;
    every[r] = static_cast<int32_t>(r);
  }
  count = 0;
  const auto add = [&](int64_t first, int64_t last, const int32_t* token, const float* weight, int64_t tokens) {
    bool same = false;
    if (count) {
      const Unit& open = units[count - 1];
      same = open.tokens == tokens && std::equal(token, token + tokens, open.token) &&
             std::equal(weight, weight + tokens, open.weight);
    }
    for (int64_t n = first; n < last; ++n, ++neuron, same = true) {
      *neuron = static_cast<int32_t>(n);
      if (same && units[count - 1].count < ROWS)
        ++units[count - 1].count;
      else
        units[count++] = {neuron, token, weight, 1, static_cast<int32_t>(tokens)};
    }
  };
  add(0, a.shared, every, ones, a.rows);
  for (int64_t g = 0; g < groups; ++g) {
    const int32_t from = routes.begin[g], tokens = routes.begin[g + 1] - from;
    const int64_t first = a.shared + g * a.width;
    if (tokens) add(first, first + a.width, routes.token + from, routes.weight + from, tokens);
  }
  return units;
}

template <class T>
inline int64_t grouped_ffn(const GroupedArgs& a) {
  struct Input;
  struct Results;
  const int64_t size = a.size, groups = (a.neurons - a.shared) / a.width;
  Routes routes;
  if (!sort_by_group(a, groups, routes)) return 2;
  int64_t count;
  const Unit* units = units_of(a, groups, routes, count);
  const float* x = as_f32<Input>(static_cast<const T*>(a.x), a.rows * size);
  const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up), *down = static_cast<const T*>(a.down);
  const T *gate_bias = static_cast<const T*>(a.bias[0]), *up_bias = static_cast<const T*>(a.bias[1]);
  float* results = scratch<Results>(a.threads * a.rows * size);
  // Reading a unit takes as long as computing it for some tokens.
  int64_t work = 0;
  for (int64_t i = 0; i < count; ++i) work += most(units[i].tokens, TOKENS);

#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    const int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
    float* result = results + t * a.rows * size;
    std::fill(result, result + a.rows * size, 0.f);
    const auto rows = [&](const T* matrix, const Unit& u) { return rows_of(matrix, size, u.neurons, u.count); };
    const int64_t begin = work * t / threads, end = work * (t + 1) / threads;
    for (int64_t i = 0, before = 0; i < count && before < end; before += most(units[i++].tokens, TOKENS)) {
      if (before < begin) continue;
      const Unit& u = units[i];
      const Rows<T> up_rows = rows(up, u), down_rows = rows(down, u), gate_rows = gate ? rows(gate, u) : up_rows;
      const Rows<T> next = rows(gate ? gate : up, units[least(i + 1, count - 1)]);
      for (int64_t first = 0; first < u.tokens; first += TOKENS) {
        const int64_t tokens = least(u.tokens - first, TOKENS);
        const float* from[TOKENS];
        float* to[TOKENS];
        for (int64_t m = 0; m < tokens; ++m) {
          from[m] = x + u.token[first + m] * size;
          to[m] = result + u.token[first + m] * size;
        }
        alignas(64) float g[TOKENS * ROWS + VL], h[TOKENS * ROWS + VL];
        if (gate) dots(tokens, from, gate_rows, up_rows, size, g);
        dots(tokens, from, up_rows, down_rows, size, h);
        for (int64_t m = 0; m < tokens; ++m) {
          for (int64_t n = 0; n < u.count; ++n) {
            if (gate_bias) g[m * ROWS + n] += static_cast<float>(gate_bias[u.neurons[n]]);
            if (up_bias) h[m * ROWS + n] += static_cast<float>(up_bias[u.neurons[n]]);
          }
        }
        activate(a.activation, gate ? g : nullptr, h, tokens * ROWS);
        for (int64_t m = 0; m < tokens; ++m)
          for (int64_t n = 0; n < ROWS; ++n) h[m * ROWS + n] = n < u.count ? h[m * ROWS + n] * u.weight[first + m] : 0.f;
        add_rows(tokens, to, h, ROWS, down_rows, next, size);
      }
    }
#pragma omp barrier
    sum_parts(results, threads, a.rows, size, Slab(size, t, threads), static_cast<const T*>(a.bias[2]),
              static_cast<T*>(a.out));
  }
  return 0;
}

}  // namespace ec
