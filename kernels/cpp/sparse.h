// Products that read only the columns of a weight whose input counts: the weight is stored transposed, a column is a row,
// and a row is read for all tokens that keep it.
#pragma once
#include <omp.h>

#include "rows.h"

namespace ec {

struct ColumnArgs {
  const void* x;       // [rows, inputs]
  const void* weight;  // [inputs, outputs]
  const float* threshold;
  const float* scale;  // [inputs] or null
  const void* bias;    // [outputs] or null
  void* out;           // [rows, outputs]
  int64_t rows, inputs, outputs, threads;
};

struct ColumnFfnArgs {
  const void* x;           // [rows, size]
  const void* weight[3];   // of gate and up [size, neurons], of down [neurons, size]; gate may be null
  const float* threshold;  // [3]
  const float* scale[3];   // of gate and up [size], of down [neurons], or null
  const void* bias[3];     // of gate and up [neurons], of down [size], or null
  void* out;               // [rows, size]
  int64_t rows, size, neurons, activation, threads;
};

template <class Tag>
inline Kept keep(const float* x, int64_t ld, int64_t rows, int64_t inputs, const float* scale, float threshold) {
  Kept k;
  k.ld = inputs;
  k.factor = scratch<Tag>((rows + 1) * k.ld);
  k.ids = reinterpret_cast<int32_t*>(k.factor + rows * k.ld);
  k.count = 0;
  for (int64_t i = 0; i < inputs; ++i) {
    const float s = scale ? scale[i] : 1.f;
    bool any = false;
    for (int64_t m = 0; m < rows; ++m) {
      const float v = x[m * ld + i];
      const bool small = std::fabs(v) * s <= threshold;  // never of NaN
      k.factor[m * k.ld + k.count] = small ? 0.f : v;
      any |= !small;
    }
    k.ids[k.count] = static_cast<int32_t>(i);
    k.count += any;
  }
  return k;
}

// y[m] += the kept rows of w, `size` columns of them.
template <class T>
inline void add_kept(const T* w, int64_t ld, int64_t size, const Kept& k, int64_t tokens, float* y, int64_t ld_y) {
  float* to[TOKENS];
  for (int64_t m = 0; m < tokens; ++m) to[m] = y + m * ld_y;
  add_kept(w, ld, size, k, tokens, to);
}

// y[m] = bias, or 0.
template <class T>
inline void start_from(const T* bias, int64_t size, int64_t rows, float* y, int64_t ld) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t j = 0; j < size; j += VL)
      store_f32(y + m * ld + j, bias ? load_f32(bias + j, size - j) : Vec(0.f), size - j);
}

template <class T>
inline int64_t column_linear(const ColumnArgs& a) {
  struct Input;
  struct List;
  struct Result;
  const float* x = as_f32<Input>(static_cast<const T*>(a.x), a.rows * a.inputs);
  const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
  const Kept k = keep<List>(x, a.inputs, a.rows, a.inputs, a.scale, *a.threshold);
  T* out = static_cast<T*>(a.out);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    const Slab slab(a.outputs, omp_get_thread_num(), omp_get_num_threads());
    const int64_t n = slab.size();
    if (n > 0) {
      float* y = scratch<Result>(a.rows * n);
      start_from(bias ? bias + slab.begin : nullptr, n, a.rows, y, n);
      add_kept(weight + slab.begin, a.outputs, n, k, a.rows, y, n);
      for (int64_t m = 0; m < a.rows; ++m)
        for (int64_t j = 0; j < n; j += VL)
          store_f32(out + m * a.outputs + slab.begin + j, load_f32(y + m * n + j, n - j), n - j);
    }
  }
  return 0;
}

// A thread has the same neurons in all three products, so that it waits for nobody between them.
template <class T>
inline int64_t column_ffn(const ColumnFfnArgs& a) {
  struct Input;
  struct Lists;
  struct Middle;
  struct Results;
  const float* x = as_f32<Input>(static_cast<const T*>(a.x), a.rows * a.size);
  float* results = scratch<Results>(a.threads * a.rows * a.size);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    const int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
    const Slab slab(a.neurons, t, threads);
    const int64_t n = slab.size(), ld = round_up(n, VL);
    float* result = results + t * a.rows * a.size;
    std::fill(result, result + a.rows * a.size, 0.f);
    if (n > 0) {
      float* middle = scratch<Middle>(2 * a.rows * ld);
      float* part[2] = {middle, middle + a.rows * ld};  // of gate, of up
      for (int i = a.weight[0] ? 0 : 1; i < 2; ++i) {
        const T* bias = static_cast<const T*>(a.bias[i]);
        const Kept k = keep<Lists>(x, a.size, a.rows, a.size, a.scale[i], a.threshold[i]);
        start_from(bias ? bias + slab.begin : nullptr, n, a.rows, part[i], ld);
        add_kept(static_cast<const T*>(a.weight[i]) + slab.begin, a.neurons, n, k, a.rows, part[i], ld);
      }
      activate(a.activation, a.weight[0] ? part[0] : nullptr, part[1], a.rows * ld);
      const float* scale = a.scale[2] ? a.scale[2] + slab.begin : nullptr;
      const Kept k = keep<Lists>(part[1], ld, a.rows, n, scale, a.threshold[2]);
      const T* down = static_cast<const T*>(a.weight[2]) + slab.begin * a.size;
      add_kept(down, a.size, a.size, k, a.rows, result, a.size);
    }
#pragma omp barrier
    sum_parts(results, threads, a.rows, a.size, Slab(a.size, t, threads), static_cast<const T*>(a.bias[2]),
              static_cast<T*>(a.out));
  }
  return 0;
}

}  // namespace ec
