#include "int8_rows_cpu.h"

#include <cstring>
#include <limits>

#include "vectors.h"

namespace xclip_fast {
namespace {

XCLIP_FAST_INLINE float number(float value) { return value; }

XCLIP_FAST_INLINE float number(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
XCLIP_FAST_INLINE Range range(const T* numbers, int64_t begin, int64_t end) {
  float low = number(numbers[begin]), high = low, spoilt = 0.0f;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : spoilt)
  for (int64_t i = begin; i < end; ++i) {
    const float value = number(numbers[i]);
    low = value < low ? value : low;
    high = value > high ? value : high;
    spoilt += value - value;
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  return spoilt == 0.0f ? Range{low, high} : Range{nan, nan};
}

template <class T>
XCLIP_FAST_INLINE void quantise(const T* numbers, float inverse, float zero, uint8_t* bytes, int64_t begin,
                                int64_t end) {
  // what is cut off is the half
  const float offset = zero + 0.5f;
  for (int64_t i = begin; i < end; ++i) {
    bytes[i] = static_cast<uint8_t>(static_cast<int32_t>(number(numbers[i]) * inverse + offset));
  }
}

}  // namespace

XCLIP_FAST_VECTORS Range range_of(const Numbers& numbers, int64_t begin, int64_t end) {
  if (numbers.narrow) return range(static_cast<const uint16_t*>(numbers.data), begin, end);
  return range(static_cast<const float*>(numbers.data), begin, end);
}

XCLIP_FAST_VECTORS void to_bytes(const Numbers& numbers, float inverse, float zero, uint8_t* bytes, int64_t begin,
                                 int64_t end) {
  if (numbers.narrow) return quantise(static_cast<const uint16_t*>(numbers.data), inverse, zero, bytes, begin, end);
  quantise(static_cast<const float*>(numbers.data), inverse, zero, bytes, begin, end);
}

}  // namespace xclip_fast
