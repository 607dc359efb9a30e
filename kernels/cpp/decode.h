// Attention of a few query rows over a store: split over keys, each part with an online softmax, merged by lse.
#pragma once
#include <omp.h>

#include "latent.h"
#include "score.h"
#include "softmax.h"
#include "weigh.h"

namespace ec {

// Rows handled together: the heads of one token that share a key/value head, or a divisor that fits the registers.
constexpr int row_block(int ratio) {
  for (int n = ratio < 8 ? ratio : 8; n > 1; --n)
    if (ratio % n == 0) return n;
  return 1;
}

// Tokens [t, t + n), which lie together in every buffer.
struct Run {
  int64_t t, n;
  bool tail;
};

// Hands runs to body as many at a time as are together no longer than a block: each time costs the softmax a step.
template <class Body>
struct Batch {
  Body& body;
  int64_t block, count = 0, tokens = 0;
  Run runs[8] = {};
  void operator()(int64_t t, int64_t n, bool tail) {
    if (count == 8 || tokens + n > block) flush();
    runs[count++] = {t, n, tail};
    tokens += n;
  }
  void flush() {
    if (count) body(runs, count);
    count = tokens = 0;
  }
};

// The rows of one head over the runs that visit(batch, block) gives to the batch: o [rows, EP], then max [rows], then sum
// [rows].
// note(row, t, n, s) sees the scores of the keys [t, t + n) as the softmax will, -inf where they are hidden.
template <class P, class Visit, class Note>
inline void decode_part(const AttendArgs& a, int64_t head, float* o, Visit&& visit, Note&& note) {
  constexpr int64_t DP = round_up(P::key_size, VL), EP = round_up(Side<P, Kind::value>::size, VL);
  constexpr int64_t BK = P::group * most(1, 128 / P::group), ld = round_up(BK, VL) + VL;
  constexpr int RB = row_block(P::ratio);
  const int64_t length = *a.state.length, rows = a.queries * P::ratio;
  const Scale scale(softmax_scale<P>(a));
  const Side<P, Kind::key> keys(a.state, P::latent > 0 ? head / a.groups : head, a.capacity);
  const Side<P, Kind::value> values(a.state, P::value_latent > 0 ? head / a.groups : head, a.capacity);
  const Rope<P> rope(a.state, head / a.groups, a.capacity);
  const bool* mask = P::key_mask ? a.mask + head / a.groups * a.mask_stride : nullptr;
  const int64_t* segments = segments_of<P>(a, head);
  struct Work;
  float* q = scratch<Work>(rows * DP + RB * ld + (P::latent > 0 ? P::key_size + P::latent : 0) * ld);
  float *s = q + rows * DP, *key = s + RB * ld, *latents = key + P::key_size * ld;
  float *max = o + rows * EP, *sum = max + rows;
  for (int64_t row = 0; row < rows; ++row) read_query<P>(a, scale, head, row, q + row * DP);
  for (int64_t i = 0; i < rows * EP; ++i) o[i] = 0.f;
  for (int64_t i = 0; i < rows; ++i) max[i] = -INF, sum[i] = 0.f;
  const auto body = [&](const Run* runs, int64_t count) {
    const Run& end = runs[count - 1];
    if constexpr (P::latent > 0) {
      const Up<P> up(a, head);
      for (int64_t i = 0, all = 0; i < count; all += runs[i++].n)
        rebuild<P>(keys, rope, up, runs[i].t, runs[i].n, runs[i].tail, latents, key + all, ld);
    }
    for (int64_t row = 0; row < rows; row += RB) {
      const Visible<P> seen(a, head, row / P::ratio, length);
      if (runs->t >= seen.last || end.t + end.n <= seen.first) continue;
      int64_t all = 0;
      for (int64_t i = 0; i < count; all += runs[i++].n) {
        const auto [t, n, tail] = runs[i];
        if constexpr (P::latent > 0)
          multiply<float, RB, least(4, ACCUMULATORS / RB)>(RB, round_up(n, VL), P::key_size, q + row * DP, DP, key + all, ld,
                                                           nullptr, s + all, ld);
        else
          score<P, RB>(keys, rope, t, n, tail, q + row * DP, s + all, ld);
        for (int r = 0; r < RB; ++r) {
          float* x = s + r * ld + all;
          change_scores<P>(a, head, row + r, t, n, x);
          if (EVERY_KEY<P> || t < seen.first || t + n > seen.last) hide<P>(x, t, n, seen, mask, segments);
          note(row + r, t, n, x);
        }
      }
      float alpha[RB];
      for (int r = 0; r < RB; ++r) alpha[r] = softmax_step(s + r * ld, all, scale, max[row + r], sum[row + r]);
      all = 0;
      for (int64_t i = 0; i < count; all += runs[i++].n) {
        weigh<P, RB>(values, runs[i].t, runs[i].n, runs[i].tail, s + all, ld, alpha, o + row * EP);
        for (int r = 0; r < RB; ++r) alpha[r] = 1.f;
      }
    }
  };
  Batch<decltype(body)> batch{body, BK};
  visit(batch, BK);
  batch.flush();
}

// Merges the parts of one head by their lse and writes its rows.
template <class P>
inline void merge_parts(const AttendArgs& a, int64_t head, int64_t parts, const float* first) {
  constexpr int64_t size = Side<P, Kind::value>::size, EP = round_up(size, VL);
  const int64_t rows = a.queries * P::ratio, cell = rows * (EP + 2);
  const Scale scale(softmax_scale<P>(a));
  for (int64_t row = 0; row < rows; ++row) {
    const float *o = first + row * EP, *max = first + rows * EP + row, *sum = max + rows;
    float top = -INF, total = 0.f;
    for (int64_t part = 0; part < parts; ++part) top = max[part * cell] <= top ? top : max[part * cell];
    alignas(64) float merged[EP + 1] = {};
    for (int64_t part = 0; part < parts && top != -INF; ++part) {
      const float weight = scale.rescale(max[part * cell], top);
      total += weight * sum[part * cell];
      for (int64_t e = 0; e < EP; e += VL)
        at::vec::fmadd(Vec(weight), Vec::loadu(o + part * cell + e), Vec::loadu(merged + e)).store(merged + e);
    }
    if constexpr (P::value_latent > 0) {
      alignas(64) float values[round_up(P::value_size, VL)];
      merged[size] = total;  // what the bias of values is times
      values_of<P>(a, head, merged, values);
      write_row<P>(a, scale, head, row, values, top, total);
    } else {
      write_row<P>(a, scale, head, row, merged, top, total);
    }
  }
}

// Returns 1, having written nothing, if the length is not within the capacity.
template <class P>
int64_t decode(const AttendArgs& a) {
  if (*a.state.length < 0 || *a.state.length > a.capacity) return 1;
  constexpr int64_t EP = round_up(Side<P, Kind::value>::size, VL), BK = P::group * most(1, 128 / P::group);
  const int64_t length = *a.state.length, rows = a.queries * P::ratio, heads = a.batch * a.groups;
  const int64_t stop = packed_length<P>(length);
  // Parts start on whole blocks, so that packed runs hold whole groups; keys before the window are hidden one by one.
  const int64_t start = Visible<P>(a, 0, 0, length).first / BK * BK;
  const int64_t blocks = most(0, (length - start + BK - 1) / BK);
  // Fewer than about 3,000 keys in all are done before a second thread has woken up.
  const int64_t threads = heads * blocks < 24 ? 1 : a.threads;
  // About eight parts a thread even out what other processes take; a part is at least four blocks.
  const int64_t per = threads == 1 ? most(1, blocks) : most(4, (heads * blocks + threads * 8 - 1) / (threads * 8));
  const int64_t parts = most(1, (blocks + per - 1) / per);
  const int64_t cell = rows * (EP + 2);
  struct Partials;
  float* partial = scratch<Partials>(heads * parts * cell);

#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t item = 0; item < heads * parts; ++item) {
    const int64_t from = start + item % parts * per * BK;
    const int64_t to = least(length, from + per * BK);
    decode_part<P>(a, item / parts, partial + item * cell,
                   [&](auto& batch, int64_t block) { for_runs<P>(from, to, stop, block, batch); }, [](auto...) {});
  }

// Merging is little work, but for sums over latents that become values.
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && P::value_latent > 0)
  for (int64_t head = 0; head < heads; ++head) merge_parts<P>(a, head, parts, partial + head * parts * cell);
  return 0;
}

}  // namespace ec
