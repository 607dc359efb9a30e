// y = up (down x) + S x + bias for a few rows of x: both factors are read once for all rows, at the speed of memory, and
// what is between them stays in fp32 and in the cache. S is sparse, by rows, and is read beside `up`.
#pragma once
#include <omp.h>

#include "rows.h"

namespace ec {

struct LowRankArgs {
  const void* x;     // [rows, inputs]
  const void* down;  // [rank, inputs]
  const void* up;    // [outputs, rank]
  const void* bias;  // [outputs] or null
  void* out;         // [rows, outputs]
  const void* values;     // [entries] or null
  const void* columns;    // [entries], int16 or int32
  const int32_t* starts;  // [outputs + 1]
  int64_t rows, inputs, rank, outputs, threads, narrow;
};

// A row of the residual times x.
template <class T, class I>
inline float sparse_dot(const T* values, const I* columns, int64_t begin, int64_t end, const float* x) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = begin; k < end; ++k) sum += static_cast<float>(values[k]) * x[columns[k]];
  return sum;
}

template <class T>
inline float residual_of(const LowRankArgs& a, int64_t n, const float* x) {
  if (!a.values) return 0.f;
  const T* values = static_cast<const T*>(a.values);
  const int64_t begin = a.starts[n], end = a.starts[n + 1];
  return a.narrow ? sparse_dot(values, static_cast<const int16_t*>(a.columns), begin, end, x)
                  : sparse_dot(values, static_cast<const int32_t*>(a.columns), begin, end, x);
}

// put(m, n, x[m] . w[n]) for the rows of a matrix [count, size] that are thread t's, in whole blocks.
template <class T, class Put>
inline void own_products(const float* const* x, int64_t tokens, const T* w, int64_t count, int64_t size, int64_t t,
                         int64_t threads, const Put& put) {
  const int64_t blocks = (count + ROWS - 1) / ROWS;
  const int64_t begin = blocks * t / threads * ROWS, end = least(blocks * (t + 1) / threads * ROWS, count);
  float found[TOKENS * ROWS];
  for (int64_t n = begin; n < end; n += ROWS) {
    Rows<T> rows, next;
    for (int64_t i = 0; i < ROWS; ++i) {
      rows.at[i] = w + least(n + i, end - 1) * size;  // with fewer than ROWS the last stands for missing ones
      next.at[i] = w + least(n + ROWS + i, end - 1) * size;
    }
    dots(tokens, x, rows, next, size, found);
    for (int64_t m = 0; m < tokens; ++m)
      for (int64_t i = 0; i < least(ROWS, end - n); ++i) put(m, n + i, found[m * ROWS + i]);
  }
}

template <class T>
inline int64_t low_rank_linear(const LowRankArgs& a) {
  struct Input;
  struct Middle;
  if (a.rows < 1 || a.rows > TOKENS) return 1;
  const float* input = as_f32<Input>(static_cast<const T*>(a.x), a.rows * a.inputs);
  float* middle = scratch<Middle>(a.rows * a.rank);
  const float *from[TOKENS], *through[TOKENS];
  for (int64_t m = 0; m < a.rows; ++m) {
    from[m] = input + m * a.inputs;
    through[m] = middle + m * a.rank;
  }
  const T* bias = static_cast<const T*>(a.bias);
  T* out = static_cast<T*>(a.out);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    const int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
    own_products(from, a.rows, static_cast<const T*>(a.down), a.rank, a.inputs, t, threads,
                 [&](int64_t m, int64_t n, float y) { middle[m * a.rank + n] = y; });
#pragma omp barrier
    own_products(through, a.rows, static_cast<const T*>(a.up), a.outputs, a.rank, t, threads,
                 [&](int64_t m, int64_t n, float y) {
                   y += residual_of<T>(a, n, from[m]);
                   out[m * a.outputs + n] = static_cast<T>(y + (bias ? static_cast<float>(bias[n]) : 0.f));
                 });
  }
  return 0;
}

}  // namespace ec
