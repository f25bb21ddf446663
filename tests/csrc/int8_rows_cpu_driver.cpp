// Turns numbers in buffers of exactly their size into bytes, for the sanitizers; prints the largest error in steps.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "int8_rows_cpu.h"

namespace {

double largest_error(int64_t count, bool narrow, float low, float high) {
  std::vector<float> values(count);
  std::vector<uint16_t> halves(narrow ? count : 0);
  for (int64_t i = 0; i < count; ++i) {
    values[i] = low + (high - low) * static_cast<float>(std::rand() / (RAND_MAX + 1.0));
    if (!narrow) continue;
    uint32_t bits;
    std::memcpy(&bits, &values[i], sizeof bits);
    halves[i] = static_cast<uint16_t>(bits >> 16);
    bits &= 0xffff0000u;
    std::memcpy(&values[i], &bits, sizeof bits);
  }
  const xclip_fast::Numbers numbers{narrow ? static_cast<const void*>(halves.data()) : values.data(), narrow};
  const xclip_fast::Range range = xclip_fast::range_of(numbers, 0, count);
  for (const float value : values) {
    if (value < range.low || value > range.high) return INFINITY;
  }
  std::vector<uint8_t> bytes(count);
  const float scale = (high - low) / 253.0f, zero = std::round(-low / scale) + 1.0f;
  xclip_fast::to_bytes(numbers, 1.0f / scale, zero, bytes.data(), 0, count / 2);
  xclip_fast::to_bytes(numbers, 1.0f / scale, zero, bytes.data(), count / 2, count);
  double error = 0.0;
  for (int64_t i = 0; i < count; ++i) error = std::fmax(error, std::fabs(values[i] / scale - (bytes[i] - zero)));
  return error;
}

}  // namespace

int main() {
  for (const int64_t count : {1, 15, 64, 97, 4099}) {
    std::printf("%g\n", largest_error(count, true, -1.0f, 2.0f));
    std::printf("%g\n", largest_error(count, false, -100.0f, 0.0f));
  }
}
