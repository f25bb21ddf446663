// Runs the product on buffers of exactly their size, for the sanitizers; prints relative errors against doubles.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "linear_cpu.h"

using xclip_fast::Element;

namespace {

float uniform() { return static_cast<float>(std::rand() / (RAND_MAX + 1.0) - 0.4); }

uint16_t half_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

float wide(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

double largest_error(int64_t rows, int64_t inner, int64_t columns, bool narrow, bool add, bool silu) {
  std::vector<float> x(rows * inner), weight(columns * inner), bias(columns), result(rows * columns);
  for (auto* numbers : {&x, &weight, &bias, &result}) std::generate(numbers->begin(), numbers->end(), uniform);
  const std::vector<float> stream = result;
  const int64_t count = (columns + xclip_fast::kPanelColumns - 1) / xclip_fast::kPanelColumns;
  const int64_t size = xclip_fast::packed_size(columns, inner);
  std::vector<float> panels(narrow ? 0 : size);
  std::vector<uint16_t> halves(narrow ? size : 0), weight_halves(weight.size());
  void* packed = panels.data();
  const void* source = weight.data();
  if (narrow) {
    std::transform(weight.begin(), weight.end(), weight_halves.begin(), half_of);
    std::transform(weight_halves.begin(), weight_halves.end(), weight.begin(), wide);
    packed = halves.data();
    source = weight_halves.data();
  }
  const Element type = narrow ? Element::kBFloat16 : Element::kFloat32;
  xclip_fast::pack_panels(source, type, columns, inner, packed, 0, count / 2);
  xclip_fast::pack_panels(source, type, columns, inner, packed, count / 2, count);
  const xclip_fast::Linear work{x.data(), rows, inner,  columns, packed, type, add ? nullptr : bias.data(),
                                add,      silu, result.data()};
  // the work of two threads
  const int64_t units = xclip_fast::linear_units(work), half = units / 2;
  xclip_fast::linear(work, 0, half);
  xclip_fast::linear(work, half, units);
  double error = 0.0, scale = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      double truth = add ? stream[r * columns + c] : bias[c];
      for (int64_t k = 0; k < inner; ++k) truth += static_cast<double>(x[r * inner + k]) * weight[c * inner + k];
      if (silu) truth /= 1.0 + std::exp(-truth);
      const double difference = result[r * columns + c] - truth;
      error += difference * difference;
      scale += truth * truth;
    }
  }
  return std::sqrt(error / scale);
}

}  // namespace

int main() {
  if (!xclip_fast::linear_runs()) return std::puts("not on this processor"), 0;
  for (const int64_t rows : {1, 7, 12, 205}) {
    for (const int64_t columns : {1, 16, 33, 80}) {
      for (const int64_t inner : {5, 256, 300}) {
        std::printf("%g\n", largest_error(rows, inner, columns, inner == 300, columns == 33, inner != 5));
      }
    }
  }
}
