#include "patch_embed_cpu.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace xclip_fast {
namespace {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// the largest integers that 3 and 2 signed bytes hold with the lower ones balanced around zero, less a rounding
constexpr float kLargest3 = 8355000.0f;
constexpr float kLargest2 = 32600.0f;

template <class To, class From>
XCLIP_FAST_INLINE To convert(From value) {
  return static_cast<To>(value);
}

// as the class does it, but without a branch, so that loops of it become vector code
template <>
XCLIP_FAST_INLINE BFloat16 convert<BFloat16, float>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return BFloat16(static_cast<uint16_t>(value != value ? 0x7fc0u : rounded), BFloat16::from_bits());
}

template <class T>
struct Type {
  using type = T;
};

// Calls f with the C++ type of a floating point element.
template <class F>
XCLIP_FAST_INLINE void with_float(Element type, const F& f) {
  switch (type) {
    case Element::kFloat16: return f(Type<Half>());
    case Element::kBFloat16: return f(Type<BFloat16>());
    case Element::kFloat64: return f(Type<double>());
    default: return f(Type<float>());
  }
}

// Moves `patches` pieces of one pixel row of one channel to their places in the rows.
template <int64_t kPatch, class T>
XCLIP_FAST_INLINE void scatter(const T* line, int64_t patches, int64_t patch, T* rows) {
  const int64_t length = kPatch ? kPatch : patch;
  const int64_t stride = 3 * length * length;
  for (int64_t p = 0; p < patches; ++p) std::memcpy(rows + p * stride, line + p * length, length * sizeof(T));
}

template <class T>
XCLIP_FAST_INLINE void scatter_any(const T* line, int64_t patches, int64_t patch, T* rows) {
  if (patch == 14) return scatter<14>(line, patches, patch, rows);
  if (patch == 16) return scatter<16>(line, patches, patch, rows);
  if (patch == 32) return scatter<32>(line, patches, patch, rows);
  scatter<0>(line, patches, patch, rows);
}

// One channel of one pixel row; the common strides are written out so that they become vector code.
template <class From, class To, class F>
XCLIP_FAST_INLINE void read_line(const From* pixels, int64_t stride, int64_t width, To* line, const F& f) {
  if (stride == 3) {
    for (int64_t x = 0; x < width; ++x) line[x] = f(pixels[3 * x]);
  } else if (stride == 1) {
    for (int64_t x = 0; x < width; ++x) line[x] = f(pixels[x]);
  } else {
    for (int64_t x = 0; x < width; ++x) line[x] = f(pixels[stride * x]);
  }
}

// `make(channel)` returns the function of one pixel.
template <class From, class To, class Make>
XCLIP_FAST_INLINE void rows_of(const Frames& frames, int64_t patch, To* rows, int64_t begin, int64_t end,
                               const Make& make) {
  const int64_t bands = frames.height / patch, patches = frames.width / patch;
  std::vector<To> line(frames.width);
  for (int64_t band = begin; band < end; ++band) {
    const From* frame = static_cast<const From*>(frames.data) + band / bands * frames.frame_stride;
    To* first = rows + band * patches * 3 * patch * patch;
    for (int64_t y = 0; y < patch; ++y) {
      const From* row = frame + (band % bands * patch + y) * frames.row_stride;
      for (int64_t c = 0; c < 3; ++c) {
        read_line(row + c * frames.channel_stride, frames.column_stride, frames.width, line.data(), make(c));
        scatter_any(line.data(), patches, patch, first + (c * patch + y) * patch);
      }
    }
  }
}

template <class From, class To>
XCLIP_FAST_INLINE void converted_rows(const Frames& frames, int64_t patch, const double* factors, To* rows,
                                      int64_t begin, int64_t end) {
  using Sum = std::conditional_t<std::is_same_v<To, double>, double, float>;
  rows_of<From>(frames, patch, rows, begin, end, [factors](int64_t c) {
    const Sum scale = std::is_same_v<From, uint8_t> ? static_cast<Sum>(factors[c]) : Sum(1);
    const Sum offset = std::is_same_v<From, uint8_t> ? static_cast<Sum>(factors[3 + c]) : Sum(0);
    return [scale, offset](From pixel) {
      if constexpr (std::is_same_v<From, uint8_t>) {
        return convert<To>(static_cast<Sum>(static_cast<int>(pixel)) * scale + offset);
      } else {
        return convert<To>(static_cast<Sum>(pixel));
      }
    };
  });
}

XCLIP_FAST_VECTORS void int8_rows(const Frames& frames, int64_t patch, int8_t* rows, int64_t begin, int64_t end) {
  rows_of<uint8_t>(frames, patch, rows, begin, end, [](int64_t) {
    return [](uint8_t pixel) { return static_cast<int8_t>(pixel ^ 0x80); };
  });
}

XCLIP_FAST_VECTORS void float_rows(const Frames& frames, int64_t patch, const double* factors, Element type, void* rows,
                                   int64_t begin, int64_t end) {
  with_float(type, [&](auto to) {
    using To = typename decltype(to)::type;
    if (frames.type == Element::kUInt8) {
      converted_rows<uint8_t>(frames, patch, factors, static_cast<To*>(rows), begin, end);
    } else {
      with_float(frames.type, [&](auto from) {
        using From = typename decltype(from)::type;
        converted_rows<From>(frames, patch, factors, static_cast<To*>(rows), begin, end);
      });
    }
  });
}

// The largest magnitude of a row, or NaN if it holds anything that is not finite.
XCLIP_FAST_INLINE float largest(const float* row, int64_t count) {
  float most = 0.0f, spoilt = 0.0f;
#pragma omp simd reduction(max : most) reduction(+ : spoilt)
  for (int64_t i = 0; i < count; ++i) {
    const float size = std::fabs(row[i]);
    most = size > most ? size : most;
    spoilt += row[i] - row[i];
  }
  return spoilt == 0.0f ? most : std::numeric_limits<float>::quiet_NaN();
}

template <int kPieces>
XCLIP_FAST_INLINE void split(const float* row, int64_t count, float inverse, int8_t* packed, int64_t stride) {
  constexpr float kLargest = kPieces == 3 ? kLargest3 : kLargest2;
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = row[i] * inverse * kLargest;
    int32_t rest = static_cast<int32_t>(scaled + (scaled < 0.0f ? -0.5f : 0.5f));
    for (int piece = kPieces - 1; piece > 0; --piece) {
      const int32_t low = ((rest + 128) & 255) - 128;
      packed[piece * stride + i] = static_cast<int8_t>(low);
      rest = (rest - low) >> 8;
    }
    packed[i] = static_cast<int8_t>(rest);
  }
}

template <class From>
XCLIP_FAST_INLINE double scaled_row(const From* weight, int64_t count, double scale, double offset, float* row) {
  const float factor = static_cast<float>(scale);
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(weight[i]);
    row[i] = value * factor;
    sum += value;
  }
  return sum * (128.0 * scale + offset);
}

template <class Product, class Sum>
XCLIP_FAST_INLINE void add(const Product* product, const Sum* position, int64_t width, Sum* row) {
  for (int64_t d = 0; d < width; ++d) row[d] = static_cast<Sum>(product[d]) + position[d];
}

template <int kPieces>
XCLIP_FAST_INLINE void add_pieces(const Tokens& work, const int32_t* product, const float* position, float* row) {
  const int64_t width = work.width;
  for (int64_t d = 0; d < width; ++d) {
    float sum = static_cast<float>(product[d]);
    for (int piece = 1; piece < kPieces; ++piece) {
      sum = sum * 256.0f + static_cast<float>(product[piece * width + d]);
    }
    row[d] = sum * work.unit[d] + (work.bias[d] + position[d]);
  }
}

template <class Sum>
XCLIP_FAST_INLINE void norm(const Tokens& work, Sum* row) {
  const Sum* weight = static_cast<const Sum*>(work.norm_weight);
  const Sum* bias = static_cast<const Sum*>(work.norm_bias);
  const int64_t width = work.width;
  Sum sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) sum += row[d];
  const Sum mean = sum / static_cast<Sum>(width);
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < width; ++d) squares += (row[d] - mean) * (row[d] - mean);
  const Sum rstd = 1 / std::sqrt(squares / static_cast<Sum>(width) + static_cast<Sum>(work.eps));
  for (int64_t d = 0; d < width; ++d) row[d] = (row[d] - mean) * rstd * weight[d] + bias[d];
}

template <class Sum>
XCLIP_FAST_INLINE void store(const Sum* row, int64_t width, Element type, void* out, int64_t index) {
  with_float(type, [&](auto to) {
    using To = typename decltype(to)::type;
    To* target = static_cast<To*>(out) + index * width;
    for (int64_t d = 0; d < width; ++d) target[d] = convert<To>(row[d]);
  });
}

template <class Sum>
XCLIP_FAST_INLINE void tokens_of(const Tokens& work, int64_t begin, int64_t end) {
  const int64_t width = work.width, count = 1 + work.patches;
  std::vector<Sum> row(width);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t place = token % count;
    const Sum* position = static_cast<const Sum*>(work.positions) + place * width;
    const int64_t start = (token / count * work.patches + place - 1) * width * work.pieces;
    if (place == 0) {
      add(static_cast<const Sum*>(work.class_embedding), position, width, row.data());
    } else if (work.product_type != Element::kInt32) {
      with_float(work.product_type, [&](auto from) {
        using From = typename decltype(from)::type;
        add(static_cast<const From*>(work.product) + start, position, width, row.data());
      });
    } else if constexpr (std::is_same_v<Sum, float>) {
      const int32_t* product = static_cast<const int32_t*>(work.product) + start;
      if (work.pieces == 3) {
        add_pieces<3>(work, product, position, row.data());
      } else {
        add_pieces<2>(work, product, position, row.data());
      }
    }
    if (work.embedded) store(row.data(), width, work.embedded_type, work.embedded, token);
    if (work.norm_weight) norm(work, row.data());
    store(row.data(), width, work.tokens_type, work.tokens, token);
  }
}

XCLIP_FAST_VECTORS void float_tokens(const Tokens& work, int64_t begin, int64_t end) {
  tokens_of<float>(work, begin, end);
}

}  // namespace

void patch_rows(const Frames& frames, int64_t patch, const double* factors, Element type, void* rows, int64_t begin,
                int64_t end) {
  if (type == Element::kInt8) return int8_rows(frames, patch, static_cast<int8_t*>(rows), begin, end);
  float_rows(frames, patch, factors, type, rows, begin, end);
}

XCLIP_FAST_VECTORS void pack_weights(const void* weight, Element type, int64_t width, int64_t patch,
                                     const double* factors, int64_t pieces, int8_t* packed, float* unit, float* bias,
                                     int64_t begin, int64_t end) {
  const int64_t pixels = patch * patch, count = 3 * pixels;
  std::vector<float> row(count);
  for (int64_t d = begin; d < end; ++d) {
    double sum = 0.0;
    for (int64_t c = 0; c < 3; ++c) {
      with_float(type, [&](auto from) {
        const auto* source = static_cast<const typename decltype(from)::type*>(weight) + d * count + c * pixels;
        sum += scaled_row(source, pixels, factors[c], factors[3 + c], row.data() + c * pixels);
      });
    }
    const float most = largest(row.data(), count);
    unit[d] = most / (pieces == 3 ? kLargest3 : kLargest2);
    bias[d] = static_cast<float>(sum);
    const float inverse = 1.0f / most;
    if (!std::isfinite(inverse)) {
      // zeros, numbers too small for a reciprocal, or a NaN that the unit carries on
      for (int64_t piece = 0; piece < pieces; ++piece) std::memset(packed + (piece * width + d) * count, 0, count);
    } else if (pieces == 3) {
      split<3>(row.data(), count, inverse, packed + d * count, width * count);
    } else {
      split<2>(row.data(), count, inverse, packed + d * count, width * count);
    }
  }
}

void write_tokens(const Tokens& work, int64_t begin, int64_t end) {
  if (work.product_type == Element::kFloat64) return tokens_of<double>(work, begin, end);
  float_tokens(work, begin, end);
}

}  // namespace xclip_fast
