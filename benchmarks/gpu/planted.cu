// faults that the sanitizers must find, or their silence about the kernels means nothing
#include <cstdio>
#include <cstring>
#include <cuda_runtime.h>

__global__ void planted_fwd_kernel(int* out, bool race) {
  __shared__ int shared[64];
  if (race) {
    // each thread reads what another warp may not have written yet
    shared[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = shared[63 - threadIdx.x];
  } else {
    out[threadIdx.x + (1 << 24)] = 1;
  }
}

int main(int count, char** arguments) {
  int* out = nullptr;
  if (cudaMalloc(&out, 64 * sizeof(int)) != cudaSuccess) return 1;
  planted_fwd_kernel<<<1, 64>>>(out, count > 1 && std::strcmp(arguments[1], "racecheck") == 0);
  std::puts(cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
