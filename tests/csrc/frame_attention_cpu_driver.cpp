// Runs the attention on buffers of exactly their size, for the sanitizers; prints relative errors against doubles.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "frame_attention_cpu.h"

using xclip_fast::kHeadDim;

namespace {

double wide(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t uniform() {
  const float value = static_cast<float>(std::rand() / (RAND_MAX + 1.0) - 0.4);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

// Rows lie `gap` numbers apart, and behind the last one nothing.
double largest_error(int64_t frames, int64_t tokens, int64_t heads, int64_t queries, int64_t gap) {
  const int64_t width = heads * kHeadDim, keys = tokens + 1, stride = 3 * width + gap;
  std::vector<uint16_t> rows(frames * tokens * stride - gap), messages(frames * (2 * width + gap) - gap);
  std::vector<uint16_t> mixed(frames * queries * width);
  std::vector<float> lse(frames * heads * queries);
  for (auto* numbers : {&rows, &messages}) std::generate(numbers->begin(), numbers->end(), uniform);
  const xclip_fast::FrameAttention work{rows.data(),     tokens * stride, stride, messages.data(), 2 * width + gap, tokens,
                                        heads,           queries,         0.5f,   mixed.data(),
                                        gap ? nullptr : lse.data()};
  // the work of two threads
  const int64_t half = frames * heads / 2;
  xclip_fast::frame_attention(work, 0, half);
  xclip_fast::frame_attention(work, half, frames * heads);
  double error = 0.0, size = 0.0;
  for (int64_t frame = 0; frame < frames; ++frame) {
    for (int64_t head = 0; head < heads; ++head) {
      const auto row = [&](int64_t key, int64_t part) {
        if (key == tokens) return messages.data() + frame * work.message_stride + (part - 1) * width + head * kHeadDim;
        return rows.data() + (frame * tokens + key) * stride + part * width + head * kHeadDim;
      };
      for (int64_t query = 0; query < queries; ++query) {
        std::vector<double> weights(keys);
        double sum = 0.0;
        for (int64_t key = 0; key < keys; ++key) {
          double score = 0.0;
          for (int64_t d = 0; d < kHeadDim; ++d) score += wide(row(query, 0)[d]) * wide(row(key, 1)[d]);
          sum += weights[key] = std::exp(score * work.scale);
        }
        const double exponent = work.lse ? lse[(frame * heads + head) * queries + query] : std::log2(sum);
        if (!(std::fabs(exponent - std::log2(sum)) < 1e-4)) return INFINITY;
        for (int64_t d = 0; d < kHeadDim; ++d) {
          double truth = 0.0;
          for (int64_t key = 0; key < keys; ++key) truth += weights[key] / sum * wide(row(key, 2)[d]);
          const double found = wide(mixed[(frame * queries + query) * width + head * kHeadDim + d]);
          error += (found - truth) * (found - truth);
          size += truth * truth;
        }
      }
    }
  }
  return std::sqrt(error / size);
}

}  // namespace

int main() {
  if (!xclip_fast::frame_attention_runs()) return std::puts("not on this processor"), 0;
  for (const int64_t tokens : {1, 5, 6, 15, 16, 17, 49, 62, 63, 64, 128, 197}) {
    std::printf("%g\n", largest_error(2, tokens, 3, tokens, 0));
    std::printf("%g\n", largest_error(3, tokens, 1, 1, 5));
  }
}
