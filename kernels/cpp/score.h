// Decode: scores of a few query rows against a run of keys.
#pragma once
#include "side.h"

namespace ec {

// s[row * ld + token] for RB rows and the packed keys [t, t + n), n a multiple of the group. Lanes are tokens.
//
// q . (c * scale + zero) = sum_d (q_d * scale_d) c_d  +  sum_d q_d * zero_d: the query takes the group's scale once, the
// second sum is one number for all tokens of the group, and a code costs one conversion for all rows.
template <class P, int RB>
inline void score_packed(const Side<P, Kind::key>& keys, int64_t t, int64_t n, const float* q, float* s, int64_t ld) {
  using S = Side<P, Kind::key>;
  constexpr int64_t D = S::size, DP = round_up(D, VL), g = S::g;
  // Two accumulators for each (row, vector of tokens) where they fit, so that consecutive FMAs do not wait for another.
  constexpr int64_t TV = 2 * RB * 2 <= ACCUMULATORS && g % (2 * VL) == 0 ? 2 : 1;
  constexpr int CHAINS = 2 * RB * TV <= ACCUMULATORS ? 2 : 1;
  alignas(64) float scaled[RB * DP];
  for (int64_t first = 0; first < n; first += g) {
    const uint8_t* codes = keys.code_at(t + first);
    const Half* scale = keys.scale_at(t + first);
    Vec offset[RB];
    for (int r = 0; r < RB; ++r) offset[r] = Vec(0.f);
    for (int64_t d = 0; d < D; d += VL) {
      const Vec step = load_f32(scale + d, D - d);
      const Vec zero = S::fp8 ? Vec(0.f) : at::vec::fmadd(step, Vec(CENTER<S::bits>), load_f32(scale + D + d, D - d));
      for (int r = 0; r < RB; ++r) {
        const Vec x = Vec::loadu(q + r * DP + d);
        (x * step).store(scaled + r * DP + d);
        offset[r] = at::vec::fmadd(x, zero, offset[r]);
      }
    }
    float base[RB];
    for (int r = 0; r < RB; ++r) base[r] = sum_of(offset[r]);
    for (int64_t i = 0; i < g; i += TV * VL) {
      Vec acc[CHAINS][RB][TV];
      for (int c = 0; c < CHAINS; ++c)
        for (int r = 0; r < RB; ++r)
          for (int64_t v = 0; v < TV; ++v) acc[c][r][v] = Vec(0.f);
      // Two words at a time where a word is one channel, so that both chains are used.
      constexpr int pair = S::per == 1 ? 2 : 1;
      for (int64_t w = 0; w < S::words; w += pair) {
        for (int u = 0; u < pair; ++u) {
          for (int64_t v = 0; v < TV; ++v) {
            const Words<S::format> words(codes + (w + u) * g + i + v * VL, S::words * g);
            for (int k = 0; k < S::per; ++k) {
              const Vec x = words.at(k);
              const int64_t d = w + u + k * S::words;
              for (int r = 0; r < RB; ++r)
                acc[(u + k) % CHAINS][r][v] = at::vec::fmadd(Vec(scaled[r * DP + d]), x, acc[(u + k) % CHAINS][r][v]);
            }
          }
        }
      }
      // The offset comes last: what is summed before stays small, and so do its roundings.
      for (int r = 0; r < RB; ++r) {
        for (int64_t v = 0; v < TV; ++v) {
          if constexpr (CHAINS == 2) acc[0][r][v] = acc[0][r][v] + acc[CHAINS - 1][r][v];
          (acc[0][r][v] + Vec(base[r])).store(s + r * ld + first + i + v * VL);
        }
      }
    }
  }
}

// The same for keys before RoPE: each pair of channels is dequantised, turned by its token's angle, and met by all rows.
template <class P, int RB>
inline void score_turned(const Side<P, Kind::key>& keys, const Rope<P>& rope, int64_t t, int64_t n, const float* q,
                         float* s, int64_t ld) {
  using S = Side<P, Kind::key>;
  using R = Rope<P>;
  constexpr int64_t D = S::size, DP = round_up(D, VL), g = S::g;
  float step[DP], zero[DP];
  for (int64_t first = 0; first < n; first += g) {
    const uint8_t* codes = keys.code_at(t + first);
    const Half* scale = keys.scale_at(t + first);
    for (int64_t d = 0; d < D; d += VL) {
      const Vec x = load_f32(scale + d, D - d);
      x.store(step + d);
      const Vec offset = S::fp8 ? Vec(0.f) : at::vec::fmadd(x, Vec(CENTER<S::bits>), load_f32(scale + D + d, D - d));
      offset.store(zero + d);
    }
    for (int64_t i = 0; i < g; i += VL) {
      Vec acc[2][RB];
      for (int r = 0; r < RB; ++r) acc[0][r] = acc[1][r] = Vec(0.f);
      const auto read = [&](int64_t word) { return Words<S::format>(codes + word * g + i, S::words * g); };
      const auto value = [&](Vec code, int64_t d) { return at::vec::fmadd(code, Vec(step[d]), Vec(zero[d])); };
      const auto channel = [&](int64_t d) { return value(read(d % S::words).at(static_cast<int>(d / S::words)), d); };
      const auto meet = [&](int64_t p, Vec a, Vec b) {
        const Half* angle = rope.at(t + first + i, p);
        const Vec cos = load_f32(angle), sin = load_f32(angle + R::sine);
        const Vec x = a * cos - b * sin, y = at::vec::fmadd(b, cos, a * sin);
        for (int r = 0; r < RB; ++r) {
          acc[0][r] = at::vec::fmadd(Vec(q[r * DP + R::low(p)]), x, acc[0][r]);
          acc[1][r] = at::vec::fmadd(Vec(q[r * DP + R::high(p)]), y, acc[1][r]);
        }
      };
      if constexpr (!P::adjacent && P::rotary == D && S::per > 1) {
        // Both channels of a pair lie in one word.
        for (int64_t w = 0; w < S::words; ++w) {
          const Words<S::format> words = read(w);
          for (int k = 0; k < S::per / 2; ++k) {
            const int64_t p = w + k * S::words;
            meet(p, value(words.at(k), p), value(words.at(k + S::per / 2), p + R::half));
          }
        }
      } else {
        for (int64_t p = 0; p < R::half; ++p) meet(p, channel(R::low(p)), channel(R::high(p)));
        for (int64_t d = P::rotary; d < D; ++d) {
          const Vec x = channel(d);
          for (int r = 0; r < RB; ++r) acc[0][r] = at::vec::fmadd(Vec(q[r * DP + d]), x, acc[0][r]);
        }
      }
      for (int r = 0; r < RB; ++r) (acc[0][r] + acc[1][r]).store(s + r * ld + first + i);
    }
  }
}

// The same for J tokens in model dtype. Lanes are channels.
template <class T, int64_t D, int RB, int J>
inline void score_tokens(const T* k, const float* q, float* s, int64_t ld) {
  constexpr int64_t DP = round_up(D, VL);
  Vec acc[RB][J];
  for (int r = 0; r < RB; ++r)
    for (int j = 0; j < J; ++j) acc[r][j] = Vec(0.f);
  const auto channels = [&](int64_t d, int64_t count) {
    for (int j = 0; j < J; ++j) {
      const Vec x = load_f32(k + j * D + d, count);
      for (int r = 0; r < RB; ++r) acc[r][j] = at::vec::fmadd(Vec::loadu(q + r * DP + d), x, acc[r][j]);
    }
  };
  for (int64_t d = 0; d + VL <= D; d += VL) channels(d, VL);
  if constexpr (D % VL) channels(D / VL * VL, D % VL);
  for (int r = 0; r < RB; ++r)
    for (int j = 0; j < J; ++j) s[r * ld + j] = sum_of(acc[r][j]);
}

template <class T, int64_t D, int RB>
inline void score_dense(const T* k, int64_t n, const float* q, float* s, int64_t ld) {
  constexpr int J = static_cast<int>(most(1, least(4, ACCUMULATORS / RB)));
  int64_t i = 0;
  for (; i + J <= n; i += J) {
    // Ahead of the hardware, which begins anew with each block of keys.
    for (int64_t j = 0; j < J * D; j += 64 / sizeof(T)) prefetch(k + (i + 4 * J) * D + j);
    score_tokens<T, D, RB, J>(k + i * D, q, s + i, ld);
  }
  for (; i < n; ++i) score_tokens<T, D, RB, 1>(k + i * D, q, s + i, ld);
}

template <class P, int RB>
inline void score(const Side<P, Kind::key>& keys, const Rope<P>& rope, int64_t t, int64_t n, bool tail, const float* q,
                  float* s, int64_t ld) {
  using S = Side<P, Kind::key>;
  if constexpr (S::packed) {
    if (!tail) {
      if constexpr (Rope<P>::on) {
        return score_turned<P, RB>(keys, rope, t, n, q, s, ld);
      } else if constexpr (S::per_channel) {
        return score_packed<P, RB>(keys, t, n, q, s, ld);
      } else {
        struct Dense;
        float* tile = scratch<Dense>(n * S::size);
        for (int64_t i = 0; i < n; ++i) token_row(keys, t + i, tile + i * S::size);
        return score_dense<float, S::size, RB>(tile, n, q, s, ld);
      }
    }
  }
  score_dense<typename P::scalar, S::size, RB>(keys.rows(t), n, q, s, ld);
}

}  // namespace ec
