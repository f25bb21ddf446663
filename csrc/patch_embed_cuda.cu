// Launches the frame-patch embedding, or the gathering of its rows: checks sizes, chooses how pixels are read and the
// tile, queues one kernel.
// Compiled for sm_80, sm_86, sm_90a and sm_100, its kernel emulated on the host (tests/csrc); never yet run on a GPU.
#include <cuda_runtime.h>

#include "patch_embed_cuda.h"
#include "patch_embed_device.h"
#include "patch_embed_kernel.h"
#include "patch_rows_kernel.h"

namespace xclip_fast {
namespace {

template <class SomeTile, PixelPath kPath>
const char* launch(const Problem& problem, cudaStream_t stream) {
  const int64_t blocks = block_count(problem.grid.patches, problem.token_width, SomeTile::kRows, SomeTile::kColumns);
  if (blocks > INT32_MAX) return "patch_embed: more blocks than a grid holds";
  constexpr int kShared = SharedMemory<SomeTile, kPath>::kTotal;
  const auto kernel = patch_embed_kernel<SomeTile, kPath>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error == cudaSuccess) kernel<<<static_cast<unsigned>(blocks), SomeTile::kThreads, kShared, stream>>>(problem);
  // asked in any case, so that the fault is not found by the next caller
  const cudaError_t launched = cudaGetLastError();
  if (error == cudaSuccess) error = launched;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <int kUnit>
const char* launch_rows(const RowsProblem& problem, cudaStream_t stream) {
  const int64_t blocks = rows_blocks(problem);
  if (blocks > INT32_MAX) return "patch_embed: more blocks than a grid holds";
  patch_rows_kernel<kUnit><<<static_cast<unsigned>(blocks), kRowThreads, 0, stream>>>(problem);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <PixelPath kPath>
const char* launch_path(const Problem& problem, cudaStream_t stream) {
  if (uses_large_tile(problem.grid.patches, problem.token_width)) return launch<LargeTile, kPath>(problem, stream);
  return launch<SmallTile, kPath>(problem, stream);
}

template <class Arguments>
const char* frames_fault(const Arguments& arguments) {
  if (arguments.patch < 1) return "patch_embed: patch must be positive";
  if (arguments.frames < 0) return "patch_embed: frames must not be negative";
  const auto cut = [&](int64_t side) { return side > 0 && side % arguments.patch == 0; };
  if (!cut(arguments.height)) return "patch_embed: height must be a multiple of patch";
  if (!cut(arguments.width)) return "patch_embed: width must be a multiple of patch";
  if (arguments.height > kLongestSide || arguments.width > kLongestSide) return "patch_embed: frames are too large";
  return nullptr;
}

const char* fault(const PatchEmbedArguments& arguments) {
  if (const char* reason = frames_fault(arguments)) return reason;
  if (arguments.token_width < 1) return "patch_embed: token_width must be positive";
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
  const Problem problem = make_problem(arguments);
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (choose_path(problem.grid)) {
    case PixelPath::kAligned: return launch_path<PixelPath::kAligned>(problem, queue);
    case PixelPath::kSkewed: return launch_path<PixelPath::kSkewed>(problem, queue);
    case PixelPath::kScattered: return launch_path<PixelPath::kScattered>(problem, queue);
  }
  return "patch_embed: no such path";
}

const char* patch_rows_launch(const PatchRowsArguments& arguments, void* stream) {
  if (const char* reason = frames_fault(arguments)) return reason;
  if (reinterpret_cast<uintptr_t>(arguments.rows) % 16 != 0) return "patch_embed: rows must be 16-byte aligned";
  if (arguments.frames == 0) return nullptr;
  const RowsProblem problem = make_rows_problem(arguments);
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (load_unit(problem.grid)) {
    case 8: return launch_rows<8>(problem, queue);
    case 2: return launch_rows<2>(problem, queue);
    default: return launch_rows<1>(problem, queue);
  }
}

}  // namespace xclip_fast
