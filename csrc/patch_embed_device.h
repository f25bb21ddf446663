// What the patch embedding asks of a GPU beyond plain C++: asynchronous copies, matrix fragments, pairs of 16-bit
// floats. The emulator on the host (tests/csrc/simt.h) has the same functions: it runs patch_embed_kernel.h as it is.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "patch_embed_cuda.h"

namespace xclip_fast {

// the dynamic shared memory of a block
__device__ __forceinline__ uint8_t* block_memory() {
  extern __shared__ __align__(16) uint8_t memory[];
  return memory;
}

__device__ __forceinline__ uint32_t load_shared(const uint8_t* word) {
  return *reinterpret_cast<const uint32_t*>(word);
}

__device__ __forceinline__ void store_shared(uint8_t* word, uint32_t value) {
  *reinterpret_cast<uint32_t*>(word) = value;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// starts a copy to shared memory; with `bytes`, only so many are read and the others become zero
__device__ __forceinline__ void copy_16_bytes(uint8_t* destination, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared_address(destination)), "l"(source)
               : "memory");
}

__device__ __forceinline__ void copy_16_bytes(uint8_t* destination, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(destination)), "l"(source),
               "r"(bytes)
               : "memory");
}

// ends a group of copies
__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// waits until only the newest kInFlight groups of this thread are under way
template <int kInFlight>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kInFlight) : "memory");
}

// four 8 x 8 matrices of float16: lanes 8i..8i+7 name the rows of matrix i
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], const uint8_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums (16 x 8, float32) += a (16 x 16, float16) times b (16 x 8, float16), spread over a warp
__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// two float16, each less `value`
__device__ __forceinline__ uint32_t pair_less(uint32_t pair, float value) {
  const __half2 less = __hsub2(reinterpret_cast<const __half2&>(pair), __float2half2_rn(value));
  return reinterpret_cast<const uint32_t&>(less);
}

// two float16 or bfloat16, rounded to nearest
__device__ __forceinline__ uint32_t rounded_pair(TokenType type, float first, float second) {
  if (type == TokenType::kFloat16) {
    const __half2 pair = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}

}  // namespace xclip_fast
