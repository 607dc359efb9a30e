// y = x W^T + bias with W in few bits (effcompile/kernels/weight_ops.py): every code is read once for up to 8 rows of x.
#pragma once
#include <omp.h>

#include "digits.h"
#include "vec.h"

namespace ec {

struct QuantizedArgs {
  const void* input;     // [M, K]
  const uint8_t* codes;  // [J, G, g * bits / 8, 16]
  const Half* scales;    // [J, G, 16]
  const Half* zeros;     // the same, or null: symmetric
  const void* bias;      // [N] or null
  void* out;             // [M, N], or [K, J * 16] for the weight itself
  int64_t rows, outputs, inputs, group, bits, threads;
};

inline constexpr int64_t LANES = 16;
static_assert(LANES % VL == 0);

// The zeros of a group, of codes that are read minus CENTER.
template <int bits>
inline Vec zero_of(const Half* zeros, int64_t g, Vec scale) {
  const Vec zero = zeros ? load_f32(zeros + g * LANES) : scale * Vec(-float(1 << (bits - 1)));
  return at::vec::fmadd(scale, Vec(CENTER<bits>), zero);
}

// One vector of outputs: where its codes, scales and zeros begin.
template <int bits>
struct Outputs {
  const uint8_t* codes;
  const Half *scales, *zeros;
  Outputs(const QuantizedArgs& a, int64_t groups, int64_t first) {
    const int64_t block = first / LANES, lane = first % LANES;
    codes = a.codes + block * groups * (a.group * bits / 8) * LANES + lane;
    scales = a.scales + block * groups * LANES + lane;
    zeros = a.zeros ? a.zeros + block * groups * LANES + lane : nullptr;
  }
};

// x in fp32, each row [G * g] with zeros behind the last input, and behind the rows the sum of each group.
template <class T>
inline const float* padded(const QuantizedArgs& a, int64_t groups) {
  struct Input;
  const int64_t width = groups * a.group;
  float* x = scratch<Input>(a.rows * (width + groups) + VL);
  float* sums = x + a.rows * width;
  for (int64_t m = 0; m < a.rows; ++m) {
    const T* from = static_cast<const T*>(a.input) + m * a.inputs;
    float* to = x + m * width;
    for (int64_t k = 0; k < a.inputs; ++k) to[k] = static_cast<float>(from[k]);
    for (int64_t k = a.inputs; k < width; ++k) to[k] = 0.f;
    for (int64_t g = 0; g < groups; ++g) {
      float sum = 0.f;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < a.group; ++k) sum += to[g * a.group + k];
      sums[m * groups + g] = sum;
    }
  }
  return x;
}

// What was added up for M rows and N vectors of outputs, with the bias.
template <class T, int M, int N>
inline void put_block(const QuantizedArgs& a, const Vec (&acc)[M][N], int64_t row, int64_t first) {
  for (int n = 0; n < N; ++n) {
    const int64_t at = first + n * VL, count = a.outputs - at;
    if (count <= 0) break;
    const Vec bias = a.bias ? load_f32(static_cast<const T*>(a.bias) + at, count) : Vec(0.f);
    for (int m = 0; m < M; ++m) store_f32(static_cast<T*>(a.out) + (row + m) * a.outputs + at, acc[m][n] + bias, count);
  }
}

// M rows of x, from row `row`, by N vectors of outputs, from output `first`.
template <class T, int bits, int M, int N>
inline void quantized_block(const QuantizedArgs& a, const float* x, int64_t groups, int64_t row, int64_t first) {
  // Chains of products besides M * N: each has to wait for the one before it.
  constexpr int chains = M == 1 ? 2 : 1, vectors = Words<bits>::vectors;
  const int64_t width = groups * a.group, words = a.group / word_channels(bits), bytes = a.group * bits / 8;
  const int64_t ahead = N * groups * bytes * LANES;
  const float* sums = x + a.rows * width + row * groups;
  const uint8_t* codes[N];
  const Half *scales[N], *zeros[N];
  for (int n = 0; n < N; ++n) {
    const Outputs<bits> w(a, groups, first + n * VL);
    codes[n] = w.codes, scales[n] = w.scales, zeros[n] = w.zeros;
  }
  Vec acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = Vec(0.f);
  for (int64_t g = 0; g < groups; ++g) {
    const float* in = x + row * width + g * a.group;
    Vec part[chains][M][N];
    for (int c = 0; c < chains; ++c)
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) part[c][m][n] = Vec(0.f);
    for (int n = 0; n < N; ++n)
      for (int64_t i = 0; i < bytes * VL; i += 64) prefetch(codes[n] + ahead + i);
    const auto step = [&](int64_t j, int chain) {
      for (int n = 0; n < N; ++n) {
        const Words<bits> word(codes[n] + j * LANES, words * LANES);
        for (int k = 0; k < vectors; ++k) {
          const Vec v = word.at(k);
          Vec(&sum)[M][N] = part[(chain + k) % chains];
          for (int m = 0; m < M; ++m) sum[m][n] = at::vec::fmadd(Vec(in[m * width + k * words + j]), v, sum[m][n]);
        }
      }
    };
    int64_t j = 0;
    if constexpr (vectors == 1)
      for (; j + 2 <= words; j += 2) step(j, 0), step(j + 1, 1);
    for (; j < words; ++j) step(j, 0);
    for (int n = 0; n < N; ++n) {
      const Vec scale = load_f32(scales[n] + g * LANES), zero = zero_of<bits>(zeros[n], g, scale);
      for (int m = 0; m < M; ++m) {
        const Vec sum = chains == 2 ? part[0][m][n] + part[chains - 1][m][n] : part[0][m][n];
        acc[m][n] = at::vec::fmadd(sum, scale, at::vec::fmadd(Vec(sums[m * groups + g]), zero, acc[m][n]));
      }
      codes[n] += bytes * LANES;
    }
  }
  put_block<T, M, N>(a, acc, row, first);
}

#ifdef EC_DIGITS
// A single row, in digits. Sums of products within a group are exact for each digit, and put together in fp32.
template <class T, int bits, int N>
inline void digits_block(const QuantizedArgs& a, const float* x, const Digits& d, int64_t groups, int64_t first) {
  static_assert(VL == LANES);
  constexpr int fields = word_channels(bits), center = 1 << (bits - 1);
  const int64_t width = groups * a.group, words = a.group / fields, bytes = a.group * bits / 8;
  // A tile is too short for the CPU to see where it goes on: the next one is asked for while this one is read.
  const int64_t ahead = N * groups * bytes * LANES, steps = N * groups * LANES;
  const uint8_t* codes[N];
  const Half *scales[N], *zeros[N];
  for (int n = 0; n < N; ++n) {
    const Outputs<bits> w(a, groups, first + n * VL);
    codes[n] = w.codes, scales[n] = w.scales, zeros[n] = w.zeros;
  }
  Vec acc[1][N];
  for (int n = 0; n < N; ++n) acc[0][n] = Vec(0.f);
  for (int64_t g = 0; g < groups; ++g) {
    __m512i part[N][DIGITS];
    for (int i = 0; i < DIGITS; ++i)
      for (int n = 0; n < N; ++n) part[n][i] = _mm512_set1_epi32(-center * d.sums[g * DIGITS + i]);
    for (int64_t j = 0; j < words; j += 4)
      for (int n = 0; n < N; ++n) {
        const Quads<bits> quads(codes[n] + j * LANES, words * LANES);
        for (int b = 0; b < word_bytes(bits); ++b) prefetch(codes[n] + ahead + (b * words + j) * LANES);
        for (int k = 0; k < fields; ++k) {
          const __m512i code = quads.field(k);
          for (int i = 0; i < DIGITS; ++i) {
            int32_t four;
            std::memcpy(&four, d.bytes + i * width + g * a.group + k * words + j, 4);
            part[n][i] = _mm512_dpbusd_epi32(part[n][i], code, _mm512_set1_epi32(four));
          }
        }
      }
    for (int n = 0; n < N; ++n) {
      const Vec scale = load_f32(scales[n] + g * LANES);
      const Vec zero = zeros[n] ? at::vec::fmadd(scale, Vec(float(center)), load_f32(zeros[n] + g * LANES)) : Vec(0.f);
      prefetch(scales[n] + g * LANES + steps);
      if (zeros[n]) prefetch(zeros[n] + g * LANES + steps);
      Vec sum(0.f);
      for (int i = 0; i < DIGITS; ++i) sum = at::vec::fmadd(sum, Vec(256.f), Vec(_mm512_cvtepi32_ps(part[n][i])));
      acc[0][n] = at::vec::fmadd(sum, scale * Vec(d.steps[g]), at::vec::fmadd(Vec(x[width + g]), zero, acc[0][n]));
      codes[n] += bytes * LANES;
    }
  }
  put_block<T, 1, N>(a, acc, 0, first);
}
#endif

// All rows by the N vectors of a tile, whose codes stay in the first-level cache while the rows pass.
template <class T, int bits, int N>
inline void quantized_tile(const QuantizedArgs& a, const float* x, const Digits& d, int64_t groups, int64_t first) {
#ifdef EC_DIGITS
  if (d.steps) return digits_block<T, bits, N>(a, x, d, groups, first);
#endif
  for (int64_t row = 0; row < a.rows; row += 4) {
    switch (a.rows - row) {
      case 1: quantized_block<T, bits, 1, N>(a, x, groups, row, first); break;
      case 2: quantized_block<T, bits, 2, N>(a, x, groups, row, first); break;
      case 3: quantized_block<T, bits, 3, N>(a, x, groups, row, first); break;
      default: quantized_block<T, bits, 4, N>(a, x, groups, row, first);
    }
  }
}

template <class T, int bits>
inline int64_t quantized_linear(const QuantizedArgs& a) {
  // With one chain for each vector of outputs and row, there are enough of them to keep the units busy.
  constexpr int N = 2;
  const int64_t groups = (a.inputs + a.group - 1) / a.group;
  const float* x = padded<T>(a, groups);
  Digits digits{};
#ifdef EC_DIGITS
  if (a.rows == 1 && a.group / word_channels(bits) % 4 == 0) digits = digits_of(x, groups, a.group);
#endif
  // Whole blocks are there behind the last output, but no block behind the last.
  const int64_t vectors = (a.outputs + LANES - 1) / LANES * (LANES / VL), tiles = vectors / N;
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.threads > 1)
  for (int64_t tile = 0; tile < tiles; ++tile) quantized_tile<T, bits, N>(a, x, digits, groups, tile * N * VL);
  for (int64_t n = tiles * N; n < vectors; ++n) quantized_tile<T, bits, 1>(a, x, digits, groups, n * VL);
  return 0;
}

// The weight itself, transposed: [K, J * 16].
template <class T, int bits>
inline int64_t dequantize(const QuantizedArgs& a) {
  const int64_t groups = (a.inputs + a.group - 1) / a.group, vectors = (a.outputs + LANES - 1) / LANES * (LANES / VL);
  const int64_t words = a.group / word_channels(bits), bytes = a.group * bits / 8;
  T* out = static_cast<T*>(a.out);
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.threads > 1)
  for (int64_t n = 0; n < vectors; ++n) {
    const Outputs<bits> w(a, groups, n * VL);
    for (int64_t g = 0; g < groups; ++g) {
      const Vec scale = load_f32(w.scales + g * LANES), zero = zero_of<bits>(w.zeros, g, scale);
      for (int64_t j = 0; j < words; ++j) {
        const Words<bits> codes(w.codes + (g * bytes + j) * LANES, words * LANES);
        for (int k = 0; k < Words<bits>::vectors; ++k) {
          const int64_t input = g * a.group + k * words + j;
          if (input < a.inputs) store_f32(out + input * vectors * VL + n * VL, at::vec::fmadd(codes.at(k), scale, zero));
        }
      }
    }
  }
  return 0;
}

template <class T>
inline int64_t quantized(const QuantizedArgs& a, bool whole) {
  switch (a.bits) {
    case 8: return whole ? dequantize<T, 8>(a) : quantized_linear<T, 8>(a);
    case 4: return whole ? dequantize<T, 4>(a) : quantized_linear<T, 4>(a);
    case 3: return whole ? dequantize<T, 3>(a) : quantized_linear<T, 3>(a);
    case 2: return whole ? dequantize<T, 2>(a) : quantized_linear<T, 2>(a);
    default: return 1;
  }
}

template <class T>
inline int64_t quantized_linear(const QuantizedArgs& a) {
  return quantized<T>(a, false);
}

template <class T>
inline int64_t dequantize(const QuantizedArgs& a) {
  return quantized<T>(a, true);
}

}  // namespace ec
