// Decode: o = alpha * o + p . V for a few rows of weights and a run of values. Lanes are channels.
#pragma once
#include "matmul.h"
#include "side.h"

namespace ec {

// p[row * ld + token]; o[row * EP + channel], EP the size rounded up to whole vectors.
template <class T, int64_t E, int RB>
inline void weigh_dense(const T* v, int64_t stride, int64_t n, const float* p, int64_t ld, const float* alpha, float* o) {
  constexpr int64_t EP = round_up(E, VL), vectors = EP / VL;
  constexpr int NC = static_cast<int>(most(1, least(vectors, ACCUMULATORS / RB)));
  multiply<T, RB, NC>(RB, E, n, p, ld, v, stride, alpha, o, EP);
}

// sum_t p_t (c_t s_t + z_t), per channel group: the weight takes the token's scale, the zeros sum to one number a group.
// w[row][token][N] = p * (scales, zeros) as they lie in memory, N = steps * groups; sums[row][N] over tokens.
template <class P, int RB>
inline void scaled_weights(const Half* scales, int64_t n, const float* p, int64_t ld, float* w, int64_t wld, float* sums) {
  constexpr int64_t N = Side<P, Kind::value>::steps * Side<P, Kind::value>::groups;
  if constexpr (N <= VL && VL % N == 0) {
    constexpr int64_t step = VL / N;
    for (int r = 0; r < RB; ++r) {
      Vec total(0.f);
      for (int64_t i = 0; i < n; i += step) {
        // Beyond n the weights are 0, and so are the scales that load_f32() puts there.
        const Vec x = repeat<N>(p + r * ld + i) * load_f32(scales + i * N, (n - i) * N);
        x.store(w + r * wld + i * N);
        total = total + x;
      }
      alignas(64) float lanes[VL];
      total.store(lanes);
      for (int64_t j = 0; j < N; ++j) {
        float sum = 0.f;
        for (int64_t i = j; i < VL; i += N) sum += lanes[i];
        sums[r * N + j] = sum;
      }
    }
  } else {
    for (int r = 0; r < RB; ++r) {
      for (int64_t j = 0; j < N; ++j) sums[r * N + j] = 0.f;
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < N; ++j) {
          const float x = p[r * ld + i] * float(scales[i * N + j]);
          w[r * wld + i * N + j] = x;
          sums[r * N + j] += x;
        }
      }
    }
  }
}

template <class P, int RB>
inline void weigh_packed(const Side<P, Kind::value>& values, int64_t t, int64_t n, const float* p, int64_t ld,
                         const float* alpha, float* o) {
  using S = Side<P, Kind::value>;
  using W = Words<S::format, words_at_once<S>()>;
  constexpr int64_t E = S::size, N = S::steps * S::groups, at_once = words_at_once<S>();
  // NC vectors of words are read together, and KC of the vectors of codes in each of them are summed at a time.
  constexpr int64_t chunks = S::words / at_once;
  constexpr int KC = W::vectors <= 2 || RB * W::vectors <= ACCUMULATORS ? W::vectors : RB * 4 <= ACCUMULATORS ? 4 : 2;
  constexpr int64_t fit = most(1, ACCUMULATORS / (RB * KC));
  constexpr int64_t NC = chunks % least(fit, chunks) == 0 ? least(fit, chunks) : chunks % 2 == 0 && fit >= 2 ? 2 : 1;
  struct Weights;
  const int64_t wld = round_up(n * N, VL);
  float* w = scratch<Weights>(RB * wld);
  float sums[RB * N];
  const uint8_t* codes = values.code_at(t);
  scaled_weights<P, RB>(values.scale_at(t), n, p, ld, w, wld, sums);
  for (int64_t c = 0; c < chunks; c += NC) {
    for (int first = 0; first < W::vectors; first += KC) {
      Vec acc[RB][NC][KC];
      int64_t group[NC][KC];
      for (int64_t j = 0; j < NC; ++j) {
        for (int u = 0; u < KC; ++u) {
          group[j][u] = channel_of<S>((c + j) * at_once, first + u) / S::g;
          for (int r = 0; r < RB; ++r) acc[r][j][u] = Vec(0.f);
        }
      }
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < NC; ++j) {
          const W words(codes + i * S::row + (c + j) * at_once, S::words);
          for (int u = 0; u < KC; ++u) {
            const Vec x = words.at(first + u);
            for (int r = 0; r < RB; ++r)
              acc[r][j][u] = at::vec::fmadd(Vec(w[r * wld + i * N + group[j][u]]), x, acc[r][j][u]);
          }
        }
      }
      for (int r = 0; r < RB; ++r) {
        for (int64_t j = 0; j < NC; ++j) {
          for (int u = 0; u < KC; ++u) {
            const float offset =
                S::fp8 ? 0.f : sums[r * N + S::groups + group[j][u]] + CENTER<S::bits> * sums[r * N + group[j][u]];
            float* to = o + r * E + channel_of<S>((c + j) * at_once, first + u);
            at::vec::fmadd(Vec::loadu(to), Vec(alpha[r]), acc[r][j][u] + Vec(offset)).store(to);
          }
        }
      }
    }
  }
}

// The same for values that are packed per channel. Lanes are tokens, so each channel ends in a sum over lanes.
template <class P, int RB>
inline void weigh_columns(const Side<P, Kind::value>& values, int64_t t, int64_t n, const float* p, int64_t ld,
                          const float* alpha, float* o) {
  using S = Side<P, Kind::value>;
  constexpr int64_t EP = round_up(S::size, VL), g = S::g;
  for (int64_t w = 0; w < S::words; ++w) {
    for (int k = 0; k < S::per; ++k) {
      const int64_t e = w + k * S::words;
      Vec acc[RB];
      for (int r = 0; r < RB; ++r) acc[r] = Vec(0.f);
      for (int64_t first = 0; first < n; first += g) {
        const uint8_t* codes = values.code_at(t + first) + w * g;
        const Half* scale = values.scale_at(t + first);
        for (int64_t i = 0; i < g; i += VL) {
          const Vec x = dequantised<S>(Words<S::format>(codes + i, S::words * g).at(k), scale, e, S::size);
          for (int r = 0; r < RB; ++r) acc[r] = at::vec::fmadd(Vec::loadu(p + r * ld + first + i), x, acc[r]);
        }
      }
      for (int r = 0; r < RB; ++r) o[r * EP + e] = o[r * EP + e] * alpha[r] + sum_of(acc[r]);
    }
  }
}

template <class P, int RB>
inline void weigh(const Side<P, Kind::value>& values, int64_t t, int64_t n, bool tail, const float* p, int64_t ld,
                  const float* alpha, float* o) {
  using S = Side<P, Kind::value>;
  constexpr int64_t E = S::size;
  if constexpr (S::packed) {
    if (!tail) {
      if constexpr (S::per_channel) {
        return weigh_columns<P, RB>(values, t, n, p, ld, alpha, o);
      } else if constexpr (words_at_once<S>() > 0) {
        return weigh_packed<P, RB>(values, t, n, p, ld, alpha, o);
      } else {
        // A vector of words would straddle a part of the channels: read the run densely first.
        struct Dense;
        constexpr int64_t EP = round_up(E, VL);
        float* tile = scratch<Dense>(n * EP);
        for (int64_t i = 0; i < n; ++i) token_row(values, t + i, tile + i * EP);
        return weigh_dense<float, E, RB>(tile, EP, n, p, ld, alpha, o);
      }
    }
  }
  weigh_dense<typename P::scalar, E, RB>(values.rows(t), E, n, p, ld, alpha, o);
}

}  // namespace ec
