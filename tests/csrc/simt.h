// What patch_rows_kernel.h needs of a GPU, on the host: the words of CUDA, the index of a thread, and the function that
// patch_rows_device.h has for a GPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

struct Place {
  unsigned x;
};
inline Place threadIdx, blockIdx;

namespace simt {

inline std::string running;  // what a broken rule is reported of

inline void require(bool holds, const char* rule) {
  if (holds) return;
  std::printf("%s: broken rule: %s\n", running.c_str(), rule);
  std::exit(1);
}

// float16 of a value that is not too large for it, rounded to nearest
inline uint16_t to_half(double value) {
  const double magnitude = std::fabs(value);
  const int exponent = magnitude == 0 ? -14 : std::max(std::ilogb(magnitude), -14);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // 1024..2048 when normal
  return static_cast<uint16_t>((std::signbit(value) ? 0x8000 : 0) | (((exponent + 14) << 10) + steps));
}

inline const std::vector<float> kHalves = [] {
  std::vector<float> values(65536);
  for (int i = 0; i < 65536; ++i) {
    const int exponent = i >> 10 & 31, fraction = i & 1023;
    const double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    values[i] = static_cast<float>(exponent == 31 ? NAN : i & 0x8000 ? -magnitude : magnitude);
  }
  return values;
}();

inline float from_half(uint32_t bits) { return kHalves[bits & 0xffff]; }

}  // namespace simt

// byte i of the result is the byte of high:low that nibble i of the selector names
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(both >> (selector >> (4 * i) & 7) * 8 & 255) << (8 * i);
  return result;
}

namespace xclip_fast {

inline uint32_t pair_less(uint32_t pair, float value) {
  const uint32_t high = simt::to_half(simt::from_half(pair >> 16) - value);
  return high << 16 | simt::to_half(simt::from_half(pair) - value);
}

}  // namespace xclip_fast
