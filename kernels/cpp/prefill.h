// Attention of many query rows over a store.
#pragma once
#include "decode.h"

namespace ec {

template <class P>
int64_t prefill(const AttendArgs& a) {
  return decode<P>(a);
}

}  // namespace ec
