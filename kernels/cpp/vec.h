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
inline constexpr float CENTER = bits == 4 ? 7.5f : 128.f;

// VL bytes of two 4-bit codes each: the low halves and the high halves, minus CENTER<4>.
inline void unpack4(const uint8_t* p, Vec& low, Vec& high) {
#if defined(CPU_CAPABILITY_AVX512)
  // A permute looks at the lowest four bits of each lane only, so it is mask, conversion and subtraction in one.
  const __m512 table = _mm512_setr_ps(-7.5f, -6.5f, -5.5f, -4.5f, -3.5f, -2.5f, -1.5f, -.5f, .5f, 1.5f, 2.5f, 3.5f, 4.5f,
                                      5.5f, 6.5f, 7.5f);
  const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  low = _mm512_permutexvar_ps(codes, table);
  high = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  low = Vec(_mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32(15)))) - Vec(CENTER<4>);
  high = Vec(_mm256_cvtepi32_ps(_mm256_srli_epi32(codes, 4))) - Vec(CENTER<4>);
#else
  float a[VL], b[VL];
  for (int64_t i = 0; i < VL; ++i) {
    a[i] = float(p[i] & 15) - CENTER<4>;
    b[i] = float(p[i] >> 4) - CENTER<4>;
  }
  low = Vec::loadu(a);
  high = Vec::loadu(b);
#endif
}

// VL 8-bit codes, minus CENTER<8>.
inline Vec unpack8(const uint8_t* p) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  // Flipping the top bit turns unsigned codes into signed ones, 128 less.
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_xor_si128(bytes, _mm_set1_epi8(-128))));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_xor_si128(bytes, _mm_set1_epi8(-128))));
#else
  float a[VL];
  for (int64_t i = 0; i < VL; ++i) a[i] = float(p[i]) - CENTER<8>;
  return Vec::loadu(a);
#endif
}

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
