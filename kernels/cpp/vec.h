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
// In place of bits, E4M3 stands for codes that are the bits of e4m3 numbers, which need no constant.
inline constexpr int E4M3 = -8;

template <int bits>
inline constexpr float CENTER = bits == E4M3 ? 0.f : bits == 8 ? 128.f : ((1 << bits) - 1) / 2.f;

// Channels and bytes of a word of codes, as effcompile/kernels/form.py packs them.
constexpr int word_channels(int bits) { return bits == 8 || bits == E4M3 ? 1 : bits == 4 ? 2 : bits == 2 ? 4 : 8; }
constexpr int word_bytes(int bits) { return word_channels(bits) * (bits == E4M3 ? 8 : bits) / 8; }

// The number that a code stands for. The bits of an e4m3 number in those of an fp16 number are a 256th of it, the small
// ones with a mantissa only included.
template <int bits>
inline float number(uint32_t code) {
  if constexpr (bits == E4M3) {
    const auto half = static_cast<uint16_t>((code & 0x80) << 8 | (code & 0x7f) << 7);
    return float(Half(half, Half::from_bits())) * 256.f;
  } else {
    return float(code);
  }
}

// The code of the e4m3 number nearest to x, |x| <= 448, ties to even.
inline uint8_t e4m3_code(float x) {
  uint32_t bits, small;
  const float shifted = std::fabs(x) + 16384.f;  // whose last bit is worth 2^-9, as that of small e4m3 numbers
  std::memcpy(&bits, &x, 4);
  std::memcpy(&small, &shifted, 4);
  const uint32_t size = bits & 0x7fffffff, rounded = (size + 0x7ffff + (size >> 20 & 1)) >> 20;
  // The exponent's bias goes from 127 to 7, above 2^-6.
  return static_cast<uint8_t>((bits >> 24 & 0x80) | (size < 0x3c800000 ? small - 0x46800000 : rounded - (120 << 3)));
}

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

// Words of one e4m3 code each.
template <int64_t count>
struct Words<E4M3, count> {
  static_assert(count == VL);
  static constexpr int vectors = 1;
  Vec numbers;
  explicit Words(const uint8_t* p, int64_t = 0) {
#if defined(CPU_CAPABILITY_AVX512)
    // As number() does it: the sign stays where it is, exponent and mantissa go one bit down.
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i moved = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 1);
    numbers = Vec(_mm512_cvtph_ps(_mm256_and_si256(moved, _mm256_set1_epi16(static_cast<short>(0xbfff))))) * Vec(256.f);
#elif defined(CPU_CAPABILITY_AVX2)
    const __m128i bytes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i moved = _mm_srai_epi16(_mm_slli_epi16(bytes, 8), 1);
    numbers = Vec(_mm256_cvtph_ps(_mm_and_si128(moved, _mm_set1_epi16(static_cast<short>(0xbfff))))) * Vec(256.f);
#else
    float lanes[VL];
    for (int64_t i = 0; i < VL; ++i) lanes[i] = number<E4M3>(p[i]);
    numbers = Vec::loadu(lanes);
#endif
  }
  Vec at(int) const { return numbers; }
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
