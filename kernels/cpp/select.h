// Which pages of a store a step of decoding reads (effcompile/kernels/pages.py): by what attention to all of them found, by
// a bound on the scores of their keys, or by their moments.
#pragma once
#include <algorithm>

#include "softmax.h"

namespace ec {

struct SelectArgs {
  AttendArgs attend;      // without values and results
  const float* mass;      // [B, nP], or null: by bounds
  const void* bounds;     // [B, G, C/g, 2, D], or moments; or null: the ends of groups that are packed per channel
  int32_t* pages;         // [B, G or 1, K]
  int32_t* counts;        // [B, G or 1]
  int64_t width, page;    // K, and the tokens in a page
  int64_t first, recent;  // how many of the first and of the newest pages are always listed
  int64_t moments;        // whether that is what `bounds` holds
  double reach;           // deviations above the mean, or the radius of the boxes that bounds are taken of, to their own
};

// The least and the largest value of each channel of the keys in groups [from, to): low[DP], high[DP].
template <class P>
inline void ends_of(const SelectArgs& b, const Side<P, Kind::key>& keys, int64_t head, int64_t from, int64_t to, float* low,
                    float* high) {
  using S = Side<P, Kind::key>;
  constexpr int64_t D = S::size;
  for (int64_t group = from; group < to; ++group) {
    for (int64_t d = 0; d < D; d += VL) {
      Vec least, largest;
      if constexpr (S::packed) {
        const Half* scale = keys.scale_at(group * S::g) + d;
        least = load_f32(scale + D, D - d);
        largest = at::vec::fmadd(load_f32(scale, D - d), Vec(float((1 << S::bits) - 1)), least);
      } else {
        const auto* at = static_cast<const typename P::scalar*>(b.bounds) +
                         (head * (b.attend.capacity / P::group) + group) * 2 * D + d;
        least = load_f32(at, D - d), largest = load_f32(at + D, D - d);
      }
      if (group > from) {
        least = at::vec::minimum(least, Vec::loadu(low + d));
        largest = at::vec::maximum(largest, Vec::loadu(high + d));
      }
      least.store(low + d), largest.store(high + d);
    }
  }
}

// The mean and the variance of each channel of the keys in units [from, to): mean[DP], variance[DP].
template <class P>
inline void moments_of(const SelectArgs& b, int64_t head, int64_t from, int64_t to, float* mean, float* variance) {
  constexpr int64_t D = P::key_size;
  const auto* at = static_cast<const typename P::scalar*>(b.bounds) + head * (b.attend.capacity / P::group) * 2 * D;
  const Vec share(1.f / static_cast<float>(to - from));
  for (int64_t d = 0; d < D; d += VL) {
    Vec sum(0.f), spread(0.f);
    for (int64_t unit = from; unit < to; ++unit) sum = sum + load_f32(at + unit * 2 * D + d, D - d);
    const Vec middle = sum * share;
    for (int64_t unit = from; unit < to; ++unit) {
      const Vec off = load_f32(at + unit * 2 * D + d, D - d) - middle, own = load_f32(at + (unit * 2 + 1) * D + d, D - d);
      spread = at::vec::fmadd(own, own, at::vec::fmadd(off, off, spread));
    }
    middle.store(mean + d), (spread * share).store(variance + d);
  }
}

// The worth of pages [0, count) of one key/value head: of its query heads' bounds the largest, each relative to all pages in
// [0, count) that the mask lets through, as logarithms of shares. See Quest.scores in effcompile/passes/quest.py. By moments
// what bounds are is the score that is likely the best.
template <class P>
inline void rank(const SelectArgs& b, int64_t head, int64_t count, const bool* there, float* worth) {
  constexpr int64_t DP = round_up(P::key_size, VL);
  const AttendArgs& a = b.attend;
  const Scale scale(a.scale);
  const Side<P, Kind::key> keys(a.state, head, a.capacity);
  const int64_t ld = round_up(most(1, count), VL);
  struct Work;
  float* q = scratch<Work>(P::ratio * 2 * DP + 2 * DP + (P::ratio + 1) * ld);
  const auto reach = static_cast<float>(b.reach);
  const auto near = static_cast<float>((1 + b.reach) / 2), far = static_cast<float>((1 - b.reach) / 2);
  float *low = q + P::ratio * 2 * DP, *high = low + DP, *weights = high + DP, *bound = weights + ld;
  for (int row = 0; row < P::ratio; ++row) {
    float *up = q + row * 2 * DP, *down = up + DP;
    read_query<P>(a, scale, head, row, up);
    for (int64_t d = 0; d < DP; d += VL) {
      const Vec x = Vec::loadu(up + d);
      if (b.moments) {
        (x * x).store(down + d);
        continue;
      }
      const Vec below = at::vec::minimum(x, Vec(0.f)), above = at::vec::maximum(x, Vec(0.f));
      // A smaller box around the same middle: each end is a mean of both.
      (Vec(near) * below + Vec(far) * above).store(down + d);
      (Vec(near) * above + Vec(far) * below).store(up + d);
    }
  }
  for (int64_t p = 0; p < count; ++p) {
    if (!there[p]) continue;
    const int64_t from = p * b.page / P::group, to = (p + 1) * b.page / P::group;
    if (b.moments)
      moments_of<P>(b, head, from, to, high, low);
    else
      ends_of<P>(b, keys, head, from, to, low, high);
    for (int row = 0; row < P::ratio; ++row) {
      const float *up = q + row * 2 * DP, *down = up + DP;
      Vec ahead(0.f), behind(0.f);
      for (int64_t d = 0; d < DP; d += VL) {
        ahead = at::vec::fmadd(Vec::loadu(up + d), Vec::loadu(high + d), ahead);
        behind = at::vec::fmadd(Vec::loadu(down + d), Vec::loadu(low + d), behind);
      }
      bound[row * ld + p] = b.moments ? sum_of(ahead) + reach * std::sqrt(sum_of(behind)) : sum_of(ahead + behind);
    }
  }
  for (int64_t p = 0; p < count; ++p) worth[p] = -INF;
  for (int row = 0; row < P::ratio; ++row) {
    float *x = bound + row * ld, top = -INF, sum = 0.f;
    for (int64_t p = 0; p < count; ++p) weights[p] = there[p] && std::isfinite(x[p]) ? x[p] : -INF;
    softmax_step(weights, count, scale, top, sum);
    const auto factor = static_cast<float>(scale.scale), share = static_cast<float>(top * scale.scale + std::log(sum));
    // What cannot be ranked is not dropped.
    for (int64_t p = 0; p < count; ++p)
      if (there[p])
        worth[p] = std::isfinite(x[p]) ? std::max(worth[p], x[p] * factor - share) : std::numeric_limits<float>::max();
  }
}

// The list of one head: the `width` best of pages [0, total) with a worth above -inf, ascending; of equals the earlier ones.
inline int64_t take(float* worth, int64_t total, int64_t behind, int64_t width, int32_t* pages) {
  struct Order;
  auto* order = reinterpret_cast<int32_t*>(scratch<Order>(most(1, total)));
  int64_t count = 0;
  for (int64_t p = 0; p < total; ++p) {
    if (worth[p] != worth[p]) worth[p] = std::numeric_limits<float>::max();
    if (worth[p] > -INF) order[count++] = static_cast<int32_t>(p);
  }
  if (count > width) {
    const auto better = [&](int32_t x, int32_t y) { return worth[x] > worth[y] || (worth[x] == worth[y] && x < y); };
    std::nth_element(order, order + width, order + count, better);
    std::sort(order, order + width);
    count = width;
  }
  std::copy(order, order + count, pages);
  std::fill(pages + count, pages + width, static_cast<int32_t>(behind));
  return count;
}

// Returns 1, having written nothing, if the length is not within the capacity.
template <class P>
int64_t select_pages(const SelectArgs& b) {
  const AttendArgs& a = b.attend;
  const int64_t length = *a.state.length, page = b.page, total = (length + page - 1) / page;
  const int64_t all = (a.capacity + page - 1) / page, lists = b.mass ? a.batch : a.batch * a.groups;
  if (length < 0 || length > a.capacity) return 1;
  // Pages that end behind this token are always listed: the newest, and those with keys that have no bounds yet.
  int64_t near = length - 1 - (b.recent - 1) * page;
  if (!b.mass) near = least(near, P::key_bits == 16 ? length / P::group * P::group : packed_length<P>(length));
  const int64_t ranked = most(0, least(total, near / page));
  const int64_t threads = lists * total < 24 * 128 ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t list = 0; list < lists; ++list) {
    const int64_t entry = b.mass ? list : list / a.groups;
    const bool* mask = a.mask ? a.mask + entry * a.mask_stride : nullptr;
    struct Work;
    float* worth = scratch<Work>(total + (total + 3) / 4 + 1);
    bool* there = reinterpret_cast<bool*>(worth + total);
    for (int64_t p = 0; p < total; ++p)
      there[p] = !mask || std::find(mask + p * page, mask + least(length, (p + 1) * page), true) !=
                              mask + least(length, (p + 1) * page);
    if (b.mass)
      std::copy(b.mass + entry * all, b.mass + entry * all + ranked, worth);
    else
      rank<P>(b, list, ranked, there, worth);
    for (int64_t p = 0, seen = 0; p < total; ++p) {
      seen += there[p];
      if (p >= ranked || seen <= b.first) worth[p] = INF;
      if (!there[p]) worth[p] = -INF;
    }
    b.counts[list] = static_cast<int32_t>(take(worth, total, all, b.width, b.pages + list * b.width));
  }
  return 0;
}

}  // namespace ec
