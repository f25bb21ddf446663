// Launches the gathering of patches: checks sizes, chooses how much is read at once, queues one kernel.
#include <cuda_runtime.h>

#include "patch_rows_cuda.h"
#include "patch_rows_device.h"
#include "patch_rows_kernel.h"

namespace xclip_fast {
namespace {

template <int kUnit>
const char* launch(const RowsProblem& problem, cudaStream_t stream) {
  const int64_t blocks = rows_blocks(problem);
  if (blocks > INT32_MAX) return "patch_embed: more blocks than a grid holds";
  patch_rows_kernel<kUnit><<<static_cast<unsigned>(blocks), kRowThreads, 0, stream>>>(problem);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* fault(const PatchRowsArguments& arguments) {
  if (arguments.patch < 1) return "patch_embed: patch must be positive";
  if (arguments.frames < 0) return "patch_embed: frames must not be negative";
  const auto cut = [&](int64_t side) { return side > 0 && side % arguments.patch == 0; };
  if (!cut(arguments.height)) return "patch_embed: height must be a multiple of patch";
  if (!cut(arguments.width)) return "patch_embed: width must be a multiple of patch";
  if (arguments.height > kLongestSide || arguments.width > kLongestSide) return "patch_embed: frames are too large";
  if (reinterpret_cast<uintptr_t>(arguments.rows) % 16 != 0) return "patch_embed: rows must be 16-byte aligned";
  return nullptr;
}

}  // namespace

const char* patch_rows_launch(const PatchRowsArguments& arguments, void* stream) {
  if (const char* reason = fault(arguments)) return reason;
  if (arguments.frames == 0) return nullptr;
  const RowsProblem problem = make_rows_problem(arguments);
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (load_unit(reinterpret_cast<uintptr_t>(arguments.pixels), problem.grid)) {
    case 8: return launch<8>(problem, queue);
    case 2: return launch<2>(problem, queue);
    default: return launch<1>(problem, queue);
  }
}

}  // namespace xclip_fast
