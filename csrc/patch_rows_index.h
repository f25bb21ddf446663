// Index maths of the rows of patches: what the CUDA kernel, its launcher and its emulator on the host share. Pure
// functions, no state, no CUDA headers.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define XCLIP_FAST_BOTH __host__ __device__
#else
#define XCLIP_FAST_BOTH
#endif

namespace xclip_fast {

// Pixels enter the GEMM as uint8 - 128, which float16 holds exactly.
constexpr int kPixelCentre = 128;

// A frame's side has to leave room for the index of a piece and of a byte of a pixel row in 32 bits.
constexpr int64_t kLongestSide = 32768;

// Columns of a row of patches in the order (y, x, channel), filled up to whole pieces of 16 bytes of float16, which is
// also what a library's GEMM wants of its rows.
constexpr int kPiece = 8;

XCLIP_FAST_BOTH constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

XCLIP_FAST_BOTH constexpr int64_t patch_row_columns(int64_t patch) {
  return ceil_div(3 * patch * patch, kPiece) * kPiece;
}

// The layout of the frames and how they are cut into patches.
struct PatchGrid {
  int64_t frame_stride, row_stride, column_stride, channel_stride;
  int64_t patch;
  int64_t across;  // patches in a row of patches
};

// Bytes that can be read at once anywhere in a pixel row of a patch; 1 also where a channel is not beside the next.
constexpr int load_unit(uint64_t address, const PatchGrid& grid) {
  if (grid.column_stride != 3 || grid.channel_stride != 1) return 1;
  const uint64_t steps = address | grid.row_stride | grid.frame_stride | 3 * grid.patch;
  return steps % 8 == 0 ? 8 : steps % 2 == 0 ? 2 : 1;
}

// From a patch's first pixel to byte `byte` of its pixel row, for any strides.
XCLIP_FAST_BOTH constexpr int64_t scattered_offset(const PatchGrid& grid, int byte) {
  return byte / 3 * grid.column_stride + byte % 3 * grid.channel_stride;
}

}  // namespace xclip_fast
