// Which neurons tokens vote for: of each token those of the share of its positive ones that is largest.
#pragma once
#include <omp.h>

#include <algorithm>
#include <functional>

#include "vec.h"

namespace ec {

struct VotesArgs {
  const void* hidden;      // [rows, tokens, neurons]
  const uint8_t* counted;  // [counted_rows, tokens] or null
  int32_t* votes;          // [rows, neurons]
  int64_t rows, tokens, neurons, counted_rows, magnitude;
  double alpha;
  int64_t threads;
};

// Adds to `votes` those of one token; `ranked` has room for its neurons, rounded up to vectors, twice.
template <class T>
inline void vote(const VotesArgs& a, const T* hidden, float* ranked, int32_t* votes) {
  float* said = ranked + round_up(a.neurons, VL);
  int64_t positive = 0;
  for (int64_t j = 0; j < a.neurons; j += VL) {
    const Vec x = load_f32(hidden + j, least(a.neurons - j, VL));
    (a.magnitude ? x.abs() : x).store(said + j);
  }
  for (int64_t j = 0; j < a.neurons; ++j) {
    ranked[positive] = said[j];
    positive += said[j] > 0.f;  // NaN is not
  }
  const auto limit = static_cast<int64_t>(a.alpha * static_cast<double>(positive));
  if (!limit) return;
  std::nth_element(ranked, ranked + limit - 1, ranked + positive, std::greater<float>());
  const float last = ranked[limit - 1];
  int64_t ties = limit;
  for (int64_t j = 0; j < a.neurons; ++j) {
    votes[j] += said[j] > last;
    ties -= said[j] > last;
  }
  // Of those that tie for the last place the first.
  for (int64_t j = 0; j < a.neurons && ties; ++j) {
    votes[j] += said[j] == last;
    ties -= said[j] == last;
  }
}

template <class T>
inline int64_t core_votes(const VotesArgs& a) {
  struct Ranked;
  struct Parts;
  const int64_t all = a.rows * a.tokens, size = a.rows * a.neurons;
  auto* parts = reinterpret_cast<int32_t*>(scratch<Parts>(a.threads * size));
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    const int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
    int32_t* votes = parts + t * size;
    std::fill_n(votes, size, 0);
    float* ranked = scratch<Ranked>(2 * round_up(a.neurons, VL) + VL);
    for (int64_t i = all * t / threads; i < all * (t + 1) / threads; ++i) {
      const int64_t row = i / a.tokens, at = i % a.tokens;
      if (a.counted && !a.counted[(a.counted_rows == 1 ? 0 : row) * a.tokens + at]) continue;
      vote(a, static_cast<const T*>(a.hidden) + i * a.neurons, ranked, votes + row * a.neurons);
    }
#pragma omp barrier
    for (int64_t j = size * t / threads; j < size * (t + 1) / threads; ++j) {
      int32_t sum = 0;
      for (int64_t p = 0; p < threads; ++p) sum += parts[p * size + j];
      a.votes[j] = sum;
    }
  }
  return 0;
}

}  // namespace ec
