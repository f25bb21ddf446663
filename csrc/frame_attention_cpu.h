// Attention of the tokens of frames over themselves and the message of their frame, in bfloat16, on CPUs that multiply
// pairs of it (AVX512-BF16). Torch-free.
#pragma once

#include <cstdint>

namespace xclip_fast {

constexpr int64_t kHeadDim = 64;

// All numbers are bfloat16, strides are counted in them.
struct FrameAttention {
  const uint16_t* tokens;  // (frames, tokens, 3, heads, kHeadDim): query, key and value
  int64_t frame_stride;
  int64_t token_stride;
  const uint16_t* messages;  // (frames, 2, heads, kHeadDim): key and value
  int64_t message_stride;
  int64_t token_count;
  int64_t heads;
  int64_t queries;  // the first ones of each frame: up to token_count
  float scale;      // of the scores, above 0
  uint16_t* mixed;  // (frames, queries, heads, kHeadDim)
  float* lse;       // (frames, heads, queries) base 2 log-sum-exp of the scaled scores, or null
};

// Whether this processor runs the function below.
bool frame_attention_runs();

// A unit of work is one head of one frame.
void frame_attention(const FrameAttention& work, int64_t begin, int64_t end);

}  // namespace xclip_fast
