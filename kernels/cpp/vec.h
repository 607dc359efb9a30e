// Loads, stores, exp and code unpacking on at::vec. Everything else is written in terms of these few functions.
#pragma once
// vec.h comes first: on AVX2 it includes functional_base.h itself, half way through.
#include <ATen/cpu/vec/vec.h>

#include <ATen/cpu/vec/functional_base.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace ec {

using Vec = at::vec::Vectorized<float>;
using Half = c10::Half;
inline constexpr int64_t VL = Vec::size();
inline constexpr float INF = std::numeric_limits<float>::infinity();

// Accumulators that fit the register file beside operands; AVX2 has 16 registers, AVX-512 and NEON 32.
inline constexpr int ACCUMULATORS = VL == 8 ? 12 : 24;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// VL values of any element type as fp32.
template <class T>
inline Vec load_f32(const T* p) {
  if constexpr (std::is_same_v<T, float>) {
    return Vec::loadu(p);
  } else {
    Vec out;
    if constexpr (std::is_same_v<T, Half>)
      at::vec::load_fp32_from_fp16(p, out);
    else
      at::vec::load_fp32_from_bf16(p, out);
    return out;
  }
}

// The first n of VL values, the others 0; reads nothing beyond them.
template <class T>
inline Vec load_f32(const T* p, int64_t n) {
  if (n >= VL) return load_f32(p);
  alignas(64) T part[VL] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load_f32(part);
}

template <class T>
inline void store_f32(T* p, Vec x, int64_t n = VL) {
  if constexpr (std::is_same_v<T, float>) {
    n >= VL ? x.store(p) : x.store(p, static_cast<int>(n));
  } else if constexpr (std::is_same_v<T, Half>) {
    at::vec::convert_float_half(x, x).store(p, static_cast<int>(least(n, VL)));
  } else {
    at::vec::convert_float_bfloat16(x, x).store(p, static_cast<int>(least(n, VL)));
  }
}

// 2^x for x <= 0, exactly 0 below -125: 2^n * 2^r with r in [-1/2, 1/2], where a polynomial of degree 6 (interpolated at
// Chebyshev points) is within 2e-8; together within 1 ulp. Subtracting n is exact. No branch and no call.
inline Vec exp2_nonpositive(Vec x) {
  const Vec shift(12582912.f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const Vec clamped = at::vec::clamp_min(x, Vec(-126.f));
  const Vec t = clamped + shift;
  const Vec r = clamped - (t - shift);
  Vec y = at::vec::fmadd(r, Vec(1.5461445e-4f), Vec(1.3400428e-3f));
  y = at::vec::fmadd(y, r, Vec(9.618057e-3f));
  y = at::vec::fmadd(y, r, Vec(5.550327e-2f));
  y = at::vec::fmadd(y, r, Vec(2.402265e-1f));
  y = at::vec::fmadd(y, r, Vec(6.931472e-1f));
  y = at::vec::fmadd(y, r, Vec(1.f));
  const auto exponent = at::vec::cast<int32_t>(t) << at::vec::Vectorized<int32_t>(23);
  const Vec power = at::vec::cast<float>(at::vec::cast<int32_t>(y) + exponent);
  return power & (x > Vec(-125.f));
}

// Not x.reduce_add(): at::vec without intrinsics does not compile it.
inline float sum_of(Vec x) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, x);
}

inline float max_of(Vec x) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, x);
}

inline float min_of(Vec x) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return at::vec::minimum(a, b); }, x);
}

inline void prefetch(const void* p) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(p);
#endif
}

// Codes are read minus this constant. Sums over codes of both signs cancel less than sums over 0..2^bits-1, and the
// constant goes into the zero: c * s + z = (c - CENTER) * s + (z + CENTER * s).
template <int bits>
inline constexpr float CENTER = bits == 8 ? 128.f : ((1 << bits) - 1) / 2.f;

// Channels and bytes of a word of codes, as effcompile/kernels/form.py packs them.
constexpr int word_channels(int bits) { return bits == 8 ? 1 : bits == 4 ? 2 : bits == 2 ? 4 : 8; }
constexpr int word_bytes(int bits) { return word_channels(bits) * bits / 8; }

// A vector of words, one a lane. at(k) is its k-th vector of codes, minus CENTER. `count` words are read: byte b of word
// i is p[b * stride + i]. With fewer words than lanes they are repeated, and a lane's part of the vector comes from its
// own repetition of the words: lane i of at(k) is code k * VL / count + i / count of word i % count.
template <int bits, int64_t count = VL>
struct Words {
  static_assert(count <= VL && VL % count == 0 && word_channels(bits) % (VL / count) == 0);
  static constexpr int vectors = word_channels(bits) / static_cast<int>(VL / count);
  static constexpr int step = bits * static_cast<int>(VL / count);
#if defined(CPU_CAPABILITY_AVX512)
  __m512i words;
  explicit Words(const uint8_t* p, int64_t stride = 0) : words(lanes(p)) {
    if constexpr (word_bytes(bits) == 3)
      words = _mm512_or_si512(words, _mm512_or_si512(_mm512_slli_epi32(lanes(p + stride), 8),
                                                     _mm512_slli_epi32(lanes(p + 2 * stride), 16)));
    if constexpr (count == VL / 2) {
      const __m512i later = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, bits, bits, bits, bits, bits, bits, bits, bits);
      words = _mm512_srlv_epi32(words, later);
    }
  }
  static __m512i lanes(const uint8_t* p) {
    static_assert(count == VL || count == VL / 2);
    __m128i bytes;
    if constexpr (count == VL)
      bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    else
      bytes = _mm_castpd_si128(_mm_loaddup_pd(reinterpret_cast<const double*>(p)));
    // Flipping the top bit turns unsigned codes into signed ones, 128 less.
    if constexpr (bits == 8) return _mm512_cvtepi8_epi32(_mm_xor_si128(bytes, _mm_set1_epi8(-128)));
    return _mm512_cvtepu8_epi32(bytes);
  }
  Vec at(int k) const {
    if constexpr (bits == 8) {
      return _mm512_cvtepi32_ps(words);
    } else {
      // A permute looks at the lowest four bits of each lane only, so with a table that repeats every 2^bits entries it
      // is mask, conversion and subtraction in one.
      constexpr int m = (1 << bits) - 1;
      constexpr float c = CENTER<bits>;
      const __m512 table = _mm512_setr_ps(0 - c, 1 - c, 2 - c, 3 - c, (4 & m) - c, (5 & m) - c, (6 & m) - c, (7 & m) - c,
                                          (8 & m) - c, (9 & m) - c, (10 & m) - c, (11 & m) - c, (12 & m) - c,
                                          (13 & m) - c, (14 & m) - c, (15 & m) - c);
      return _mm512_permutexvar_ps(k == 0 ? words : _mm512_srli_epi32(words, k * step), table);
    }
  }
#elif defined(CPU_CAPABILITY_AVX2)
  __m256i words;
  explicit Words(const uint8_t* p, int64_t stride = 0) : words(lanes(p)) {
    static_assert(count == VL);
    if constexpr (word_bytes(bits) == 3)
      words = _mm256_or_si256(words, _mm256_or_si256(_mm256_slli_epi32(lanes(p + stride), 8),
                                                     _mm256_slli_epi32(lanes(p + 2 * stride), 16)));
  }
  static __m256i lanes(const uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    if constexpr (bits == 8) return _mm256_cvtepi8_epi32(_mm_xor_si128(bytes, _mm_set1_epi8(-128)));
    return _mm256_cvtepu8_epi32(bytes);
  }
  Vec at(int k) const {
    if constexpr (bits == 8) return _mm256_cvtepi32_ps(words);
    __m256i codes = k == 0 ? words : _mm256_srli_epi32(words, k * step);
    // Nothing stands above the last code of a word.
    if (k + 1 < vectors) codes = _mm256_and_si256(codes, _mm256_set1_epi32((1 << bits) - 1));
    return Vec(_mm256_cvtepi32_ps(codes)) - Vec(CENTER<bits>);
  }
#else
  uint32_t words[VL];
  explicit Words(const uint8_t* p, int64_t stride = 0) {
    for (int64_t i = 0; i < VL; ++i) {
      words[i] = 0;
      for (int b = 0; b < word_bytes(bits); ++b) words[i] |= uint32_t(p[b * stride + i % count]) << (8 * b);
      words[i] >>= i / count * bits;
    }
  }
  Vec at(int k) const {
    float codes[VL];
    for (int64_t i = 0; i < VL; ++i) codes[i] = float(words[i] >> (k * step) & ((1 << bits) - 1)) - CENTER<bits>;
    return Vec::loadu(codes);
  }
#endif
};

// Lane i is p[i / times]: VL / times values, each repeated. `times` is a power of two, at most VL.
template <int64_t times>
inline Vec repeat(const float* p) {
  if constexpr (times == VL) {
    return Vec(*p);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    constexpr int shift = times == 1 ? 0 : times == 2 ? 1 : times == 4 ? 2 : 3;
    return _mm512_permutexvar_ps(_mm512_srli_epi32(lane, shift), _mm512_loadu_ps(p));
#else
    float a[VL];
    for (int64_t i = 0; i < VL; ++i) a[i] = p[i / times];
    return Vec::loadu(a);
#endif
  }
}

// Fresh memory of this thread, kept between calls; contents are undefined.
template <class Tag>
inline float* scratch(int64_t count) {
  struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { ::operator delete[](data, std::align_val_t(64)); }
  };
  thread_local Buffer buffer;
  if (buffer.size < count) {
    ::operator delete[](buffer.data, std::align_val_t(64));
    buffer.data = static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t(64)));
    buffer.size = count;
  }
  return buffer.data;
}

}  // namespace ec
