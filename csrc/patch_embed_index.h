// Index maths of the frame-patch embedding: what the CUDA kernels, their emulator on the host and the packing of the
// weights share. Pure functions, no state, no CUDA headers.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define XCLIP_FAST_BOTH __host__ __device__
#else
#define XCLIP_FAST_BOTH
#endif

namespace xclip_fast {

// Pixels enter the product as uint8 - 128, which float16 holds exactly; weights are scaled up by a power of two so that
// few are subnormal, and the sum is scaled back in float32.
constexpr int kPixelCentre = 128;
constexpr float kWeightScale = 256.0f;

// A stage of the pipeline is 48 bytes of a pixel row of a patch: the whole row for patch 14 (42 bytes, and 6 with zero
// weights) and 16, half of it for patch 32.
constexpr int kStageBytes = 48;

XCLIP_FAST_BOTH constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

XCLIP_FAST_BOTH constexpr int64_t stages_per_row(int64_t patch) { return ceil_div(3 * patch, kStageBytes); }

XCLIP_FAST_BOTH constexpr int64_t stage_count(int64_t patch) { return patch * stages_per_row(patch); }

// Packed weights are float16 (stage_count, token_width, 48): stage = y * stages_per_row + (3 * x + channel) / 48.
constexpr int64_t packed_weight_elements(int64_t patch, int64_t token_width) {
  return stage_count(patch) * token_width * kStageBytes;
}

// The column of a 16-wide matrix fragment that byte 0..15 of a pixel row is multiplied in. A lane holds columns 2t,
// 2t+1, 2t+8, 2t+9 of a row of A: in this order they are the four bytes 4t..4t+3, one load. In torch, for rows (patch,
// token_width, 48 * stages_per_row) of zero-padded bytes:
//   rows.unflatten(-1, (-1, 3, 4, 2, 2)).transpose(-3, -2).flatten(-4).transpose(1, 2)
XCLIP_FAST_BOTH constexpr int fragment_column(int byte) { return byte % 16 / 4 * 2 + byte % 2 + byte % 4 / 2 * 8; }

// Where weight[token_column, channel, y, x] stands in the packed weights.
constexpr int64_t packed_weight_index(
    int64_t patch, int64_t token_width, int64_t token_column, int64_t channel, int64_t y, int64_t x) {
  const int64_t byte = 3 * x + channel;
  const int64_t stage = y * stages_per_row(patch) + byte / kStageBytes;
  const int64_t inside = byte % kStageBytes;
  return (stage * token_width + token_column) * kStageBytes + inside / 16 * 16 +
         fragment_column(static_cast<int>(inside % 16));
}

// A frame's side has to leave room for the index of a patch and of a byte of a pixel row in 32 bits.
constexpr int64_t kLongestSide = 32768;

// How the pixels of a stage reach shared memory.
enum class PixelPath : int32_t {
  kAligned,    // channel beside channel, patch a multiple of 16, rows at multiples of 16 bytes: whole 16-byte copies
  kSkewed,     // channel beside channel, any patch, any alignment: the 16-byte copies that hold the bytes
  kScattered,  // any strides, planar frames among them: byte by byte
};

// The frames and the patches they are cut into. Patches are counted through all frames, row after row of a frame.
struct PatchGrid {
  int64_t frame_stride, row_stride, column_stride, channel_stride;
  int64_t patch;
  int64_t width;
  int64_t across;     // patches in a row of patches
  int64_t per_frame;  // patches of a frame
  int64_t patches;    // patches of all frames
  int64_t origin;     // bytes from the 16-byte boundary at or before the first pixel to the first pixel
};

constexpr PatchGrid patch_grid(
    uint64_t address, int64_t frame_stride, int64_t row_stride, int64_t column_stride, int64_t channel_stride,
    int64_t frames, int64_t height, int64_t width, int64_t patch) {
  const int64_t across = width / patch;
  const int64_t per_frame = height / patch * across;
  return {frame_stride, row_stride, column_stride,      channel_stride,
          patch,        width,      across,             per_frame,
          frames * per_frame,       static_cast<int64_t>(address % 16)};
}

// Rows of patches for a product that another library computes: columns in the order (y, x, channel), filled up to whole
// pieces of 16 bytes of float16, which is also what such a product wants of its rows.
constexpr int kPiece = 8;

XCLIP_FAST_BOTH constexpr int64_t patch_row_columns(int64_t patch) {
  return ceil_div(3 * patch * patch, kPiece) * kPiece;
}

// Bytes that can be read at once anywhere in a pixel row of a patch; 1 also where a channel is not beside the next.
constexpr int load_unit(const PatchGrid& grid) {
  if (grid.column_stride != 3 || grid.channel_stride != 1) return 1;
  const int64_t steps = grid.origin | grid.row_stride | grid.frame_stride | 3 * grid.patch;
  return steps % 8 == 0 ? 8 : steps % 2 == 0 ? 2 : 1;
}

constexpr PixelPath choose_path(const PatchGrid& grid) {
  if (grid.column_stride != 3 || grid.channel_stride != 1) return PixelPath::kScattered;
  const bool aligned = (grid.origin | grid.row_stride | grid.frame_stride | grid.patch) % 16 == 0;
  return aligned ? PixelPath::kAligned : PixelPath::kSkewed;
}

// What a block of threads computes: rows are patches, columns are token columns, each warp has a part of both.
template <int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_, int kDepth_, int kBlocks_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kDepth = kDepth_;    // stages in shared memory
  static constexpr int kBlocks = kBlocks_;  // blocks a multiprocessor shall hold: what the registers are cut to
  static constexpr int kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kThreads = 32 * kWarpsAcross * (kRows / kWarpRows);

  XCLIP_FAST_BOTH static constexpr int warp_row(int thread) { return thread / 32 / kWarpsAcross * kWarpRows; }
  XCLIP_FAST_BOTH static constexpr int warp_column(int thread) { return thread / 32 % kWarpsAcross * kWarpColumns; }
};

using LargeTile = Tile<128, 128, 32, 64, 3, 2>;
using SmallTile = Tile<64, 64, 32, 32, 4, 4>;

XCLIP_FAST_BOTH constexpr int64_t block_count(int64_t patches, int64_t token_width, int rows, int columns) {
  return ceil_div(patches, rows) * ceil_div(token_width, columns);
}

// Large tiles read the weights half as often, and need two blocks for each multiprocessor of a large GPU to pay.
constexpr int64_t kLargeTileBlocks = 2 * 132;

constexpr bool uses_large_tile(int64_t patches, int64_t token_width) {
  return block_count(patches, token_width, LargeTile::kRows, LargeTile::kColumns) >= kLargeTileBlocks;
}

// A row of a tile: where its patch is read and where its token is written.
struct PatchRow {
  int64_t source;    // its first pixel, from the 16-byte boundary at or before the first pixel of all
  int64_t token;     // row of the tokens, -1 past the last patch
  int32_t position;  // its place in the frame, from 0
  int32_t row_left;  // bytes from its first pixel to the end of the pixel row, where channel stands beside channel
};

// Rows past the last patch read the last patch, so that every load is of a pixel.
XCLIP_FAST_BOTH constexpr PatchRow patch_row(const PatchGrid& grid, int64_t row) {
  const int64_t index = row < grid.patches ? row : grid.patches - 1;
  const int64_t frame = index / grid.per_frame;
  const int64_t position = index % grid.per_frame;
  const int64_t down = position / grid.across * grid.patch;
  const int64_t right = position % grid.across * grid.patch;
  return {
      grid.origin + frame * grid.frame_stride + down * grid.row_stride + right * grid.column_stride,
      row < grid.patches ? index + frame + 1 : -1,
      static_cast<int32_t>(position),
      static_cast<int32_t>(3 * (grid.width - right)),
  };
}

// A stage's pixels in shared memory: a slot a row. Slots are odd multiples of 16 bytes, so that the eight rows a warp
// reads at once lie in different banks.
template <PixelPath kPath>
struct PixelSlot {
  static constexpr int kCopies = kPath == PixelPath::kSkewed ? 4 : 3;  // 16-byte copies that hold 48 bytes
  static constexpr int kBytes = kPath == PixelPath::kSkewed ? 80 : 48;
};

// A stage: pixel row y of the patches, from byte `byte` of it.
struct Stage {
  int64_t row_offset = 0;  // y * row_stride
  int32_t byte = 0;

  XCLIP_FAST_BOTH constexpr void advance(const PatchGrid& grid) {
    byte += kStageBytes;
    if (byte >= 3 * grid.patch) {
      byte = 0;
      row_offset += grid.row_stride;
    }
  }
};

// Bytes between the start of a slot, which is a multiple of 16 in memory, and the pixels of the stage.
template <PixelPath kPath>
XCLIP_FAST_BOTH constexpr int pixel_skew(int64_t source, const Stage& stage) {
  return kPath == PixelPath::kSkewed ? static_cast<int>((source + stage.row_offset) & 15) : 0;
}

// One 16-byte copy of a slot: `bytes` of it are read, the others become zero; nothing past the pixel row is read.
struct PixelCopy {
  int64_t source;
  int32_t destination;
  int32_t bytes;
};

template <PixelPath kPath>
XCLIP_FAST_BOTH constexpr PixelCopy pixel_copy(const PatchRow& row, int tile_row, int copy, const Stage& stage) {
  const int start = stage.byte + 16 * copy - pixel_skew<kPath>(row.source, stage);
  const int left = row.row_left - start;
  const bool whole = kPath == PixelPath::kAligned || left >= 16;
  return {
      row.source + stage.row_offset + start,
      tile_row * PixelSlot<kPath>::kBytes + 16 * copy,
      whole ? 16 : left > 0 ? left : 0,
  };
}

// From a patch's first pixel to byte `byte` of its pixel row, for any strides.
XCLIP_FAST_BOTH constexpr int64_t scattered_offset(const PatchGrid& grid, int byte) {
  return byte / 3 * grid.column_stride + byte % 3 * grid.channel_stride;
}

// Row of 16 that a lane holds in half 0 or 1 of a fragment of A, and of the sums.
XCLIP_FAST_BOTH constexpr int fragment_row(int half, int lane) { return lane / 4 + 8 * half; }

// The first of the four pixel bytes a lane reads of a row for the first 16 columns of a stage; 16 further for the next.
template <PixelPath kPath>
XCLIP_FAST_BOTH constexpr int pixel_fragment(const PatchRow& row, int tile_row, int lane, const Stage& stage) {
  return tile_row * PixelSlot<kPath>::kBytes + pixel_skew<kPath>(row.source, stage) + lane % 4 * 4;
}

// A stage's weights in shared memory: a slot a token column, 48 values and 8 unused ones against bank conflicts. Within
// 32 columns they are reordered so that a lane's sums are of eight columns side by side, one 16-byte store in float16.
constexpr int kWeightSlot = kStageBytes + 8;

XCLIP_FAST_BOTH constexpr int weight_slot(int column) {
  return column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}

constexpr int kWeightCopies = kStageBytes / 8;  // 16-byte copies of a slot

// The value in shared memory whose 16 bytes a lane names to ldmatrix.x4: 16 slots x 16 values.
XCLIP_FAST_BOTH constexpr int weight_fragment(int first_slot, int lane, int step) {
  return (first_slot + lane % 8 + lane / 16 * 8) * kWeightSlot + 16 * step + lane / 8 % 2 * 8;
}

// First of the eight token columns of a lane in a group of 32.
XCLIP_FAST_BOTH constexpr int lane_column(int group, int lane) { return 32 * group + lane % 4 * 8; }

template <class SomeTile, PixelPath kPath>
struct SharedMemory {
  static constexpr int kPixelStage = SomeTile::kRows * PixelSlot<kPath>::kBytes;
  static constexpr int kWeightStage = SomeTile::kColumns * kWeightSlot * 2;
  static constexpr int kPixels = SomeTile::kRows * static_cast<int>(sizeof(PatchRow));
  static constexpr int kWeights = kPixels + SomeTile::kDepth * kPixelStage;
  static constexpr int kTotal = kWeights + SomeTile::kDepth * kWeightStage;
  static_assert(kPixels % 16 == 0 && kPixelStage % 16 == 0 && kWeightStage % 16 == 0);
};

}  // namespace xclip_fast
