// Attention of a few query rows over listed pages of a store (effcompile/kernels/pages.py): decode, where a list says which
// keys there are. Pages that follow each other are read as one, so that a list of all is decode itself.
#pragma once
#include "decode.h"

namespace ec {

struct PageArgs {
  AttendArgs attend;
  const int32_t* pages;   // [B, G or 1, K]
  const int32_t* counts;  // [B, G or 1]
  int64_t stride[2];      // of counts over batch and key/value head, in elements; 0 where one list serves all
  int64_t width, page;    // K, and the tokens in a page
};

// The pages of one key/value head.
struct PageList {
  const int32_t* pages;
  int64_t count;
  PageList(const PageArgs& b, int64_t head) {
    const int64_t at = head / b.attend.groups * b.stride[0] + head % b.attend.groups * b.stride[1];
    pages = b.pages + at * b.width;
    count = b.counts[at];
  }
};

// Whether the lists ascend and name pages below `total` only.
inline bool lists_fit(const PageArgs& b, int64_t heads, int64_t total) {
  for (int64_t head = 0; head < heads; ++head) {
    const PageList list(b, head);
    if (list.count < 0 || list.count > b.width) return false;
    for (int64_t i = 0; i < list.count; ++i)
      if (list.pages[i] <= (i ? list.pages[i - 1] : -1) || list.pages[i] >= total) return false;
  }
  return true;
}

// Returns 1, having written nothing, if the length is not within the capacity; 2 if a list does not ascend, or names a page
// that is not there.
template <class P>
int64_t attend_pages(const PageArgs& b) {
  const AttendArgs& a = b.attend;
  const int64_t length = *a.state.length, heads = a.batch * a.groups, page = b.page;
  if (length < 0 || length > a.capacity) return 1;
  if (!lists_fit(b, heads, (length + page - 1) / page)) return 2;
  constexpr int64_t EP = round_up(P::value_size, VL);
  const int64_t cell = a.queries * P::ratio * (EP + 2), stop = packed_length<P>(length);
  // Threads and parts as in decode.
  const int64_t threads = heads * b.width * page < 24 * 128 ? 1 : a.threads;
  const int64_t fair = (heads * b.width + threads * 8 - 1) / (threads * 8);
  const int64_t per = most(1, threads == 1 ? b.width : most(fair, (512 + page - 1) / page));
  const int64_t parts = most(1, (b.width + per - 1) / per);
  struct Partials;
  float* partial = scratch<Partials>(heads * parts * cell);

#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t item = 0; item < heads * parts; ++item) {
    const PageList list(b, item / parts);
    const int64_t end = least(list.count, (item % parts + 1) * per);
    decode_part<P>(a, item / parts, partial + item * cell, [&](auto& body, int64_t block) {
      for (int64_t i = item % parts * per; i < end;) {
        const int64_t from = list.pages[i] * page;
        int64_t to = from + page;
        for (++i; i < end && list.pages[i] * page == to; ++i) to += page;
        for_runs<P>(from, least(to, length), stop, block, body);
      }
    });
  }
  for (int64_t head = 0; head < heads; ++head) merge_parts<P>(a, head, parts, partial + head * parts * cell);
  return 0;
}

}  // namespace ec
