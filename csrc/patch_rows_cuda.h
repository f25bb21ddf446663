// Launcher of the CUDA kernel that gathers the patches of uint8 frames. Plain C++: needs neither torch nor CUDA headers.
#pragma once

#include <cstdint>

#include "patch_rows_index.h"

namespace xclip_fast {

// All pointers are device memory; all sizes and strides count elements.
struct PatchRowsArguments {
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

  // float16 (frames * patches, patch_row_columns(patch)) contiguous, 16-byte aligned; every element is written
  void* rows;
};

// Queues one kernel on `stream` (a cudaStream_t) of the current device and returns without waiting; it allocates nothing
// and can be captured. Returns nullptr, or one line that says why nothing was launched. Zero frames are done at once.
const char* patch_rows_launch(const PatchRowsArguments& arguments, void* stream);

}  // namespace xclip_fast
