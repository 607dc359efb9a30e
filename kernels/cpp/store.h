// Quantise and append, and read back. Bit for bit what effcompile/kernels/quantize.py says.
#pragma once
#include <omp.h>

#include "side.h"

namespace ec {

inline constexpr float FP16_MAX = 65504.f;

// Scale, zero and levels of one group from its extremes; NaN passes through as in the reference.
template <int bits>
struct Step {
  Half scale, zero;
  Step(float low, float high) {
    constexpr float levels = (1 << bits) - 1;
    const float width = (high - low) / levels;
    scale = Half(width > FP16_MAX ? FP16_MAX : width);
    zero = Half(low > FP16_MAX ? FP16_MAX : low < -FP16_MAX ? -FP16_MAX : low);
  }
};

template <>
struct Step<E4M3> {
  static constexpr float zero = 0.f;
  Half scale;
  Step(float low, float high) {
    const float size = std::fabs(low) > std::fabs(high) ? std::fabs(low) : std::fabs(high);
    scale = Half(size / 448.f > FP16_MAX ? FP16_MAX : size / 448.f);
  }
};

// Codes as fp32 integers: round half to even of (x - zero) / scale, clamped; 0 where the scale is not positive.
template <int bits>
inline Vec quantized(Vec x, Vec scale, Vec zero) {
  const Vec positive = scale > Vec(0.f);
  const Vec step = Vec::blendv(Vec(1.f), scale, positive);
  const Vec code = ((x - zero) / step).round();
  return at::vec::clamp(code, Vec(0.f), Vec(static_cast<float>((1 << bits) - 1))) & positive;
}

inline void to_bytes(Vec x, uint8_t* p) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
#else
  float lanes[VL];
  x.store(lanes);
  for (int64_t i = 0; i < VL; ++i) p[i] = static_cast<uint8_t>(lanes[i]);
#endif
}

// The codes of VL numbers, one a byte.
template <int format>
inline void encode(Vec x, Vec scale, Vec zero, uint8_t* p) {
  if constexpr (format == E4M3) {
    const Vec positive = scale > Vec(0.f);
    const Vec step = Vec::blendv(Vec(1.f), scale, positive);
    alignas(64) float lanes[VL];
    (at::vec::clamp(x / step, Vec(-448.f), Vec(448.f)) & positive).store(lanes);
    for (int64_t i = 0; i < VL; ++i) p[i] = e4m3_code(lanes[i]);
  } else {
    to_bytes(quantized<format>(x, scale, zero), p);
  }
}

// One word of codes, from bytes that lie S::words apart to bytes that lie `stride` apart.
template <class S>
inline void write_word(const uint8_t* codes, uint8_t* out, int64_t stride) {
  uint32_t word = codes[0];
  for (int k = 1; k < S::per; ++k) word |= uint32_t(codes[k * S::words]) << (k * S::bits);
  for (int b = 0; b < word_bytes(S::format); ++b) out[b * stride] = static_cast<uint8_t>(word >> (8 * b));
}

// Where tokens come from: old ones from the ring, new ones from the caller's tensor.
template <class P, Kind kind>
struct Source {
  using S = Side<P, kind>;
  using T = typename P::scalar;
  S side;
  const T* fresh;
  int64_t stride, length;
  const T* at(int64_t t) const { return t < length ? side.rows(t) : fresh + (t - length) * stride; }
};

// A group of keys as fp32 before RoPE: out[token][channel], row length DP. Rounded as the reference rounds it.
template <class P>
inline void turn_back(const Source<P, Kind::key>& from, const Rope<P>& rope, int64_t t, float* out) {
  using S = Side<P, Kind::key>;
  using R = Rope<P>;
  constexpr int64_t D = S::size, DP = round_up(D, VL);
  for (int64_t i = 0; i < S::g; ++i) {
    float* row = out + i * DP;
    for (int64_t d = 0; d < D; d += VL) load_f32(from.at(t + i) + d, D - d).store(row + d);
    for (int64_t p = 0; p < R::half; ++p) {
      const Half* angle = rope.at(t + i, p);
      const float cos = *angle, sin = angle[R::sine], square = cos * cos + sin * sin;
      const float a = row[R::low(p)], b = row[R::high(p)];
      row[R::low(p)] = (a * cos + b * sin) / square;
      row[R::high(p)] = (b * cos - a * sin) / square;
    }
  }
}

template <class P, Kind kind>
inline void pack_channels(const Source<P, kind>& from, const Rope<P>& rope, int64_t t) {
  using S = Side<P, kind>;
  constexpr bool turn = Rope<P>::on && kind == Kind::key;
  constexpr int64_t D = S::size, DP = round_up(D, VL), g = S::g;
  struct Codes;
  struct Turned;
  uint8_t* codes = reinterpret_cast<uint8_t*>(scratch<Codes>(g * DP / 4));
  Half* scales = from.side.scale_at(t);
  float* turned = nullptr;
  if constexpr (turn) turn_back(from, rope, t, turned = scratch<Turned>(g * DP));
  const auto given = [&](int64_t i, int64_t d) {
    if constexpr (turn)
      return Vec::loadu(turned + i * DP + d);
    else
      return load_f32(from.at(t + i) + d, D - d);
  };
  for (int64_t d = 0; d < D; d += VL) {
    Vec low = given(0, d), high = low;
    for (int64_t i = 1; i < g; ++i) {
      const Vec x = given(i, d);
      low = at::vec::minimum(low, x);
      high = at::vec::maximum(high, x);
    }
    alignas(64) float lows[VL], highs[VL];
    low.store(lows);
    high.store(highs);
    for (int64_t j = 0; j < least(VL, D - d); ++j) {
      const Step<S::format> step(lows[j], highs[j]);
      scales[d + j] = step.scale;
      if constexpr (S::steps == 2) scales[D + d + j] = step.zero;
    }
    const Vec scale = load_f32(scales + d, D - d), zero = S::fp8 ? Vec(0.f) : load_f32(scales + D + d, D - d);
    for (int64_t i = 0; i < g; ++i)
      encode<S::format>(given(i, d), scale, zero, codes + i * DP + d);
  }
  for (int64_t r = 0; r < S::words; ++r)
    for (int64_t i = 0; i < g; ++i) write_word<S>(codes + i * DP + r, from.side.code_at(t) + r * g + i, S::words * g);
}

template <class P, Kind kind>
inline void pack_tokens(const Source<P, kind>& from, int64_t first) {
  using S = Side<P, kind>;
  constexpr int64_t E = S::size, g = S::g;
  for (int64_t t = first; t < first + g; ++t) {
    alignas(64) uint8_t codes[E];
    Half* scales = from.side.scale_at(t);
    for (int64_t j = 0; j < S::groups; ++j) {
      const auto* x = from.at(t) + j * g;
      Vec low = load_f32(x), high = low;
      for (int64_t e = VL; e < g; e += VL) {
        low = at::vec::minimum(low, load_f32(x + e));
        high = at::vec::maximum(high, load_f32(x + e));
      }
      const Step<S::format> step(min_of(low), max_of(high));
      scales[j] = step.scale;
      if constexpr (S::steps == 2) scales[S::groups + j] = step.zero;
      for (int64_t e = 0; e < g; e += VL)
        encode<S::format>(load_f32(x + e), Vec(float(step.scale)), Vec(float(step.zero)), codes + j * g + e);
    }
    for (int64_t r = 0; r < S::words; ++r) write_word<S>(codes + r, from.side.code_at(t) + r, S::words);
  }
}

template <class P, Kind kind>
inline Source<P, kind> source(const StoreArgs& a, int64_t head, int64_t length) {
  constexpr int k = kind == Kind::key ? 0 : 1;
  const auto* fresh = static_cast<const typename P::scalar*>(a.fresh[k]) + head / a.groups[k] * a.stride[k][0] +
                      head % a.groups[k] * a.stride[k][1];
  return {Side<P, kind>(a.state, head, a.capacity), fresh, a.stride[k][2], length};
}

// Packs group t of one head, then (another call, later) copies rows: a group may still lie in ring slots that the new
// tokens take over, so all packing comes first.
template <class P, Kind kind>
inline void pack(const StoreArgs& a, int64_t head, int64_t length, int64_t t) {
  using S = Side<P, kind>;
  if constexpr (S::packed && S::per_channel)
    pack_channels(source<P, kind>(a, head, length), Rope<P>(a.state, head / a.groups[0], a.capacity), t);
  if constexpr (S::packed && !S::per_channel) pack_tokens(source<P, kind>(a, head, length), t);
}

template <class P, Kind kind>
inline void copy_rows(const StoreArgs& a, int64_t head, int64_t length) {
  using S = Side<P, kind>;
  const auto from = source<P, kind>(a, head, length);
  const int64_t total = length + a.tokens, first = S::packed ? most(length, total - S::slots) : length;
  for (int64_t t = first; t < total; ++t)
    std::memcpy(from.side.rows(t), from.at(t), S::size * sizeof(typename P::scalar));
}

// Returns 1, having written nothing, if the tokens do not fit.
template <class P>
int64_t append(const StoreArgs& a) {
  const int64_t length = *a.state.length, total = length + a.tokens;
  const int64_t keys = a.batch * a.groups[0], heads = keys + a.batch * a.groups[1];  // of both sides, keys first
  if (length < 0 || total > a.capacity) return 1;
  const bool ring = P::key_bits != 16 || P::value_bits != 16;
  const int64_t start = ring ? packed_length<P>(length) : 0, stop = ring ? packed_length<P>(total) : 0;
  const int64_t groups = (stop - start) / P::group;
  const int64_t threads = heads * a.tokens < 512 && groups * heads < 8 ? 1 : a.threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
// One by one: the two sides do not take the same time.
#pragma omp for schedule(static, 1)
    for (int64_t item = 0; item < heads * groups; ++item) {
      const int64_t head = item / groups, t = start + item % groups * P::group;
      head < keys ? pack<P, Kind::key>(a, head, length, t) : pack<P, Kind::value>(a, head - keys, length, t);
    }
#pragma omp for schedule(static, 1)
    for (int64_t head = 0; head < heads; ++head)
      head < keys ? copy_rows<P, Kind::key>(a, head, length) : copy_rows<P, Kind::value>(a, head - keys, length);
  }
  return 0;
}

// fp32 rows in model dtype, n values.
template <class T>
inline void convert_row(const float* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; i += VL) store_f32(to + i, load_f32(from + i, n - i), n - i);
}

template <class P, Kind kind>
inline void read_back(const LoadArgs& a, int64_t head, int64_t t, int64_t n, bool tail) {
  using S = Side<P, kind>;
  using T = typename P::scalar;
  const S side(a.state, head, a.capacity);
  T* out = static_cast<T*>(a.out[kind == Kind::key ? 0 : 1]) + (head * a.capacity + t) * S::size;
  if constexpr (S::packed) {
    if (!tail) {
      struct Tile;
      constexpr int64_t g = S::g, padded = round_up(S::size, VL);
      float* tile = scratch<Tile>((g + VL) * padded);
      for (int64_t first = 0; first < n; first += g) {
        if constexpr (S::per_channel) {
          float* row = tile + g * padded;
          if constexpr (kind == Kind::key)
            key_columns(side, Rope<P>(a.state, head / a.groups, a.capacity), t + first, tile, g);
          else
            group_columns(side, t + first, tile, g);
          for (int64_t i = 0; i < g; ++i) {
            for (int64_t d = 0; d < S::size; ++d) row[d] = tile[d * g + i];
            convert_row(row, out + (first + i) * S::size, S::size);
          }
        } else {
          for (int64_t i = 0; i < g; ++i) {
            token_row(side, t + first + i, tile);
            convert_row(tile, out + (first + i) * S::size, S::size);
          }
        }
      }
      return;
    }
  }
  std::memcpy(out, side.rows(t), n * S::size * sizeof(T));
}

// The first `length` tokens densely, zeros behind them.
template <class P>
int64_t read(const LoadArgs& a) {
  using T = typename P::scalar;
  constexpr int64_t BK = P::group * most(1, 128 / P::group);
  const int64_t length = *a.state.length, stop = packed_length<P>(length), heads = a.batch * a.groups;
  if (length < 0 || length > a.capacity) return 1;
  const int64_t blocks = (a.capacity + BK - 1) / BK;
  const int64_t threads = heads * blocks < 4 ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t item = 0; item < heads * blocks; ++item) {
    const int64_t head = item / blocks, from = item % blocks * BK, to = least(a.capacity, from + BK);
    const int64_t end = most(from, least(length, to));
    for_runs<P>(from, end, stop, BK, [&](int64_t t, int64_t n, bool tail) {
      read_back<P, Kind::key>(a, head, t, n, tail);
      read_back<P, Kind::value>(a, head, t, n, tail);
    });
    const int64_t row = head * a.capacity + end;
    std::memset(static_cast<T*>(a.out[0]) + row * P::key_size, 0, (to - end) * P::key_size * sizeof(T));
    std::memset(static_cast<T*>(a.out[1]) + row * P::value_size, 0, (to - end) * P::value_size * sizeof(T));
  }
  return 0;
}

}  // namespace ec
