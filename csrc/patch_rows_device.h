// What the gathering of patches asks of a GPU beyond plain C++. The emulator on the host (tests/csrc/simt.h) has the same
// function: it runs patch_rows_kernel.h as it is.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace xclip_fast {

// two float16, each less `value`
__device__ __forceinline__ uint32_t pair_less(uint32_t pair, float value) {
  const __half2 less = __hsub2(reinterpret_cast<const __half2&>(pair), __float2half2_rn(value));
  return reinterpret_cast<const uint32_t&>(less);
}

}  // namespace xclip_fast
