// An FFN over the neurons that many tokens have chosen: tokens sorted by group, and for each group three of ATen's matrix
// products. A group that nobody chose costs nothing.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "grouped.h"

namespace ec {

template <class T>
inline int64_t grouped_ffn_many(const GroupedArgs& a) {
  struct Sums;
  const int64_t size = a.size, groups = (a.neurons - a.shared) / a.width;
  Routes routes;
  if (!sort_by_group(a, groups, routes)) return 2;
  // The dtype is decided: no autocast, and nothing is recorded.
  c10::impl::ExcludeDispatchKeyGuard below(c10::autocast_dispatch_keyset | c10::autograd_dispatch_keyset);
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  const auto matrix = [&](const void* data, int64_t first, int64_t rows) {
    return at::from_blob(static_cast<T*>(const_cast<void*>(data)) + first * size, {rows, size}, options);
  };
  T* out = static_cast<T*>(a.out);
  const T* x = static_cast<const T*>(a.x);
  float* sums;
  if constexpr (std::is_same_v<T, float>)
    sums = out;
  else
    sums = scratch<Sums>(a.rows * size);
  for (int64_t r = 0; r < a.rows; ++r) {
    for (int64_t j = 0; j < size; j += VL) {
      const Vec bias = a.bias[2] ? load_f32(static_cast<const T*>(a.bias[2]) + j, size - j) : Vec(0.f);
      store_f32(sums + r * size + j, bias, size - j);
    }
  }

  const auto group = [&](int64_t first, int64_t width, const int32_t* token, const float* weight, int64_t tokens) {
    at::Tensor from;
    if (token) {
      from = at::empty({tokens, size}, options);
      T* to = static_cast<T*>(from.data_ptr());
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1)
      for (int64_t r = 0; r < tokens; ++r) std::copy_n(x + token[r] * size, size, to + r * size);
    } else {
      from = matrix(a.x, 0, tokens);
    }
    const at::Tensor gated = a.gate ? at::mm(from, matrix(a.gate, first, width).t()) : at::Tensor();
    const at::Tensor middle = at::mm(from, matrix(a.up, first, width).t());
    T *g = a.gate ? static_cast<T*>(gated.data_ptr()) : nullptr, *h = static_cast<T*>(middle.data_ptr());
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1)
    for (int64_t r = 0; r < tokens; ++r) {
      struct Row;
      const int64_t ld = round_up(width, VL);
      float* part[2] = {scratch<Row>(2 * ld), nullptr};
      part[1] = part[0] + ld;
      const T* from[2] = {g, h};
      for (int i = g ? 0 : 1; i < 2; ++i) {
        const T* bias = static_cast<const T*>(a.bias[i]);
        for (int64_t j = 0; j < width; j += VL) {
          const Vec v = load_f32(from[i] + r * width + j, width - j);
          (bias ? v + load_f32(bias + first + j, width - j) : v).store(part[i] + j);
        }
      }
      activate(a.activation, g ? part[0] : nullptr, part[1], width);
      for (int64_t j = 0; j < width && a.threshold; ++j) {
        const float scale = a.scale ? a.scale[first + j] : 1.f;
        if (std::fabs(part[1][j]) * scale <= *a.threshold) part[1][j] = 0.f;
      }
      const Vec factor(weight ? weight[r] : 1.f);
      for (int64_t j = 0; j < width; j += VL)
        store_f32(h + r * width + j, Vec::loadu(part[1] + j) * factor, width - j);
    }
    const at::Tensor results = at::mm(middle, matrix(a.down, first, width));
    const T* result = static_cast<const T*>(results.data_ptr());
    // By columns, as a token may be there twice.
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
    {
      const Slab slab(size, omp_get_thread_num(), omp_get_num_threads());
      for (int64_t r = 0; r < tokens; ++r) {
        float* to = sums + (token ? token[r] : r) * size;
        for (int64_t j = slab.begin; j < slab.end; j += VL) {
          const int64_t n = slab.end - j;
          store_f32(to + j, load_f32(to + j, n) + load_f32(result + r * size + j, n), n);
        }
      }
    }
  };
  if (a.shared) group(0, a.shared, nullptr, nullptr, a.rows);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = routes.begin[g], tokens = routes.begin[g + 1] - begin;
    if (tokens) group(a.shared + g * a.width, a.width, routes.token + begin, routes.weight + begin, tokens);
  }
  if constexpr (!std::is_same_v<T, float>)
    for (int64_t j = 0; j < a.rows * size; j += VL)
      store_f32(out + j, load_f32(sums + j, a.rows * size - j), a.rows * size - j);
  return 0;
}

}  // namespace ec
