// The kernel that gathers the patches of uint8 frames into rows of float16, for a GEMM that another library computes.
// Compiled for GPUs and emulated on the host (tests/csrc).
//
// A thread writes one piece, eight columns of a row, in 16 bytes; neighbouring threads write neighbouring pieces. Pixels
// become uint8 - 128, which float16 holds exactly. What is read twice, by patches side by side, comes from caches.
#pragma once

#include <cstdint>

#include "patch_rows_cuda.h"
#include "patch_rows_index.h"

namespace xclip_fast {

constexpr int kRowThreads = 256;

struct RowsProblem {
  PatchGrid grid;
  const uint8_t* pixels;
  uint16_t* rows;
  int64_t bands;    // of all frames: a band is a row of patches
  uint32_t pieces;  // of a row
  uint32_t down;    // bands of a frame
  uint32_t chunks;  // blocks of a band
};

inline RowsProblem make_rows_problem(const PatchRowsArguments& arguments) {
  const int64_t down = arguments.height / arguments.patch, across = arguments.width / arguments.patch;
  const int64_t pieces = patch_row_columns(arguments.patch) / kPiece;
  return {
      {arguments.frame_stride, arguments.row_stride, arguments.column_stride, arguments.channel_stride,
       arguments.patch, across},
      arguments.pixels,
      static_cast<uint16_t*>(arguments.rows),
      arguments.frames * down,
      static_cast<uint32_t>(pieces),
      static_cast<uint32_t>(down),
      static_cast<uint32_t>(ceil_div(across * pieces, kRowThreads)),
  };
}

inline int64_t rows_blocks(const RowsProblem& problem) { return problem.bands * problem.chunks; }

// two bytes of `word` to float16 less 128: 0x6400 | byte is the float16 1024 + byte
template <uint32_t kSelector>
__device__ __forceinline__ uint32_t centred_pair(uint32_t word) {
  return pair_less(__byte_perm(word, 0x64646464u, kSelector), 1024.0f + kPixelCentre);
}

template <int kUnit>
__device__ __forceinline__ uint64_t load_bytes(const uint8_t* pixels, const PatchGrid& grid, int32_t byte) {
  if constexpr (kUnit == 8) return *reinterpret_cast<const uint64_t*>(pixels + byte);
  if constexpr (kUnit == 2) return *reinterpret_cast<const uint16_t*>(pixels + byte);
  return pixels[scattered_offset(grid, byte)];
}

struct alignas(16) Piece {
  uint32_t pairs[kPiece / 2];
};

template <int kUnit>
__global__ void __launch_bounds__(kRowThreads) patch_rows_kernel(const __grid_constant__ RowsProblem problem) {
  const PatchGrid& grid = problem.grid;
  const int64_t band = blockIdx.x / problem.chunks;
  const uint32_t index = blockIdx.x % problem.chunks * kRowThreads + threadIdx.x;
  const uint32_t right = index / problem.pieces;
  if (right >= grid.across) return;
  const uint32_t column = index % problem.pieces * kPiece;
  const int32_t patch = static_cast<int32_t>(grid.patch), row_bytes = 3 * patch;
  int32_t y = static_cast<int32_t>(column / row_bytes), byte = static_cast<int32_t>(column % row_bytes);
  const uint8_t* pixels = problem.pixels + band / problem.down * grid.frame_stride +
                          (band % problem.down * patch + y) * grid.row_stride + right * grid.patch * grid.column_stride;
  constexpr uint64_t kFilling = kUnit == 1 ? kPixelCentre : 257 * kPixelCentre;  // zeros in float16
  uint64_t bytes = 0;
#pragma unroll
  for (int i = 0; i < kPiece; i += kUnit) {
    const uint64_t unit = y < patch ? load_bytes<kUnit>(pixels, grid, byte) : kFilling;
    bytes |= unit << (8 * i);
    byte += kUnit;
    if (byte == row_bytes) {
      byte = 0;
      ++y;
      pixels += grid.row_stride;
    }
  }
  const uint32_t low = static_cast<uint32_t>(bytes), high = static_cast<uint32_t>(bytes >> 32);
  const int64_t row = band * grid.across + right;
  *reinterpret_cast<Piece*>(problem.rows + (row * problem.pieces + column / kPiece) * kPiece) = {{
      centred_pair<0x4140>(low),
      centred_pair<0x4342>(low),
      centred_pair<0x4140>(high),
      centred_pair<0x4342>(high),
  }};
}

}  // namespace xclip_fast
