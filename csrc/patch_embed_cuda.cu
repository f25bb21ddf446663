// Frame-patch embedding from uint8 frames: an implicit matrix product of patches and weights on the tensor cores.
// Compiled for sm_80, sm_86, sm_90a and sm_100 and emulated on the host (tests/csrc); never yet run on a GPU.
//
// A block computes SomeTile::kRows patches x SomeTile::kColumns token columns. Stages of 48 bytes of a pixel row and their
// weights stream through shared memory; pixels become float16 (uint8 - 128, exact) in registers, so no float copy of the
// frames is ever written. All addresses come from patch_embed_index.h, which the emulator shares.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "patch_embed_cuda.h"

namespace xclip_fast {
namespace {

struct Problem {
  PatchGrid grid;
  const uint8_t* pixels;  // the 16-byte boundary at or before the first pixel
  const __half* weight;
  const float* table;
  void* tokens;
  int64_t token_width;
  TokenType token_type;
  bool vectors;  // eight token columns are 16-byte aligned everywhere
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void copy_16_bytes(void* destination, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(destination)), "l"(source), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy_16_bytes(void* destination, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared_address(destination)), "l"(source) : "memory");
}

__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int kInFlight>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kInFlight) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// two bytes of `word` to float16 less 128: 0x6400 | byte is the float16 1024 + byte
template <uint32_t kSelector>
__device__ __forceinline__ uint32_t centred_pair(uint32_t word) {
  const uint32_t raised = __byte_perm(word, 0x64646464u, kSelector);
  const __half2 pair = __hsub2(reinterpret_cast<const __half2&>(raised), __float2half2_rn(1024.0f + kPixelCentre));
  return reinterpret_cast<const uint32_t&>(pair);
}

template <PixelPath kPath>
__device__ __forceinline__ uint32_t four_pixels(const uint8_t* pixels, int offset) {
  if constexpr (kPath == PixelPath::kSkewed) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(pixels + (offset & ~3));
    return __funnelshift_r(words[0], words[1], 8 * (offset & 3));
  } else {
    return *reinterpret_cast<const uint32_t*>(pixels + offset);
  }
}

template <class SomeTile, PixelPath kPath>
__device__ __forceinline__ void load_pixels(uint8_t* slots, const PatchRow* rows, const Problem& problem, const Stage& stage) {
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
__device__ __forceinline__ void gather_pixels(uint8_t* slots, const PatchRow* rows, const Problem& problem, const Stage& stage) {
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
    *reinterpret_cast<uint32_t*>(slots + row * PixelSlot<PixelPath::kScattered>::kBytes + word) = bytes;
  }
}

// weights: the stage's, (token_width, 48); columns past the last one read the last one
template <class SomeTile>
__device__ __forceinline__ void load_weights(__half* slots, const __half* weights, int64_t first_column, int64_t token_width) {
#pragma unroll
  for (int first = 0; first < SomeTile::kColumns * kWeightCopies; first += SomeTile::kThreads) {
    const int index = first + static_cast<int>(threadIdx.x);
    static_assert(SomeTile::kColumns * kWeightCopies % SomeTile::kThreads == 0);
    const int column = index / kWeightCopies;
    const int value = index % kWeightCopies * 8;
    const int64_t source = min(first_column + column, token_width - 1);
    copy_16_bytes(slots + weight_slot(column) * kWeightSlot + value, weights + source * kStageBytes + value);
  }
}

template <class SomeTile>
using Sums = float[SomeTile::kWarpRows / 16][SomeTile::kWarpColumns / 8][4];

// adds a stage's products to the sums of a warp
template <class SomeTile, PixelPath kPath>
__device__ __forceinline__ void multiply_stage(
    Sums<SomeTile>& sums, const uint8_t* pixels, const __half* weights, const PatchRow* rows, const Stage& stage) {
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
      load_matrices(b[pair], weights + weight_fragment(first_column + 16 * pair, lane, step));
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

__device__ __forceinline__ uint32_t rounded_pair(TokenType type, float first, float second) {
  if (type == TokenType::kFloat16) {
    const __half2 pair = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
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
  extern __shared__ __align__(16) uint8_t memory[];
  PatchRow* rows = reinterpret_cast<PatchRow*>(memory);

  // neighbouring blocks share their patches, which are read from L2 then
  const int64_t column_tiles = ceil_div(problem.token_width, SomeTile::kColumns);
  const int64_t first_row = blockIdx.x / column_tiles * SomeTile::kRows;
  const int64_t first_column = blockIdx.x % column_tiles * SomeTile::kColumns;
  if (threadIdx.x < SomeTile::kRows) rows[threadIdx.x] = patch_row(problem.grid, first_row + threadIdx.x);
  __syncthreads();

  const int stages = static_cast<int>(stage_count(problem.grid.patch));
  const __half* weights = problem.weight;
  Stage ahead, now;
  int loaded = 0;
  auto load = [&] {
    if (loaded < stages) {
      const int place = loaded % SomeTile::kDepth;
      uint8_t* pixel_slots = memory + Memory::kPixels + place * Memory::kPixelStage;
      __half* weight_slots = reinterpret_cast<__half*>(memory + Memory::kWeights + place * Memory::kWeightStage);
      if constexpr (kPath == PixelPath::kScattered) {
        gather_pixels<SomeTile>(pixel_slots, rows, problem, ahead);
      } else {
        load_pixels<SomeTile, kPath>(pixel_slots, rows, problem, ahead);
      }
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
    __syncthreads();  // stage i has arrived for every thread, and all have left stage i - 1, which is loaded over now
    load();
    const int place = i % SomeTile::kDepth;
    multiply_stage<SomeTile, kPath>(
        sums,
        memory + Memory::kPixels + place * Memory::kPixelStage,
        reinterpret_cast<const __half*>(memory + Memory::kWeights + place * Memory::kWeightStage),
        rows,
        now);
    now.advance(problem.grid);
  }
  write_patches<SomeTile>(problem, sums, rows, first_column);
  write_class_tokens<SomeTile>(problem, rows, first_column);
}

template <class SomeTile, PixelPath kPath>
const char* launch(const Problem& problem, cudaStream_t stream) {
  const int64_t blocks =
      block_count(problem.grid.patches, problem.token_width, SomeTile::kRows, SomeTile::kColumns);
  if (blocks > INT32_MAX) return "patch_embed: more blocks than a grid holds";
  constexpr int kShared = SharedMemory<SomeTile, kPath>::kTotal;
  const auto kernel = patch_embed_kernel<SomeTile, kPath>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), SomeTile::kThreads, kShared, stream>>>(problem);
  }
  const cudaError_t last = cudaGetLastError();
  if (error == cudaSuccess) error = last;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <PixelPath kPath>
const char* launch_path(const Problem& problem, cudaStream_t stream) {
  if (uses_large_tile(problem.grid.patches, problem.token_width)) return launch<LargeTile, kPath>(problem, stream);
  return launch<SmallTile, kPath>(problem, stream);
}

const char* fault(const PatchEmbedArguments& arguments) {
  if (arguments.patch < 1) return "patch_embed: patch must be positive";
  if (arguments.token_width < 1) return "patch_embed: token_width must be positive";
  if (arguments.frames < 0) return "patch_embed: frames must not be negative";
  if (arguments.height < 1 || arguments.height % arguments.patch != 0) return "patch_embed: height must be a multiple of patch";
  if (arguments.width < 1 || arguments.width % arguments.patch != 0) return "patch_embed: width must be a multiple of patch";
  if (arguments.height > kLongestSide || arguments.width > kLongestSide) return "patch_embed: frames are too large";
  if (arguments.token_type < TokenType::kFloat16 || arguments.token_type > TokenType::kFloat32) {
    return "patch_embed: no such token_type";
  }
  if (reinterpret_cast<uintptr_t>(arguments.weight) % 16 != 0) return "patch_embed: weight must be 16-byte aligned";
  return nullptr;
}

}  // namespace

const char* patch_embed_launch(const PatchEmbedArguments& arguments, void* stream) {
  if (const char* reason = fault(arguments)) return reason;
  if (arguments.frames == 0) return nullptr;
  const uint64_t address = reinterpret_cast<uintptr_t>(arguments.pixels);
  const PatchGrid grid = patch_grid(
      address, arguments.frame_stride, arguments.row_stride, arguments.column_stride, arguments.channel_stride,
      arguments.frames, arguments.height, arguments.width, arguments.patch);
  const uintptr_t outputs = reinterpret_cast<uintptr_t>(arguments.table) | reinterpret_cast<uintptr_t>(arguments.tokens);
  const Problem problem = {
      grid,
      arguments.pixels - grid.origin,
      static_cast<const __half*>(arguments.weight),
      arguments.table,
      arguments.tokens,
      arguments.token_width,
      arguments.token_type,
      arguments.token_width % 8 == 0 && outputs % 16 == 0,
  };
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (choose_path(grid)) {
    case PixelPath::kAligned: return launch_path<PixelPath::kAligned>(problem, queue);
    case PixelPath::kSkewed: return launch_path<PixelPath::kSkewed>(problem, queue);
    case PixelPath::kScattered: return launch_path<PixelPath::kScattered>(problem, queue);
  }
  return "patch_embed: no such path";
}

}  // namespace xclip_fast
