"""Our matrix product for blocks (``kernels/cpp/matmul.h``) beside ATen's ``brgemm``, one thread, blocks of prefill.

``python benchmarks/products.py`` prints GFLOP/s of both, best of 40 interleaved rounds. What was found is the reason
for having our own: see "One matrix product for every CPU" in ``docs/design.md``.
"""

from __future__ import annotations

import re

from common import Measured, console, table

from effcompile.lowering import toolchain

SIZES = [(192, 128, 64), (192, 64, 128), (48, 128, 64), (48, 64, 128), (192, 128, 128), (192, 80, 128)]
"""Rows, columns and depth: scores and outputs of a tile, for heads of 64, 128 and 80 channels."""

SOURCE = """
#include "matmul.h"
#include <ATen/native/CPUBlas.h>
#include <chrono>

using namespace ec;

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static float* block(int64_t count, float value) {
  float* made = static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t(64)));
  for (int64_t i = 0; i < count; ++i) made[i] = value * float(i % 97 - 48);
  return made;
}

template <int64_t M, int64_t N, int64_t K>
void measure(double* gflops) {
  constexpr Block best = best_block(N / VL);
  float *a = block((M + 64) * K, .01f), *b = block(K * N, .02f), *c = block((M + 64) * N, 0), *d = block(M * N, 0);
  double ours = 1e9, theirs = 1e9;
  for (int round = 0; round < 40; ++round) {
    double began = now();
    for (int i = 0; i < 50; ++i) multiply<float, best.rows, best.columns>(M, N, K, a, K, b, N, nullptr, c, N);
    ours = std::min(ours, now() - began);
    began = now();
    for (int i = 0; i < 50; ++i) at::native::cpublas::brgemm(M, N, K, K, N, N, false, a, b, d, false);
    theirs = std::min(theirs, now() - began);
  }
  double error = 0;
  for (int64_t i = 0; i < M * N; ++i) error = std::max(error, double(std::fabs(c[i] - d[i]) / (1 + std::fabs(d[i]))));
  gflops[0] = 50 * 2e-9 * M * N * K / ours;
  gflops[1] = 50 * 2e-9 * M * N * K / theirs;
  gflops[2] = error;
  for (float* p : {a, b, c, d}) ::operator delete[](p, std::align_val_t(64));
}

extern "C" void products(double* out) {
  CALLS
  at::native::cpublas::brgemm_release(false);
}
"""


def run() -> list[Measured]:
    """GFLOP/s of both for every size. Raises RuntimeError if they do not agree."""
    import ctypes

    calls = [f"measure<{m}, {n}, {k}>(out + {3 * i});" for i, (m, n, k) in enumerate(SIZES)]
    library = toolchain.load(toolchain.build("products", re.sub("CALLS", "\n  ".join(calls), SOURCE)))
    out = (ctypes.c_double * (3 * len(SIZES)))()
    library.products(out)
    rows = []
    for i, (m, n, k) in enumerate(SIZES):
        ours, theirs, error = out[3 * i : 3 * i + 3]
        if error > 1e-4:
            raise RuntimeError(f"{m} x {n} x {k}: the two products differ by {error:.1e}")
        note = f"brgemm {theirs:.0f} GFLOP/s; {ours / theirs:.2f} of it"
        rows.append(Measured(f"{m} x {n}, depth {k}", ours, " GFLOP/s", note=note))
    return rows


if __name__ == "__main__":
    console.print(table("Matrix products of blocks, one thread", run()))
