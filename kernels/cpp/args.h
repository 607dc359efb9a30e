// What crosses from Python: one struct of 8-byte fields per entry point, in the order lowering/cpp.py packs them.
// Strides are in elements; a last dimension always has stride 1; state buffers are contiguous.
#pragma once
#include <cstdint>

namespace ec {

struct State {
  void* k[3];  // dense, or codes, scales, tail
  void* v[3];
  const int64_t* length;
  const void* table;  // angles [B, C/16, 2, r/2, 16] in fp16, for keys before RoPE; in fp32 for latents
};

struct AttendArgs {
  State state;
  const void* query;    // [B, H, T, D]
  const bool* mask;     // [B, >= length] or null
  void* out;            // [B, H, T, E]
  float* lse;           // [B, H, T]
  int64_t batch, groups, queries, capacity;
  int64_t query_stride[3];  // batch, head, token
  int64_t mask_stride;
  int64_t threads;
  double scale;
};

// Operands of the score parts and of rules that compare data: right behind AttendArgs, for programs that have any, and
// for attention over blocks in any case.
struct ScoreArgs {
  const float* bias;       // [B or 1, H or 1, T or 1, >= length] or null
  int64_t bias_stride[3];  // batch, head, token; 0 where there is one for all
  const float* sinks;      // [H] or null
  double softcap;
  const int64_t* segments;  // [B or 1, >= length] or null
  int64_t segments_stride;
  const int64_t* prefix;  // [B or 1] or null
  int64_t prefix_stride;
};

// Behind ScoreArgs, for programs over latents of keys or values.
struct LatentArgs {
  const float* up;  // [G, D, latent + 2] or null
  double eps;
  const float* value_up;  // [G, value_latent + 1, E] or null
};

struct StoreArgs {
  State state;
  const void* fresh[2];  // keys [B, G, T, D], values [B, G, T, E]
  int64_t batch, groups[2], tokens, capacity;  // heads of keys, of values: latents are one
  int64_t stride[2][3];  // of keys, of values: batch, head, token
  int64_t threads;
};

struct LoadArgs {
  State state;
  void* out[2];  // keys [B, G, C, D], values [B, G, C, E]
  int64_t batch, groups, capacity;
  int64_t threads;
};

}  // namespace ec
