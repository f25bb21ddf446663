// Runs the CPU kernels on buffers of exactly their size, for the sanitizers; prints the largest error against doubles.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "patch_embed_cpu.h"

using xclip_fast::Element;

namespace {

double uniform() { return std::rand() / (RAND_MAX + 1.0) - 0.5; }

// Frames (count, height, width) whose last pixel is the last byte of the buffer; planar or channels last.
double worst(int64_t count, int64_t height, int64_t width, int64_t patch, int64_t size, int64_t pieces, bool planar) {
  const int64_t row = 3 * patch * patch, patches = height / patch * (width / patch), tokens = 1 + patches;
  std::vector<uint8_t> pixels(count * height * width * 3);
  for (auto& pixel : pixels) pixel = static_cast<uint8_t>(std::rand());
  const xclip_fast::Frames frames{pixels.data(),      Element::kUInt8,        height, width, height * width * 3,
                                  planar ? width : 3 * width, planar ? 1 : 3, planar ? height * width : 1};
  const double factors[] = {0.02, 0.015, 0.01, -1.5, -2.0, 0.3};
  std::vector<float> weight(size * row), embedding(size), positions(tokens * size), scale(size, 1.5f), shift(size, 0.5f);
  for (auto* values : {&weight, &embedding, &positions}) {
    for (auto& value : *values) value = static_cast<float>(uniform());
  }
  std::vector<int8_t> rows(count * patches * row), packed(pieces * size * row);
  std::vector<float> unit(size), bias(size), out(count * tokens * size, NAN), before(count * tokens * size, NAN);
  std::vector<float> float_rows(rows.size(), NAN);
  xclip_fast::patch_rows(frames, patch, factors, Element::kInt8, rows.data(), 0, count * (height / patch));
  xclip_fast::patch_rows(frames, patch, factors, Element::kFloat32, float_rows.data(), 0, count * (height / patch));
  xclip_fast::pack_weights(weight.data(), Element::kFloat32, size, patch, factors, pieces, packed.data(), unit.data(),
                           bias.data(), 0, size);
  std::vector<int32_t> product(count * patches * pieces * size);
  for (int64_t m = 0; m < count * patches; ++m) {
    for (int64_t n = 0; n < pieces * size; ++n) {
      int32_t sum = 0;
      for (int64_t k = 0; k < row; ++k) sum += rows[m * row + k] * packed[n * row + k];
      product[m * pieces * size + n] = sum;
    }
  }
  xclip_fast::write_tokens({product.data(), Element::kInt32, pieces, unit.data(), bias.data(), embedding.data(),
                            positions.data(), scale.data(), shift.data(), 1e-5, patches, size, out.data(),
                            Element::kFloat32, before.data(), Element::kFloat32},
                           0, count * tokens);
  double error = 0.0;
  for (int64_t token = 0; token < count * tokens; ++token) {
    const int64_t place = token % tokens, patch_row = token / tokens * patches + place - 1;
    for (int64_t d = 0; d < size; ++d) {
      double sum = place == 0 ? embedding[d] : 0.0;
      for (int64_t k = 0; place > 0 && k < row; ++k) {
        sum += static_cast<double>(weight[d * row + k]) * float_rows[patch_row * row + k];
      }
      error = std::fmax(error, std::fabs(sum + positions[place * size + d] - before[token * size + d]));
      if (!std::isfinite(out[token * size + d])) return INFINITY;
    }
  }
  return error;
}

}  // namespace

int main() {
  for (const int64_t patch : {1, 3, 14, 16, 32}) {
    for (const bool planar : {false, true}) {
      std::printf("%g\n", worst(2, 2 * patch, 3 * patch, patch, 19, 3, planar));
      std::printf("%g\n", worst(1, patch, patch, patch, 1, 3, planar));
    }
  }
}
