// rows * weight^T + bias on the CPU, in float32 from weights in float32, bfloat16 or float16, packed once. Torch-free.
#pragma once

#include <cstdint>

#include "patch_embed_cpu.h"

namespace xclip_fast {

constexpr int64_t kPanelColumns = 16;

// Numbers of packed weights (columns, inner): panels of kPanelColumns columns, the last one filled up with zeros.
constexpr int64_t packed_size(int64_t columns, int64_t inner) {
  return (columns + kPanelColumns - 1) / kPanelColumns * kPanelColumns * inner;
}

// (columns, inner) in panels (inner, kPanelColumns) in the same dtype. A unit of work is one panel.
void pack_panels(const void* weight, Element type, int64_t columns, int64_t inner, void* panels, int64_t begin,
                 int64_t end);

struct Linear {
  const float* rows;  // (row_count, inner)
  int64_t row_count;
  int64_t inner;
  int64_t columns;
  const void* panels;
  Element type;       // of the panels
  const float* bias;  // (columns), or null
  bool add;           // the GEMM is added to the result
  bool silu;          // x * sigmoid(x) of the sum
  float* result;      // (row_count, columns)
};

// Whether this processor runs `linear`: it takes AVX2 with FMA and F16C.
bool linear_runs();

// Units of work: a block of rows by two panels. Neighbouring units share their block of rows.
int64_t linear_units(const Linear& work);

void linear(const Linear& work, int64_t begin, int64_t end);

}  // namespace xclip_fast
