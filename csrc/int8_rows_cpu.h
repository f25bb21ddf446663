// Rows of an int8 GEMM, quantised on the CPU. Torch-free; each function does the part [begin, end) of its work.
#pragma once

#include <cstdint>

namespace xclip_fast {

struct Range {
  float low;
  float high;
};

// bfloat16 or float32 numbers.
struct Numbers {
  const void* data;
  bool narrow;  // bfloat16
};

// The smallest and the largest number, or NaN for both where one is not finite. A unit of work is one number.
Range range_of(const Numbers& numbers, int64_t begin, int64_t end);

// bytes = round(number * inverse + zero), which must fit. A unit of work is one number.
void to_bytes(const Numbers& numbers, float inverse, float zero, uint8_t* bytes, int64_t begin, int64_t end);

}  // namespace xclip_fast
