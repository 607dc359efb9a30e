// y = x W^T + bias for a few rows of x: every weight is read once, for all rows, at the speed of memory.
#pragma once
#include <omp.h>

#include <type_traits>

#include "vec.h"

namespace ec {

struct LinearArgs {
  const float* input;   // [M, K]
  const float* weight;  // [N, K]
  const float* bias;    // [N] or null
  float* out;           // [M, N]
  int64_t rows, outputs, inputs, threads;
};

// M rows by N outputs, whose accumulators stay in registers.
template <int M, int N>
inline void linear_block(const LinearArgs& a, int64_t first) {
  const int64_t k = a.inputs;
  const float* w = a.weight + first * k;
  Vec acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = Vec(0.f);
  int64_t j = 0;
  for (; j + VL <= k; j += VL) {
    Vec x[M];
    for (int m = 0; m < M; ++m) x[m] = Vec::loadu(a.input + m * k + j);
    for (int n = 0; n < N; ++n) {
      const Vec v = Vec::loadu(w + n * k + j);
      prefetch(w + (n + N) * k + j);  // the next block: rows are too short for the hardware to get into stride
      for (int m = 0; m < M; ++m) acc[m][n] = at::vec::fmadd(x[m], v, acc[m][n]);
    }
  }
  if (j < k) {
    for (int n = 0; n < N; ++n) {
      const Vec v = load_f32(w + n * k + j, k - j);
      for (int m = 0; m < M; ++m) acc[m][n] = at::vec::fmadd(load_f32(a.input + m * k + j, k - j), v, acc[m][n]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n)
      a.out[m * a.outputs + first + n] = sum_of(acc[m][n]) + (a.bias ? a.bias[first + n] : 0.f);
}

template <int M>
inline void linear_rows(const LinearArgs& a) {
  constexpr int N = M <= 2 ? 8 : M <= 4 ? 4 : 2;
  const int64_t blocks = a.outputs / N;
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.threads > 1)
  for (int64_t b = 0; b < blocks; ++b) linear_block<M, N>(a, b * N);
  for (int64_t n = blocks * N; n < a.outputs; ++n) linear_block<M, 1>(a, n);
}

template <class T>
inline int64_t linear(const LinearArgs& a) {
  static_assert(std::is_same_v<T, float>);
  switch (a.rows) {
    case 1: linear_rows<1>(a); return 0;
    case 2: linear_rows<2>(a); return 0;
    case 3: linear_rows<3>(a); return 0;
    case 4: linear_rows<4>(a); return 0;
    case 5: linear_rows<5>(a); return 0;
    case 6: linear_rows<6>(a); return 0;
    case 7: linear_rows<7>(a); return 0;
    case 8: linear_rows<8>(a); return 0;
    default: return 1;
  }
}

}  // namespace ec
