// Patch embedding on the CPU, all but its GEMM. Torch-free; each function does the part [begin, end) of its work.
#pragma once

#include <cstdint>

namespace xclip_fast {

enum class Element : int32_t { kUInt8, kInt8, kInt32, kFloat16, kBFloat16, kFloat32, kFloat64 };

// Frames (frames, height, width, 3) of any strides, counted in elements.
struct Frames {
  const void* data;
  Element type;
  int64_t height;
  int64_t width;
  int64_t frame_stride;
  int64_t row_stride;
  int64_t column_stride;
  int64_t channel_stride;
};

// Patches as rows of 3 * patch * patch numbers: channel, row, column. Bytes become byte - 128 as int8, or byte * factors[c]
// + factors[3 + c] as floating point; other frames are converted. A unit of work is one row of patches of one frame.
void patch_rows(const Frames& frames, int64_t patch, const double* factors, Element type, void* rows, int64_t begin,
                int64_t end);

// Weights (width, 3 * patch * patch) for a GEMM with int8 rows, as `pieces` int8 matrices one below the other, the
// highest first. A weight times its factor is unit * sum of piece * 256^place, and bias is what byte - 128 and the second
// factors leave out. A unit of work is one row.
void pack_weights(const void* weight, Element type, int64_t width, int64_t patch, const double* factors, int64_t pieces,
                  int8_t* packed, float* unit, float* bias, int64_t begin, int64_t end);

// What follows the GEMM: tokens = norm(product * unit + bias + positions), the class token first in each frame.
struct Tokens {
  const void* product;  // (frames * patches, pieces * width), int32 for packed weights, else floating point
  Element product_type;
  int64_t pieces;
  const float* unit;  // (width) of packed weights, else null
  const float* bias;  // (width) of packed weights, else null
  const void* class_embedding;  // (width), and the three below, double beside a double GEMM, else float
  const void* positions;        // (1 + patches, width)
  const void* norm_weight;      // (width), or null for no norm
  const void* norm_bias;        // (width), or null for no norm
  double eps;
  int64_t patches;
  int64_t width;
  void* tokens;  // (frames, 1 + patches, width)
  Element tokens_type;
  void* embedded;  // the same before the norm, or null
  Element embedded_type;
};

// A unit of work is one token.
void write_tokens(const Tokens& work, int64_t begin, int64_t end);

}  // namespace xclip_fast
