// Small matrix blocks: C = alpha * C + A . B with C kept in registers. Lanes are columns of B.
#pragma once
#include "vec.h"

namespace ec {

// Register blocks for a result of `vectors` vectors a row: columns divide it, rows fill the rest of the register file.
struct Block {
  int rows, columns;
};
constexpr Block best_block(int64_t vectors) {
  constexpr int most_columns = ACCUMULATORS == 24 ? 5 : 3;
  int columns = 1;
  for (int n = 2; n <= most_columns; ++n)
    if (vectors % n == 0) columns = n;
  return {ACCUMULATORS / columns, columns};
}

// RB rows and NC vectors of columns. alpha null: C is overwritten. `width` is how many columns of B may be read.
template <class T, int RB, int NC, bool whole>
inline void multiply_block(const float* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, const float* alpha, float* c,
                           int64_t ldc, int64_t width) {
  Vec acc[RB][NC];
  for (int r = 0; r < RB; ++r)
    for (int j = 0; j < NC; ++j) acc[r][j] = Vec(0.f);
  for (int64_t k = 0; k < depth; ++k) {
    for (int j = 0; j < NC; ++j) {
      if (!whole && j * VL >= width) break;
      const T* at = b + k * ldb + j * VL;
      const Vec x = whole ? load_f32(at) : load_f32(at, width - j * VL);
      for (int r = 0; r < RB; ++r) acc[r][j] = at::vec::fmadd(Vec(a[r * lda + k]), x, acc[r][j]);
    }
  }
  // C is added last: sums of one block stay small, and so do their roundings.
  for (int r = 0; r < RB; ++r) {
    for (int j = 0; j < NC; ++j) {
      if (!whole && j * VL >= width) break;
      float* to = c + r * ldc + j * VL;
      (alpha ? at::vec::fmadd(Vec::loadu(to), Vec(alpha[r]), acc[r][j]) : acc[r][j]).store(to);
    }
  }
}

// C [rows, columns rounded up to vectors] = alpha * C + A [rows, depth] . B [depth, columns]. Rows are taken RB at a time:
// up to RB - 1 rows behind the last are read from A and written to C. Column blocks come first, so that a panel of B
// stays in the first-level cache while the rows pass.
template <class T, int RB, int NC>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const T* b, int64_t ldb,
                     const float* alpha, float* c, int64_t ldc) {
  for (int64_t j = 0; j < columns; j += NC * VL) {
    for (int64_t r = 0; r < rows; r += RB) {
      const float* factor = alpha ? alpha + r : nullptr;
      if (j + NC * VL <= columns)
        multiply_block<T, RB, NC, true>(a + r * lda, lda, b + j, ldb, depth, factor, c + r * ldc + j, ldc, 0);
      else
        multiply_block<T, RB, NC, false>(a + r * lda, lda, b + j, ldb, depth, factor, c + r * ldc + j, ldc, columns - j);
    }
  }
}

// out[column][row] = in[row][column] for `rows` rows of `columns` values of any element type, as fp32.
template <class T>
inline void transpose(const T* in, int64_t ld_in, int64_t rows, int64_t columns, float* out, int64_t ld_out) {
  int64_t done = 0;
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  alignas(64) float part[VL * VL];
  for (; done + VL <= rows; done += VL) {
    int64_t c = 0;
    for (; c + VL <= columns; c += VL) {
      if constexpr (std::is_same_v<T, float>) {
        at::vec::transpose_mxn<float, VL, VL>(in + done * ld_in + c, ld_in, out + c * ld_out + done, ld_out);
      } else {
        for (int64_t i = 0; i < VL; ++i) load_f32(in + (done + i) * ld_in + c).store(part + i * VL);
        at::vec::transpose_mxn<float, VL, VL>(part, VL, out + c * ld_out + done, ld_out);
      }
    }
    for (; c < columns; ++c)
      for (int64_t i = 0; i < VL; ++i) out[c * ld_out + done + i] = static_cast<float>(in[(done + i) * ld_in + c]);
  }
#endif
  for (; done < rows; ++done)
    for (int64_t c = 0; c < columns; ++c) out[c * ld_out + done] = static_cast<float>(in[done * ld_in + c]);
}

}  // namespace ec
