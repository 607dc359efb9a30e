// What FFNs that read a part of their weights are made of: products with rows of a matrix that are listed, each read once
// for all tokens. A row is short and the next one is anywhere, so every product fetches the rows of the one after it.
#pragma once
#include <algorithm>

#include "vec.h"

namespace ec {

// Rows taken together, which is how many streams a core reads at a time, and tokens.
inline constexpr int ROWS = 8, TOKENS = 8;

template <class T>
struct Rows {
  const T* at[ROWS];
};

// Those of `ids`, `stride` apart, in a matrix of `ld` columns; with fewer than ROWS the last stands for missing ones.
template <class T>
inline Rows<T> rows_of(const T* matrix, int64_t ld, const int32_t* ids, int64_t stride, int64_t count) {
  Rows<T> rows;
  for (int64_t i = 0; i < ROWS; ++i) rows.at[i] = matrix + ids[least(i, count - 1) * stride] * ld;
  return rows;
}

template <class T, int M, int N>
inline void dots_block(const float* const* x, const T* const* w, const T* const* next, int64_t size, float* out) {
  Vec acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = Vec(0.f);
  int64_t j = 0;
  for (; j + VL <= size; j += VL) {
    Vec v[M];
    for (int m = 0; m < M; ++m) v[m] = Vec::loadu(x[m] + j);
    for (int n = 0; n < N; ++n) {
      const Vec row = load_f32(w[n] + j);
      prefetch(next[n] + j);
      for (int m = 0; m < M; ++m) acc[m][n] = at::vec::fmadd(v[m], row, acc[m][n]);
    }
  }
  if (j < size) {
    for (int n = 0; n < N; ++n) {
      const Vec row = load_f32(w[n] + j, size - j);
      for (int m = 0; m < M; ++m) acc[m][n] = at::vec::fmadd(load_f32(x[m] + j, size - j), row, acc[m][n]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) out[m * ROWS + n] = sum_of(acc[m][n]);
}

// out[m][n] = x[m] . w[n] for M tokens.
template <class T, int M>
inline void dots(const float* const* x, const Rows<T>& w, const Rows<T>& next, int64_t size, float* out) {
  constexpr int N = M <= 2 ? 8 : M <= 4 ? 4 : 2;
  for (int n = 0; n < ROWS; n += N) dots_block<T, M, N>(x, w.at + n, next.at + n, size, out + n);
}

template <class T>
inline void dots(int64_t tokens, const float* const* x, const Rows<T>& w, const Rows<T>& next, int64_t size, float* out) {
  switch (tokens) {
    case 1: return dots<T, 1>(x, w, next, size, out);
    case 2: return dots<T, 2>(x, w, next, size, out);
    case 3: return dots<T, 3>(x, w, next, size, out);
    case 4: return dots<T, 4>(x, w, next, size, out);
    case 5: return dots<T, 5>(x, w, next, size, out);
    case 6: return dots<T, 6>(x, w, next, size, out);
    case 7: return dots<T, 7>(x, w, next, size, out);
    default: return dots<T, 8>(x, w, next, size, out);
  }
}

// y[m] += sum over n of c[m * ld + n] * w[n].
template <class T>
inline void add_rows(int64_t tokens, float* const* y, const float* c, int64_t ld, const Rows<T>& w, const Rows<T>& next,
                     int64_t size) {
  static_assert(ROWS == 8);
  const auto step = [&](int64_t j, const Vec* row, int64_t count) {
    for (int64_t m = 0; m < tokens; ++m) {
      const float* f = c + m * ld;
      // Two chains: one of eight is longer than what there is to do beside it.
      Vec a = Vec(f[0]) * row[0], b = Vec(f[1]) * row[1];
      for (int n = 2; n < ROWS; n += 2) {
        a = at::vec::fmadd(Vec(f[n]), row[n], a);
        b = at::vec::fmadd(Vec(f[n + 1]), row[n + 1], b);
      }
      store_f32(y[m] + j, load_f32(y[m] + j, count) + (a + b), count);
    }
  };
  Vec row[ROWS];
  int64_t j = 0;
  for (; j + VL <= size; j += VL) {
    for (int n = 0; n < ROWS; ++n) {
      row[n] = load_f32(w.at[n] + j);
      prefetch(next.at[n] + j);
    }
    step(j, row, VL);
  }
  if (j < size) {
    for (int n = 0; n < ROWS; ++n) row[n] = load_f32(w.at[n] + j, size - j);
    step(j, row, size - j);
  }
}

// Rows of a matrix that some token keeps, and what each token adds of them: 0 where it does not keep it.
struct Kept {
  int32_t* ids;
  float* factor;  // [tokens, ld]
  int64_t count, ld;
};

// y[m] += the kept rows of w, `size` columns of them.
template <class T>
inline void add_kept(const T* w, int64_t ld, int64_t size, const Kept& k, int64_t tokens, float* const* y) {
  // As with segments of neurons: ROWS stretches of the list.
  const int64_t steps = (k.count + ROWS - 1) / ROWS;
  for (int64_t i = 0; i < steps; ++i) {
    const auto rows = [&](int64_t of) {
      return rows_of(w, ld, k.ids + of, steps, (k.count - of + steps - 1) / steps);
    };
    float factor[TOKENS * ROWS];
    for (int64_t m = 0; m < tokens; ++m)
      for (int64_t n = 0; n < ROWS; ++n) {
        const int64_t at = i + n * steps;
        factor[m * ROWS + n] = at < k.count ? k.factor[m * k.ld + at] : 0.f;
      }
    add_rows(tokens, y, factor, ROWS, rows(i), rows(least(i + 1, steps - 1)), size);
  }
}

// Tokens [rows, size] in fp32: the given ones, or copies of them.
template <class Tag, class T>
inline const float* as_f32(const T* x, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    float* copy = scratch<Tag>(count);
    for (int64_t j = 0; j < count; j += VL) store_f32(copy + j, load_f32(x + j, count - j), count - j);
    return copy;
  }
}

// The part of `count` columns, in whole vectors, that is thread t's.
struct Slab {
  int64_t begin, end;
  Slab(int64_t count, int64_t t, int64_t threads) {
    const int64_t each = round_up((count + threads - 1) / threads, VL);
    begin = least(t * each, count);
    end = least(begin + each, count);
  }
  int64_t size() const { return end - begin; }
};

// out[rows, size] = bias + the sum of `parts` partial results, in the columns of a slab.
template <class T>
inline void sum_parts(const float* parts, int64_t count, int64_t rows, int64_t size, Slab slab, const T* bias, T* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = slab.begin; j < slab.end; j += VL) {
      const int64_t n = slab.end - j;
      Vec sum = bias ? load_f32(bias + j, n) : Vec(0.f);
      for (int64_t p = 0; p < count; ++p) sum = sum + load_f32(parts + (p * rows + r) * size + j, n);
      store_f32(out + r * size + j, sum, n);
    }
  }
}

struct Silu {
  static Vec of(Vec x) { return x / (Vec(1.f) + x.neg().exp()); }
};
struct Gelu {
  static Vec of(Vec x) { return x * Vec(0.5f) * (Vec(1.f) + (x * Vec(0.70710678f)).erf()); }
};
struct GeluTanh {
  static Vec of(Vec x) {
    const Vec inner = at::vec::fmadd(Vec(0.044715f) * x * x, x, x) * Vec(0.79788456f);
    return x * Vec(0.5f) * (Vec(1.f) + inner.tanh());
  }
};
struct Relu {
  static Vec of(Vec x) { return at::vec::maximum(x, Vec(0.f)); }  // NaN stays
};

// In the order of WITH_KERNELS in effcompile/lowering/cpp_ffn.py.
enum Activation : int64_t { SILU, GELU, GELU_TANH, RELU };

template <class Act>
inline void apply(const float* g, float* u, int64_t count) {
  for (int64_t j = 0; j < count; j += VL) {
    const Vec v = Vec::loadu(u + j);
    (g ? Act::of(Vec::loadu(g + j)) * v : Act::of(v)).store(u + j);
  }
}

// u = act(g) * u, or act(u) without a gate, for `count` values rounded up to vectors.
inline void activate(int64_t kind, const float* g, float* u, int64_t count) {
  switch (kind) {
    case SILU: return apply<Silu>(g, u, count);
    case GELU: return apply<Gelu>(g, u, count);
    case GELU_TANH: return apply<GeluTanh>(g, u, count);
    default: return apply<Relu>(g, u, count);
  }
}

}  // namespace ec
