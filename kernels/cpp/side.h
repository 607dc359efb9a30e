// Where one side (keys or values) of one batch entry and head lies, and how to read tiles of it as fp32.
// Layouts: effcompile/kernels/form.py. P is the program: a struct of constexprs written by lowering/cpp.py.
#pragma once
#include "args.h"
#include "vec.h"

namespace ec {

enum class Kind { key, value };

// What P derives from where a side is not as usual: keys are integers with a scale per channel, values per token.
struct keys_per_token {};
struct values_per_channel {};
struct keys_e4m3 {};
struct values_e4m3 {};

// Tokens of the first n that are packed.
template <class P>
inline int64_t packed_length(int64_t n) {
  if constexpr (P::key_bits == 16 && P::value_bits == 16) return n;
  return n > P::residual ? (n - P::residual) / P::group * P::group : 0;
}

template <class P, Kind kind>
struct Side {
  using T = typename P::scalar;
  static constexpr int bits = kind == Kind::key ? P::key_bits : P::value_bits;
  static constexpr bool fp8 = std::is_base_of_v<std::conditional_t<kind == Kind::key, keys_e4m3, values_e4m3>, P>;
  static constexpr int format = fp8 ? E4M3 : bits;
  static constexpr bool per_channel =
      kind == Kind::key ? !std::is_base_of_v<keys_per_token, P> : std::is_base_of_v<values_per_channel, P>;
  static constexpr int64_t steps = fp8 ? 1 : 2;  // of a group: its scale, and its zero
  static constexpr int64_t rank = kind == Kind::key ? P::latent : P::value_latent;  // of latents; 0: none
  static constexpr int64_t size = rank > 0 ? rank : kind == Kind::key ? P::key_size : P::value_size;
  static constexpr int64_t g = P::group, slots = P::residual + P::group;
  static constexpr bool packed = bits != 16;
  static constexpr int64_t row = size * bits / 8;  // code bytes of one token
  static constexpr int64_t groups = size / g;      // of a token's channels
  static constexpr int per = packed ? word_channels(format) : 1;
  static constexpr int64_t words = size / per;  // of a token; word r holds channels r + k * words

  T* dense;        // [C, size], or the tail [W, size]
  uint8_t* codes;  // per channel [C/g, row, g], per token [C, row]
  Half* scales;    // per channel [C/g, steps, size], per token [C, steps, size/g]

  Side(const State& state, int64_t head, int64_t capacity) {
    void* const* at = kind == Kind::key ? state.k : state.v;
    if constexpr (packed) {
      codes = static_cast<uint8_t*>(at[0]) + head * capacity * row;
      scales = static_cast<Half*>(at[1]) + head * steps * (per_channel ? capacity / g * size : capacity * groups);
      dense = static_cast<T*>(at[2]) + head * slots * size;
    } else {
      codes = nullptr;
      scales = nullptr;
      dense = static_cast<T*>(at[0]) + head * capacity * size;
    }
  }

  // Rows of model dtype from token t on: in the ring for a packed side. A run never crosses the end of the ring.
  T* rows(int64_t t) const { return dense + (packed ? t % slots : t) * size; }
  uint8_t* code_at(int64_t t) const { return codes + t * row; }  // per channel: t is a multiple of g
  Half* scale_at(int64_t t) const { return scales + steps * (per_channel ? t / g * size : t * groups); }

  // Asks for tokens [t, t + n), packed or dense for good, t a multiple of the group.
  void fetch(int64_t t, int64_t n) const {
    const auto lines = [](const void* from, const void* to) {
      for (auto* p = static_cast<const char*>(from); p < to; p += 64) prefetch(p);
    };
    if constexpr (packed)
      lines(code_at(t), code_at(t + n)), lines(scale_at(t), scale_at(t + n));
    else
      lines(rows(t), rows(t) + n * size);
  }
};

// Calls body(first, count, in_tail) for runs of tokens that cover [from, to), each at most `block` long and contiguous in
// every buffer. Runs in the packed part are multiples of the group when `from` is.
template <class P, class Body>
inline void for_runs(int64_t from, int64_t to, int64_t stop, int64_t block, Body&& body) {
  constexpr bool ring = P::key_bits != 16 || P::value_bits != 16;
  constexpr int64_t slots = P::residual + P::group;
  for (int64_t t = from; t < to;) {
    int64_t n = least(block, to - t);
    const bool tail = ring && t >= stop;
    if (tail)
      n = least(n, slots - t % slots);
    else
      n = least(n, stop - t);
    body(t, n, tail);
    t += n;
  }
}

// The angles of one batch entry, and which channels they turn (effcompile/kernels/rope.py).
template <class P>
struct Rope {
  static constexpr int64_t run = 16, half = P::rotary / 2;
  static constexpr bool on = P::rotary > 0;
  using Angle = std::conditional_t<(P::latent > 0), float, Half>;
  const Angle* table = nullptr;

  Rope(const State& state, int64_t batch, int64_t capacity) {
    if constexpr (on) table = static_cast<const Angle*>(state.table) + batch * (capacity / run * 2 * half * run);
  }

  // The channels of pair p.
  static constexpr int64_t low(int64_t p) { return P::adjacent ? 2 * p : p; }
  static constexpr int64_t high(int64_t p) { return P::adjacent ? 2 * p + 1 : p + half; }

  // cos of pair p for the tokens from t on, which is a multiple of the vector or within a run; sin stands `sine` behind.
  const Angle* at(int64_t t, int64_t p) const { return table + (t / run * 2 * half + p) * run + t % run; }
  static constexpr int64_t sine = half * run;
};

// Codes as they come from Words, dequantised as the reference rounds it: a product, then a sum. `at` says which of the
// scales, `count` how many there are before the zeros.
template <class S>
inline Vec dequantised(Vec code, const Half* scale, int64_t at, int64_t count) {
  if constexpr (S::fp8)
    return code * Vec(float(scale[at]));
  else
    return (code + Vec(CENTER<S::bits>)) * Vec(float(scale[at])) + Vec(float(scale[count + at]));
}

// One group of tokens, packed per channel, as fp32 and transposed: out[channel][token], row length ld.
template <class S>
inline void group_columns(const S& side, int64_t t, float* out, int64_t ld) {
  const uint8_t* codes = side.code_at(t);
  const Half* scale = side.scale_at(t);
  for (int64_t r = 0; r < S::words; ++r) {
    for (int64_t i = 0; i < S::g; i += VL) {
      const Words<S::format> words(codes + r * S::g + i, S::words * S::g);
      for (int k = 0; k < S::per; ++k) {
        const int64_t d = r + k * S::words;
        dequantised<S>(words.at(k), scale, d, S::size).store(out + d * ld + i);
      }
    }
  }
}

// The same for keys, which are turned if they are stored before RoPE.
template <class P, class S>
inline void key_columns(const S& side, const Rope<P>& rope, int64_t t, float* out, int64_t ld) {
  static_assert(Rope<P>::run % VL == 0 || !Rope<P>::on);
  group_columns(side, t, out, ld);
  for (int64_t p = 0; p < Rope<P>::half; ++p) {
    float *low = out + Rope<P>::low(p) * ld, *high = out + Rope<P>::high(p) * ld;
    for (int64_t i = 0; i < S::g; i += VL) {
      const Half* angle = rope.at(t + i, p);
      const Vec cos = load_f32(angle), sin = load_f32(angle + Rope<P>::sine);
      const Vec a = Vec::loadu(low + i), b = Vec::loadu(high + i);
      (a * cos - b * sin).store(low + i);
      (b * cos + a * sin).store(high + i);
    }
  }
}

// How the channels of a token are read in vectors: `count` words at a time, VL of them or all of a token's if they are
// half as many. None if a vector of codes would not be channels in a row.
template <class S>
constexpr int64_t words_at_once() {
#if defined(CPU_CAPABILITY_AVX512)
  if (S::words == VL / 2 && S::per % 2 == 0) return VL / 2;
#endif
  return S::words % VL == 0 ? VL : 0;
}

// The first channel of vector k of the words from c on.
template <class S>
constexpr int64_t channel_of(int64_t c, int k) {
  return S::words < VL ? k * VL : c + k * S::words;
}

// One token, packed per token, as fp32: out[channel].
template <class S>
inline void token_row(const S& side, int64_t t, float* out) {
  const uint8_t* codes = side.code_at(t);
  const Half* scale = side.scale_at(t);
  constexpr int64_t count = words_at_once<S>();
  if constexpr (count > 0) {
    using W = Words<S::format, count>;
    for (int64_t c = 0; c < S::words; c += count) {
      const W words(codes + c, S::words);
      for (int k = 0; k < W::vectors; ++k) {
        const int64_t e = channel_of<S>(c, k);
        dequantised<S>(words.at(k), scale, e / S::g, S::groups).store(out + e);
      }
    }
  } else {
    for (int64_t r = 0; r < S::words; ++r) {
      uint32_t word = 0;
      for (int b = 0; b < word_bytes(S::format); ++b) word |= uint32_t(codes[r + b * S::words]) << (8 * b);
      for (int k = 0; k < S::per; ++k) {
        const int64_t e = r + k * S::words, group = e / S::g;
        const uint32_t code = word >> (k * S::bits) & ((1 << S::bits) - 1);
        out[e] = number<S::format>(code) * float(scale[group]);
        if constexpr (!S::fp8) out[e] = out[e] + float(scale[S::groups + group]);
      }
    }
  }
}

}  // namespace ec
