// x in digits: whole numbers of 8 bits, by which four codes at a time are multiplied and added up without rounding.
//
// A group of x is X * step, where X is a whole number of 32 bits, so that what is a hundredth of the largest number of
// the group still has the digits of fp32. X is four signed bytes, ((256 a + b) 256 + c) 256 + d. A lane of a vector of codes holds those of four
// inputs of one output, and one instruction adds the four products with four bytes of x to an int32.
#pragma once
#include "vec.h"

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BW__)
#define EC_DIGITS 1

namespace ec {

inline constexpr int DIGITS = 4;
// The largest X: the first byte goes up to 127.
inline constexpr float LARGEST = 127.f * 16777216.f;

// Where the digits of a row of x are.
struct Digits {
  int8_t* bytes;  // [DIGITS, groups * group]
  int32_t* sums;  // [groups, DIGITS]: of the digits of a group
  float* steps;   // [groups]
};

// The digits of one group. False if a number is not finite, or all are so small that steps have few digits.
inline bool split(const float* x, int64_t group, int64_t width, int8_t* bytes, int32_t* sums, float* step) {
  const __m512i positive = _mm512_set1_epi32(0x7fffffff);
  const auto inside = [&](int64_t k) { return static_cast<__mmask16>((1u << least(group - k, 16)) - 1); };
  __m512i size = _mm512_setzero_si512();
  for (int64_t k = 0; k < group; k += 16)
    size = _mm512_max_epi32(size, _mm512_and_si512(_mm512_maskz_loadu_epi32(inside(k), x + k), positive));
  const int32_t bits = _mm512_reduce_max_epi32(size);
  float largest;
  std::memcpy(&largest, &bits, 4);
  if (bits >= 0x7f800000 || (bits && largest < 1e-20f)) return false;
  *step = largest / LARGEST;
  const __m512 per = _mm512_set1_ps(bits ? LARGEST / largest : 0.f);
  __m512i sum[DIGITS] = {};
  for (int64_t k = 0; k < group; k += 16) {
    const __mmask16 mask = inside(k);
    __m512i rest = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + k), per));
    for (int digit = DIGITS - 1; digit >= 0; --digit) {
      const __m512i last = digit ? _mm512_srai_epi32(_mm512_slli_epi32(rest, 24), 24) : rest;
      _mm512_mask_cvtepi32_storeu_epi8(bytes + digit * width + k, mask, last);
      sum[digit] = _mm512_add_epi32(sum[digit], last);
      rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, last), 8);
    }
  }
  for (int digit = 0; digit < DIGITS; ++digit) sums[digit] = _mm512_reduce_add_epi32(sum[digit]);
  return true;
}

// The digits of a row of groups; no steps if there are none.
inline Digits digits_of(const float* x, int64_t groups, int64_t group) {
  struct Work;
  const int64_t width = groups * group, bytes = round_up(DIGITS * width, 64) / 4;
  float* work = scratch<Work>(bytes + groups * (DIGITS + 1));
  float* steps = work + bytes;
  const Digits d{reinterpret_cast<int8_t*>(work), reinterpret_cast<int32_t*>(steps + groups), steps};
  for (int64_t g = 0; g < groups; ++g)
    if (!split(x + g * group, group, width, d.bytes + g * group, d.sums + g * DIGITS, steps + g)) return {};
  return d;
}

// Four words of codes of 16 outputs, which lie word by word. field(k) are their k-th codes, those of an output together.
template <int bits>
struct Quads {
  __m512i plane[word_bytes(bits)];

  Quads(const uint8_t* p, int64_t stride) {
    const __m512i word = _mm512_set1_epi32(0x30201000);  // byte i of a lane is that of word i
    const __m512i output = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(0x01010101));
    const __m512i order = _mm512_add_epi32(word, output);
    for (int b = 0; b < word_bytes(bits); ++b)
      plane[b] = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(p + b * stride));
  }

  __m512i field(int k) const {
    if constexpr (bits == 8) return plane[0];
    const __m512i mask = _mm512_set1_epi8((1 << bits) - 1);
    // Bits that come from the next byte end up above the mask.
    const int first = k * bits, byte = first / 8, shift = first % 8;
    __m512i codes = shift ? _mm512_srli_epi16(plane[byte], shift) : plane[byte];
    if (shift + bits > 8) {
      const __m512i low = _mm512_set1_epi8(static_cast<char>((1 << (8 - shift)) - 1));
      codes = _mm512_ternarylogic_epi32(codes, low, _mm512_slli_epi16(plane[byte + 1], 8 - shift), 0xE2);
    }
    return _mm512_and_si512(codes, mask);
  }
};

}  // namespace ec

#else

namespace ec {
struct Digits {};
}  // namespace ec

#endif
