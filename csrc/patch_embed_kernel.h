// The kernel of the frame-patch embedding: an implicit product of uint8 patches and weights on the tensor cores.
// Compiled for GPUs and emulated on the host (tests/csrc); never yet run on a GPU.
//
// A block computes SomeTile::kRows patches x SomeTile::kColumns token columns. Stages of 48 bytes of a pixel row and
// their weights stream through shared memory; pixels become float16 (uint8 - 128, exact) in registers, so no float copy
// of the frames is ever written. Addresses come from patch_embed_index.h; copies and fragments from
// patch_embed_device.h, or on the host from tests/csrc/simt.h, which is included first.
#pragma once

#include <cstdint>

#include "patch_embed_cuda.h"
#include "patch_embed_index.h"
#include "patch_rows_kernel.h"

namespace xclip_fast {

struct Problem {
  PatchGrid grid;
  const uint8_t* pixels;  // the 16-byte boundary at or before the first pixel
  const uint16_t* weight;
  const float* table;
  void* tokens;
  int64_t token_width;
  TokenType token_type;
  bool vectors;  // eight token columns are 16-byte aligned everywhere
};

inline Problem make_problem(const PatchEmbedArguments& arguments) {
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  const PatchGrid grid = patch_grid(
      address(arguments.pixels), arguments.frame_stride, arguments.row_stride, arguments.column_stride,
      arguments.channel_stride, arguments.frames, arguments.height, arguments.width, arguments.patch);
  return {
      grid,
      arguments.pixels - grid.origin,
      static_cast<const uint16_t*>(arguments.weight),
      arguments.table,
      arguments.tokens,
      arguments.token_width,
      arguments.token_type,
      arguments.token_width % 8 == 0 && (address(arguments.table) | address(arguments.tokens)) % 16 == 0,
  };
}

template <PixelPath kPath>
__device__ __forceinline__ uint32_t four_pixels(const uint8_t* pixels, int offset) {
  if constexpr (kPath == PixelPath::kSkewed) {
    const uint8_t* words = pixels + (offset & ~3);
    return __funnelshift_r(load_shared(words), load_shared(words + 4), 8 * (offset & 3));
  } else {
    return load_shared(pixels + offset);
  }
}

template <class SomeTile, PixelPath kPath>
__device__ __forceinline__ void load_pixels(
    uint8_t* slots, const PatchRow* rows, const Problem& problem, const Stage& stage) {
  constexpr int kCopies = PixelSlot<kPath>::kCopies;
#pragma unroll
  for (int first = 0; first < SomeTile::kRows * kCopies; first += SomeTile::kThreads) {
    const int index = first + static_cast<int>(threadIdx.x);
    if (first + SomeTile::kThreads > SomeTile::kRows * kCopies && index >= SomeTile::kRows * kCopies) break;
    const int row = index / kCopies;
    const PixelCopy copy = pixel_copy<kPath>(rows[row], row, index % kCopies, stage);
    if constexpr (kPath == PixelPath::kAligned) {
      copy_16_bytes(slots + copy.destination, problem.pixels + copy.source);
    } else {
      copy_16_bytes(slots + copy.destination, problem.pixels + copy.source, copy.bytes);
    }
  }
}

// the same for any strides: a thread gathers four bytes at a time
template <class SomeTile>
__device__ __forceinline__ void gather_pixels(
    uint8_t* slots, const PatchRow* rows, const Problem& problem, const Stage& stage) {
  constexpr int kWords = kStageBytes / 4;
  for (int index = threadIdx.x; index < SomeTile::kRows * kWords; index += SomeTile::kThreads) {
    const int row = index / kWords;
    const int word = index % kWords * 4;
    const uint8_t* source = problem.pixels + rows[row].source + stage.row_offset;
    uint32_t bytes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int byte = stage.byte + word + i;
      if (byte < 3 * problem.grid.patch) {
        bytes |= static_cast<uint32_t>(source[scattered_offset(problem.grid, byte)]) << (8 * i);
      }
    }
    store_shared(slots + row * PixelSlot<PixelPath::kScattered>::kBytes + word, bytes);
  }
}

// weights: the stage's, (token_width, 48); columns past the last one read the last one
template <class SomeTile>
__device__ __forceinline__ void load_weights(
    uint8_t* slots, const uint16_t* weights, int64_t first_column, int64_t token_width) {
#pragma unroll
  for (int first = 0; first < SomeTile::kColumns * kWeightCopies; first += SomeTile::kThreads) {
    const int index = first + static_cast<int>(threadIdx.x);
    static_assert(SomeTile::kColumns * kWeightCopies % SomeTile::kThreads == 0);
    const int column = index / kWeightCopies;
    const int value = index % kWeightCopies * 8;
    const int64_t source = first_column + column < token_width ? first_column + column : token_width - 1;
    copy_16_bytes(slots + 2 * (weight_slot(column) * kWeightSlot + value), weights + source * kStageBytes + value);
  }
}

template <class SomeTile>
using Sums = float[SomeTile::kWarpRows / 16][SomeTile::kWarpColumns / 8][4];

// adds a stage's products to the sums of a warp
template <class SomeTile, PixelPath kPath>
__device__ __forceinline__ void multiply_stage(
    Sums<SomeTile>& sums, const uint8_t* pixels, const uint8_t* weights, const PatchRow* rows, const Stage& stage) {
  constexpr int kM = SomeTile::kWarpRows / 16, kPairs = SomeTile::kWarpColumns / 16;
  const int thread = threadIdx.x, lane = thread % 32;
  const int first_row = SomeTile::warp_row(thread), first_column = SomeTile::warp_column(thread);
  int offsets[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * m + fragment_row(half, lane);
      offsets[m][half] = pixel_fragment<kPath>(rows[row], row, lane, stage);
    }
  }
#pragma unroll
  for (int step = 0; step < kStageBytes / 16; ++step) {
    uint32_t b[kPairs][4];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      load_matrices(b[pair], weights + 2 * weight_fragment(first_column + 16 * pair, lane, step));
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      uint32_t a[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t four = four_pixels<kPath>(pixels, offsets[m][half] + 16 * step);
        a[half] = centred_pair<0x4140>(four);
        a[half + 2] = centred_pair<0x4342>(four);
      }
#pragma unroll
      for (int n = 0; n < 2 * kPairs; ++n) multiply(sums[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }
}

template <class Value>
struct alignas(16) Eight {
  Value values[8];
};

// eight values, or as many as are left
template <class Value>
__device__ __forceinline__ void copy_eight(Value* destination, const Value* source, int64_t count, bool vectors) {
  if (vectors) {
    *reinterpret_cast<Eight<Value>*>(destination) = *reinterpret_cast<const Eight<Value>*>(source);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) destination[i] = source[i];
  }
}

// row `token` of the tokens = sums / kWeightScale + row `entry` of the table, for eight columns from `column`
__device__ __forceinline__ void write_token(
    const Problem& problem, int64_t token, int64_t entry, int64_t column, const float (&sums)[8]) {
  const int64_t count = problem.token_width - column;
  const int64_t at = token * problem.token_width + column;
  Eight<float> values = {};
  copy_eight(values.values, problem.table + entry * problem.token_width + column, count, problem.vectors);
#pragma unroll
  for (int i = 0; i < 8; ++i) values.values[i] += sums[i] / kWeightScale;
  if (problem.token_type == TokenType::kFloat32) {
    copy_eight(static_cast<float*>(problem.tokens) + at, values.values, count, problem.vectors);
    return;
  }
  Eight<uint16_t> rounded;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const uint32_t pair = rounded_pair(problem.token_type, values.values[i], values.values[i + 1]);
    rounded.values[i] = static_cast<uint16_t>(pair);
    rounded.values[i + 1] = static_cast<uint16_t>(pair >> 16);
  }
  copy_eight(static_cast<uint16_t*>(problem.tokens) + at, rounded.values, count, problem.vectors);
}

// the patches of a warp
template <class SomeTile>
__device__ __forceinline__ void write_patches(
    const Problem& problem, const Sums<SomeTile>& sums, const PatchRow* rows, int64_t first_column) {
  const int thread = threadIdx.x, lane = thread % 32;
#pragma unroll
  for (int m = 0; m < SomeTile::kWarpRows / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const PatchRow row = rows[SomeTile::warp_row(thread) + 16 * m + fragment_row(half, lane)];
      if (row.token < 0) continue;
#pragma unroll
      for (int group = 0; group < SomeTile::kWarpColumns / 32; ++group) {
        const int64_t column = first_column + SomeTile::warp_column(thread) + lane_column(group, lane);
        if (column >= problem.token_width) continue;
        float eight[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) eight[i] = sums[m][4 * group + i / 2][2 * half + i % 2];
        write_token(problem, row.token, row.position + 1, column, eight);
      }
    }
  }
}

// the class tokens of the frames whose first patch is in the tile
template <class SomeTile>
__device__ __forceinline__ void write_class_tokens(const Problem& problem, const PatchRow* rows, int64_t first_column) {
  constexpr int kEights = SomeTile::kColumns / 8;
  const int64_t column = first_column + threadIdx.x % kEights * 8;
  if (column >= problem.token_width) return;
  for (int row = threadIdx.x / kEights; row < SomeTile::kRows; row += SomeTile::kThreads / kEights) {
    if (rows[row].token > 0 && rows[row].position == 0) write_token(problem, rows[row].token - 1, 0, column, {});
  }
}

template <class SomeTile, PixelPath kPath>
__global__ void __launch_bounds__(SomeTile::kThreads, SomeTile::kBlocks)
    patch_embed_kernel(const __grid_constant__ Problem problem) {
  using Memory = SharedMemory<SomeTile, kPath>;
  uint8_t* memory = block_memory();
  PatchRow* rows = reinterpret_cast<PatchRow*>(memory);

  // neighbouring blocks share their patches, which are read from L2 then
  const int64_t column_tiles = ceil_div(problem.token_width, SomeTile::kColumns);
  const int64_t first_row = blockIdx.x / column_tiles * SomeTile::kRows;
  const int64_t first_column = blockIdx.x % column_tiles * SomeTile::kColumns;
  if (threadIdx.x < SomeTile::kRows) rows[threadIdx.x] = patch_row(problem.grid, first_row + threadIdx.x);
  __syncthreads();

  const int stages = static_cast<int>(stage_count(problem.grid.patch));
  const uint16_t* weights = problem.weight;
  Stage ahead, now;
  int loaded = 0;
  auto load = [&] {
    if (loaded < stages) {
      const int place = loaded % SomeTile::kDepth;
      uint8_t* pixel_slots = memory + Memory::kPixels + place * Memory::kPixelStage;
      if constexpr (kPath == PixelPath::kScattered) {
        gather_pixels<SomeTile>(pixel_slots, rows, problem, ahead);
      } else {
        load_pixels<SomeTile, kPath>(pixel_slots, rows, problem, ahead);
      }
      uint8_t* weight_slots = memory + Memory::kWeights + place * Memory::kWeightStage;
      load_weights<SomeTile>(weight_slots, weights, first_column, problem.token_width);
      weights += problem.token_width * kStageBytes;
      ahead.advance(problem.grid);
      ++loaded;
    }
    end_of_copies();  // an empty group too, so that the count of groups in flight stays the same
  };

#pragma unroll 1
  for (int i = 0; i < SomeTile::kDepth - 1; ++i) load();
  Sums<SomeTile> sums = {};
#pragma unroll 1
  for (int i = 0; i < stages; ++i) {
    wait_for_copies<SomeTile::kDepth - 2>();
    // stage i has arrived for every thread, and all have left stage i - 1, which is loaded over now
    __syncthreads();
    load();
    const int place = i % SomeTile::kDepth;
    multiply_stage<SomeTile, kPath>(
        sums,
        memory + Memory::kPixels + place * Memory::kPixelStage,
        memory + Memory::kWeights + place * Memory::kWeightStage,
        rows,
        now);
    now.advance(problem.grid);
  }
  __syncwarp();  // free on a GPU, whose products are complete; the emulator completes those of a warp here
  write_patches<SomeTile>(problem, sums, rows, first_column);
  write_class_tokens<SomeTile>(problem, rows, first_column);
}

}  // namespace xclip_fast
