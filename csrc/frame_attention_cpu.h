// Attention of the tokens of frames over themselves and the message of their frame, in bfloat16, on CPUs that multiply
// pairs of it (AVX512-BF16). Torch-free.
#pragma once

#include <cstdint>

namespace xclip_fast {

constexpr int64_t kHeadDim = 64;

struct FrameAttention {
  // (frames * tokens + frames, 3, heads, kHeadDim) bfloat16: query, key and value of all tokens, then of the messages
  const uint16_t* packed;
  int64_t frames;
  int64_t tokens;
  int64_t heads;
  int64_t queries;  // the first ones of each frame: 1 or all
  float scale;      // of the scores, above 0
  uint16_t* mixed;  // (frames * queries, heads, kHeadDim) bfloat16
};

// Whether this processor runs the function below.
bool frame_attention_runs();

// A unit of work is one head of one frame.
void frame_attention(const FrameAttention& work, int64_t begin, int64_t end);

}  // namespace xclip_fast
