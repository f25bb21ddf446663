// Launcher of the CUDA kernels that turn uint8 frames into tokens. Plain C++: needs neither torch nor CUDA headers.
#pragma once

#include <cstdint>

#include "patch_embed_index.h"

namespace xclip_fast {

enum class TokenType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

// All pointers are device memory; all sizes and strides count elements.
struct PatchEmbedArguments {
  // (frames, height, width, 3) in any layout: contiguous, a crop, or planar with channel_stride = height * width
  const uint8_t* pixels;
  int64_t frame_stride;
  int64_t row_stride;
  int64_t column_stride;
  int64_t channel_stride;

  int64_t frames;
  int64_t height;  // multiple of patch
  int64_t width;   // multiple of patch
  int64_t patch;
  int64_t token_width;

  // float16, packed_weight_elements(patch, token_width) values at packed_weight_index(...), 16-byte aligned:
  // weight / (255 * std) * kWeightScale, zero where no pixel stands
  const void* weight;
  // float32 (1 + patches, token_width), 16-byte aligned: row 0 is the finished class token (class + position 0), row
  // 1 + p is position 1 + p plus the folded bias: bias + sum of weight * (128 / 255 - mean) / std
  const float* table;
  // (frames, 1 + patches, token_width) contiguous, of token_type; every element is written, the class rows too
  void* tokens;
  TokenType token_type;
};

// The same frames, as rows of float16 for a product with weights.
struct PatchRowsArguments {
  const uint8_t* pixels;
  int64_t frame_stride;
  int64_t row_stride;
  int64_t column_stride;
  int64_t channel_stride;

  int64_t frames;
  int64_t height;  // multiple of patch
  int64_t width;   // multiple of patch
  int64_t patch;

  // float16 (frames * patches, patch_row_columns(patch)) contiguous, 16-byte aligned; every element is written
  void* rows;
};

// Both queue one kernel on `stream` (a cudaStream_t) of the current device and return without waiting; they allocate
// nothing and can be captured. They return nullptr, or one line that says why nothing was launched. Zero frames are done
// at once.
const char* patch_embed_launch(const PatchEmbedArguments& arguments, void* stream);
const char* patch_rows_launch(const PatchRowsArguments& arguments, void* stream);

}  // namespace xclip_fast
