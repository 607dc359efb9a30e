// Attention over listed blocks of keys (effcompile/kernels/blocks.py). As prefill, but each head has rows of its own, since
// each has its own list; heads that share keys go through them together, so that a block two heads list is read once.
#pragma once
#include "columns.h"

namespace ec {

struct BlockArgs {
  AttendArgs attend;
  ScoreArgs score;
  const int32_t* counts[2];   // partial and full: [B or 1, H or 1, nQ], the second may be null
  const int32_t* indices[2];  // [B or 1, H or 1, nQ, room]
  int64_t stride[2];          // of counts over batch and head, in elements; 0 where one serves all
  int64_t block, rows, room, columns;  // tokens in a block, nQ, length of a list, blocks that there may be
  const bool* allowed;           // [B or 1, H or 1, T, >= length] or null: which pairs of partial blocks may be
  int64_t allowed_stride[3];     // batch, head, query; 0 where one serves all
  const int32_t* ranges;         // [B or 1, H or 1, T, R, 2] or null: the keys of each query, in partial blocks
  int64_t range_stride[2], range_count;  // of queries over batch and head; R
  const int32_t* query_positions;  // [B or 1, H or 1, T] or null
  int64_t query_step[2];           // over batch and head; 0 where one serves all
  const float* before[2];        // [B, H, T, E] and [B, H, T], the result of attention to other keys, or null
};

// Hides what `allowed` forbids in s, the scores of keys [t, t + n) for one query.
inline void hide_forbidden(const BlockArgs& b, int64_t batch, int64_t head, int64_t query, int64_t t, int64_t n, float* s) {
  const bool* allowed = b.allowed + batch * b.allowed_stride[0] + head * b.allowed_stride[1] + query * b.allowed_stride[2] + t;
  for (int64_t i = 0; i < n; ++i) s[i] = allowed[i] ? s[i] : -INF;
}

// Hides what lies in none of the query's ranges, which ascend, in s, the scores of keys [t, t + n).
inline void hide_outside(const BlockArgs& b, int64_t batch, int64_t head, int64_t query, int64_t t, int64_t n, float* s) {
  const int32_t* range = b.ranges + (batch * b.range_stride[0] + head * b.range_stride[1] + query) * b.range_count * 2;
  int64_t from = 0;
  for (int64_t r = 0; r < b.range_count; ++r) {
    const int64_t start = range[2 * r] - t, stop = start + range[2 * r + 1];
    if (stop == start) continue;
    for (; from < least(n, start); ++from) s[from] = -INF;
    from = most(from, least(n, stop));
  }
  for (; from < n; ++from) s[from] = -INF;
}

// Begins a row with the result of earlier attention. Its sum is 1, relative to its lse as the largest score.
template <class P>
inline void begin_row(const BlockArgs& b, const Scale& scale, int64_t head, int64_t row, float* o, float& max, float& sum) {
  const int64_t at = row_index<P>(b.attend, head, row);
  const float lse = b.before[1][at];
  if (lse == -INF) return;
  for (int64_t e = 0; e < P::value_size; ++e) o[e] = b.before[0][at * P::value_size + e];
  max = static_cast<float>(lse / scale.scale);
  sum = 1.f;
}

// What stands behind BlockArgs for programs that have it: ColumnArgs or PositionArgs.
template <class T>
inline const T& behind(const BlockArgs& b) {
  return *reinterpret_cast<const T*>(&b + 1);
}

// Marks of a block.
constexpr uint8_t PARTIAL = 1, FULL = 2, OVERFLOWED = 3;

// Marks the blocks that `head` of `batch` lists for query block `row`; all as OVERFLOWED if a list did not fit. False if a
// number is out of range.
inline bool read_lists(const BlockArgs& a, int64_t batch, int64_t head, int64_t row, uint8_t* marks) {
  std::memset(marks, 0, a.columns);
  bool over = false;
  for (int kind = 0; kind < 2; ++kind) {
    if (!a.counts[kind]) continue;
    const int64_t at = batch * a.stride[0] + head * a.stride[1] + row;
    const int64_t count = a.counts[kind][at];
    if (count < 0 || count > a.columns) return false;
    over |= count > a.room;
    for (int64_t i = 0; i < least(count, a.room); ++i) {
      const int64_t block = a.indices[kind][at * a.room + i];
      if (block < 0 || block >= a.columns) return false;
      marks[block] = kind ? FULL : PARTIAL;
    }
  }
  if (over) std::memset(marks, OVERFLOWED, a.columns);
  return true;
}

// Query block `row` of heads [r, r + heads) of one key/value head.
template <class P>
inline bool block_tile(const BlockArgs& b, int64_t head, int64_t r, int64_t heads, int64_t row, int64_t stop) {
  const AttendArgs& a = b.attend;
  constexpr int64_t D = P::key_size, E = P::value_size, DP = round_up(D, VL), EP = round_up(E, VL);
  constexpr int64_t BK = P::group * most(1, 128 / P::group);
  constexpr Block wide = best_block(BK / VL), deep = best_block(EP / VL);
  constexpr bool gathers = std::is_base_of_v<gathered_columns, P>, moved = std::is_base_of_v<key_positions, P>;
  const int64_t length = *a.state.length, first = row * b.block, tokens = least(b.block, a.queries - first);
  // multiply() writes up to a block of rows behind the last, so every head's rows have room behind them.
  const int64_t padded = tokens + ACCUMULATORS, all = heads * padded;
  const Scale scale(softmax_scale<P>(a));
  const Side<P, Kind::key> keys(a.state, head, a.capacity);
  const Side<P, Kind::value> values(a.state, head, a.capacity);
  const Rope<P> rope(a.state, head / a.groups, a.capacity);
  const bool* mask = P::key_mask ? a.mask + head / a.groups * a.mask_stride : nullptr;
  struct Work;
  const int64_t marked = round_up(heads * b.columns, sizeof(float)) / sizeof(float);
  float* q = scratch<Work>(all * (DP + EP + 3) + padded * BK + D * BK + BK * EP + marked + 16);
  float *o = q + all * DP, *s = o + all * EP, *key = s + padded * BK, *value = key + D * BK;
  float *max = value + BK * EP, *sum = max + all, *alpha = sum + all;
  uint8_t* marks = reinterpret_cast<uint8_t*>(alpha + all);
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t query_head = head % a.groups * P::ratio + r + h;
    if (!read_lists(b, head / a.groups, query_head, row, marks + h * b.columns)) return false;
    for (int64_t i = 0; i < tokens; ++i)
      read_query<P>(a, scale, head, (first + i) * P::ratio + r + h, q + (h * padded + i) * DP);
  }
  for (int64_t i = 0; i < all * EP; ++i) o[i] = 0.f;
  for (int64_t i = 0; i < all; ++i) max[i] = -INF, sum[i] = 0.f, alpha[i] = 1.f;
  if (b.before[0])
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < tokens; ++i) {
        const int64_t at = h * padded + i;
        begin_row<P>(b, scale, head, (first + i) * P::ratio + r + h, o + at * EP, max[at], sum[at]);
      }

  const auto seen_by = [&](int64_t h, int64_t i) {
    if (!b.query_positions) return Visible<P>(a, head, first + i, length);
    const int64_t query_head = head % a.groups * P::ratio + r + h;
    const int32_t* at = b.query_positions + head / a.groups * b.query_step[0] + query_head * b.query_step[1];
    // Keys that stand elsewhere too may do so behind the length.
    return Visible<P>(at[first + i], moved ? std::numeric_limits<int64_t>::max() : length, 0);
  };
  // Head h takes in n keys and their values, which v() gives; change_some makes query i's products its
  // scores, and hides what it does not see.
  auto take = [&](int64_t h, int64_t n, auto&& v, auto&& change_some) {
    const int64_t at = h * padded;
    multiply<float, wide.rows, wide.columns>(tokens, round_up(n, VL), D, q + at * DP, DP, key, BK, nullptr, s, BK);
    for (int64_t i = 0; i < tokens; ++i) {
      change_some(i, s + i * BK, seen_by(h, i));
      alpha[at + i] = softmax_step(s + i * BK, n, scale, max[at + i], sum[at + i]);
    }
    multiply<float, deep.rows, deep.columns>(tokens, EP, n, s, BK, v(), EP, alpha + at, o + at * EP, EP);
  };

  const int32_t* positions = nullptr;
  if constexpr (moved) {
    const auto& p = behind<PositionArgs>(b);
    positions = p.positions + head / a.groups * p.stride[0] + head % a.groups * p.stride[1];
  }
  // Keys that stand elsewhere, or queries, may meet whatever their slots.
  const bool anywhere = moved || b.query_positions;
  const int64_t end = anywhere ? length : Visible<P>(a, head, first + tokens - 1, length).last;
  const int64_t begin = anywhere ? 0 : Visible<P>(a, head, first, length).first / b.block;
  for (int64_t block = begin; block < b.columns && block * b.block < end; ++block) {
    bool wanted = false;
    for (int64_t h = 0; h < heads; ++h) wanted |= marks[h * b.columns + block] != 0;
    if (!wanted) continue;
    for_runs<P>(block * b.block, least((block + 1) * b.block, end), stop, BK, [&](int64_t t, int64_t n, bool tail) {
      key_tile<P>(keys, rope, t, n, tail, key, BK);
      const float* made = nullptr;
      for (int64_t h = 0; h < heads; ++h) {
        const uint8_t mark = marks[h * b.columns + block];
        if (!mark) continue;
        auto v = [&] {
          if (!made) made = value_tile<P>(values, t, n, tail, value);
          return made;
        };
        take(h, n, v, [&](int64_t i, float* scores, Visible<P> seen) {
          change_scores<P>(a, head, (first + i) * P::ratio + r + h, t, n, scores, moved ? positions + t : nullptr);
          if (mark == FULL) return;
          const int64_t query_head = head % a.groups * P::ratio + r + h;
          if (b.allowed) hide_forbidden(b, head / a.groups, query_head, first + i, t, n, scores);
          if (b.ranges) hide_outside(b, head / a.groups, query_head, first + i, t, n, scores);
          if constexpr (moved)
            hide_at<P>(scores, positions + t, n, seen, mask);
          else if (P::key_mask || t < seen.first || t + n > seen.last)
            hide<P>(scores, t, n, seen, mask, nullptr);
        });
      }
    });
  }
  if constexpr (gathers)
    for (int64_t h = 0; h < heads; ++h) {
      int64_t count;
      const int32_t* at;
      const int64_t query_head = head % a.groups * P::ratio + r + h;
      const uint8_t* mine = marks + h * b.columns;
      if (b.columns && mine[0] == OVERFLOWED) continue;  // every column is visited already
      const auto& lists = behind<ColumnArgs>(b);
      if (!read_columns(lists, head / a.groups, query_head, row, mine, b.block, length, at, count)) return false;
      for (int64_t t = 0; t < count; t += BK, at += BK) {
        const int64_t n = least(BK, count - t);
        gather_tiles<P>(keys, values, at, n, key, BK, value);
        take(h, n, [&] { return value; }, [&](int64_t i, float* scores, Visible<P> seen) {
          change_scores<P>(a, head, (first + i) * P::ratio + r + h, 0, n, scores, at);
          if (P::key_mask || at[0] < seen.first || at[n - 1] >= seen.last) hide_at<P>(scores, at, n, seen, mask);
        });
      }
    }
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t at = h * padded + i;
      write_row<P>(a, scale, head, (first + i) * P::ratio + r + h, o + at * EP, max[at], sum[at]);
    }
  return true;
}

// Returns 1, having written nothing, if the length is not within the capacity; 2 if a list
// names a block or a column that is not there, or a column that does not fit (read_columns).
template <class P>
int64_t attend_blocks(const BlockArgs& b) {
  const AttendArgs& a = b.attend;
  if (*a.state.length < 0 || *a.state.length > a.capacity) return 1;
  const int64_t stop = packed_length<P>(*a.state.length), pairs = a.batch * a.groups;
  // The heads of a group share what is read; few enough of them that their rows stay in the second-level cache.
  const int64_t together = least(P::ratio, most(1, 512 / b.block)), parts = (P::ratio + together - 1) / together;
  int64_t bad = 0;
  // The last queries see the most keys: they go first, so that no long tile is left for the end.
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 1) reduction(+ : bad)
  for (int64_t item = 0; item < pairs * parts * b.rows; ++item) {
    const int64_t row = b.rows - 1 - item / (pairs * parts), rest = item % (pairs * parts);
    const int64_t r = rest % parts * together;
    bad += !block_tile<P>(b, rest / parts, r, least(together, P::ratio - r), row, stop);
  }
  return bad ? 2 : 0;
}

}  // namespace ec
