// Attention of a few query rows over listed pages of a store (effcompile/kernels/pages.py): decode, where a list says which
// keys there are. Pages that follow each other are read as one, so that a list of all is decode itself.
#pragma once
#include "decode.h"

namespace ec {

struct PageArgs {
  AttendArgs attend;
  const int32_t* pages;   // [B, G or 1, K], or null: every page
  const int32_t* counts;  // [B, G or 1]
  int64_t stride[2];      // of counts over batch and key/value head, in elements; 0 where one list serves all
  int64_t width, page;    // K, and the tokens in a page
  float* mass;            // [B, nP], of attention to every page
};

// The pages of one key/value head: the first `count` of all without a list.
struct PageList {
  const int32_t* pages = nullptr;
  int64_t count;
  PageList(const PageArgs& b, int64_t head) : count(b.width) {
    if (!b.pages) return;
    const int64_t at = head / b.attend.groups * b.stride[0] + head % b.attend.groups * b.stride[1];
    pages = b.pages + at * b.width;
    count = b.counts[at];
  }
  int64_t operator[](int64_t i) const { return pages ? pages[i] : i; }
};

// Whether the lists ascend and name pages below `total` only.
inline bool lists_fit(const PageArgs& b, int64_t heads, int64_t total) {
  for (int64_t head = 0; head < heads; ++head) {
    const PageList list(b, head);
    if (list.count < 0 || list.count > b.width) return false;
    for (int64_t i = 0; i < list.count; ++i)
      if (list[i] <= (i ? list[i - 1] : -1) || list[i] >= total) return false;
  }
  return true;
}

// Attention of a.queries rows to the listed pages; note() as in decode_part, with the key/value head first.
template <class P, class Note>
inline void visit_pages(const PageArgs& b, Note&& note) {
  const AttendArgs& a = b.attend;
  const int64_t length = *a.state.length, heads = a.batch * a.groups, page = b.page;
  constexpr int64_t EP = round_up(P::value_size, VL);
  const int64_t cell = a.queries * P::ratio * (EP + 2), stop = packed_length<P>(length);
  // Threads and parts as in decode.
  const int64_t threads = heads * b.width * page < 24 * 128 ? 1 : a.threads;
  const int64_t fair = (heads * b.width + threads * 8 - 1) / (threads * 8);
  const int64_t per = most(1, threads == 1 ? b.width : most(fair, (512 + page - 1) / page));
  const int64_t parts = most(1, (b.width + per - 1) / per);
  constexpr int64_t AHEAD = 4;  // pages
  struct Partials;
  float* partial = scratch<Partials>(heads * parts * cell);

#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t item = 0; item < heads * parts; ++item) {
    const PageList list(b, item / parts);
    const int64_t end = least(list.count, (item % parts + 1) * per);
    const Side<P, Kind::key> keys(a.state, item / parts, a.capacity);
    const Side<P, Kind::value> values(a.state, item / parts, a.capacity);
    const auto visit = [&](auto& batch, int64_t block) {
      for (int64_t i = item % parts * per; i < end;) {
        const int64_t from = list[i] * page;
        int64_t to = from + page;
        for (++i; i < end && list[i] * page == to; ++i) to += page;
        // No processor foresees where a list goes on.
        if (b.pages && i + AHEAD < end && list[i + AHEAD] * page + page <= stop)
          keys.fetch(list[i + AHEAD] * page, page), values.fetch(list[i + AHEAD] * page, page);
        for_runs<P>(from, least(to, length), stop, block, batch);
      }
    };
    decode_part<P>(a, item / parts, partial + item * cell, visit,
                   [&](int64_t row, int64_t t, int64_t n, const float* s) { note(item / parts, row, t, n, s); });
  }
  for (int64_t head = 0; head < heads; ++head) merge_parts<P>(a, head, parts, partial + head * parts * cell);
}

// Returns 1, having written nothing, if the length is not within the capacity; 2 if a list does not ascend, or names a page
// that is not there.
template <class P>
int64_t attend_pages(const PageArgs& b) {
  const AttendArgs& a = b.attend;
  const int64_t length = *a.state.length;
  if (length < 0 || length > a.capacity) return 1;
  if (!lists_fit(b, a.batch * a.groups, (length + b.page - 1) / b.page)) return 2;
  visit_pages<P>(b, [](auto...) {});
  return 0;
}

// Attention of one query to all pages, and what each page is worth: the weights of its tokens, of each the largest over all
// query heads, summed. Scores are kept as they are met, since a weight needs the sum of all. Returns 1 as above.
template <class P>
int64_t attend_mass(const PageArgs& args) {
  PageArgs b = args;
  const AttendArgs& a = b.attend;
  const int64_t length = *a.state.length, rows = a.groups * P::ratio, total = (a.capacity + b.page - 1) / b.page;
  if (length < 0 || length > a.capacity) return 1;
  b.width = (length + b.page - 1) / b.page;
  const int64_t ld = b.width * b.page;  // a whole number of vectors
  struct Scores;
  float* scores = scratch<Scores>(a.batch * rows * ld);
  visit_pages<P>(b, [&](int64_t head, int64_t row, int64_t t, int64_t n, const float* s) {
    std::memcpy(scores + (head * P::ratio + row) * ld + t, s, n * sizeof(float));
  });
  const Scale scale(softmax_scale<P>(a));
  const int64_t threads = a.batch * rows * b.width < 24 * 128 ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < a.batch * total; ++item) {
    const int64_t entry = item / total, page = item % total;
    const float* lse = a.lse + entry * rows;
    Vec sum(0.f);
    bool known = true;
    for (int64_t t = page * b.page; page < b.width && t < (page + 1) * b.page; t += VL) {
      Vec best(0.f);
      for (int64_t row = 0; row < rows; ++row) {
        // In powers of two, as the softmax has them; a row that sees nothing has scores of -inf alone.
        const Vec top(lse[row] == -INF ? 0.f : lse[row] * 1.44269504f);
        const float* s = scores + (entry * rows + row) * ld + t;
        best = at::vec::maximum(best, exp2_nonpositive(Vec(scale.factor) * Vec::loadu(s) - top));
        known = known && lse[row] == lse[row];
      }
      // Behind the length lies what an earlier call left.
      if (t + VL > length) best = Vec::set(Vec(0.f), best, most(0, length - t));
      sum = sum + best;
    }
    b.mass[item] = known ? sum_of(sum) : std::numeric_limits<float>::quiet_NaN();
  }
  return 0;
}

}  // namespace ec
