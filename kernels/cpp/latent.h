// Latents (effcompile/kernels/latent.py). Keys are rebuilt from them, a tile at a time: a product, then the norm, then RoPE.
// Values are summed as latents, and a row of sums becomes one of values at the end.
#pragma once
#include <cmath>

#include "parts.h"
#include "tile.h"

namespace ec {

// What makes keys of latents, for one key/value head.
template <class P>
struct Up {
  static constexpr int64_t R = P::latent, D = P::key_size, row = R + 2;
  const float* at;  // [D, R + 2]: the up-projection, the bias, the weight of the norm
  float eps;
  Up(const AttendArgs& a, int64_t head)
      : at(latent_args(a).up + head % a.groups * D * row), eps(static_cast<float>(latent_args(a).eps)) {}
};

// Keys [t, t + n), t a multiple of 16: out[channel][token], row length ld; latents is room for as much. What lies behind n
// in a last vector is not to be read.
template <class P>
inline void rebuild(const Side<P, Kind::key>& side, const Rope<P>& rope, const Up<P>& up, int64_t t, int64_t n, bool tail,
                    float* latents, float* out, int64_t ld) {
  constexpr int64_t D = P::key_size, R = P::latent, row = R + 2;
  constexpr int rows = 4, columns = ACCUMULATORS == 24 ? 4 : 3;  // rows divide D: none behind the last are touched
  transposed(side, t, n, tail, latents, ld, [&](int64_t at, float* to) { group_columns(side, at, to, ld); });
  multiply<float, rows, columns>(D, round_up(n, VL), R, up.at, row, latents, ld, nullptr, out, ld);
  for (int64_t i = 0; i < n; i += VL) {
    Vec squares(0.f);
    for (int64_t d = 0; d < D; ++d) {
      const Vec x = Vec::loadu(out + d * ld + i) + Vec(up.at[d * row + R]);
      x.store(out + d * ld + i);
      if constexpr (P::normed) squares = at::vec::fmadd(x, x, squares);
    }
    if constexpr (P::normed) {
      const Vec factor = Vec(1.f) / (squares / Vec(static_cast<float>(D)) + Vec(up.eps)).sqrt();
      for (int64_t d = 0; d < D; ++d)
        (Vec::loadu(out + d * ld + i) * factor * Vec(up.at[d * row + R + 1])).store(out + d * ld + i);
    }
    for (int64_t p = 0; p < Rope<P>::half; ++p) {
      float *low = out + Rope<P>::low(p) * ld + i, *high = out + Rope<P>::high(p) * ld + i;
      const auto* angle = rope.at(t + i, p);
      const Vec cos = load_f32(angle), sin = load_f32(angle + Rope<P>::sine);
      const Vec a = Vec::loadu(low), b = Vec::loadu(high);
      (a * cos - b * sin).store(low);
      (b * cos + a * sin).store(high);
    }
  }
}

// A row of sums over latents, `sums` [R + 1] with the sum of weights as its last, as the sums over values that they stand
// for: out [E rounded up to vectors].
template <class P>
inline void values_of(const AttendArgs& a, int64_t head, const float* sums, float* out) {
  constexpr int64_t E = P::value_size, R = P::value_latent;
  const float* up = latent_args(a).value_up + head % a.groups * (R + 1) * E;
  multiply<float, 1, least(8, round_up(E, VL) / VL)>(1, E, R + 1, sums, R + 1, up, E, nullptr, out, E);
}

}  // namespace ec
