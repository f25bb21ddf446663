// The operators of the extension, on torch's stable C++ ABI. Arguments are checked in Python, before anything is called.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "frame_attention_cpu.h"
#include "int8_rows_cpu.h"
#include "linear_cpu.h"
#include "patch_embed_cpu.h"

#ifdef XCLIP_FAST_CUDA
#include "patch_rows_cuda.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using xclip_fast::Element;

Element element(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return Element::kUInt8;
    case ScalarType::Char: return Element::kInt8;
    case ScalarType::Int: return Element::kInt32;
    case ScalarType::Half: return Element::kFloat16;
    case ScalarType::BFloat16: return Element::kBFloat16;
    case ScalarType::Float: return Element::kFloat32;
    case ScalarType::Double: return Element::kFloat64;
    default: STD_TORCH_CHECK(false, "patch_embed takes bytes, float16, bfloat16, float32 and float64");
  }
}

const void* data(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

Tensor patch_rows(const Tensor& frames, int64_t patch, const Tensor& factors, ScalarType dtype) {
  const int64_t height = frames.size(1), width = frames.size(2);
  const int64_t bands = frames.size(0) * (height / patch);
  const xclip_fast::Frames view{frames.const_data_ptr(), element(frames.scalar_type()), height,          width,
                                frames.stride(0),        frames.stride(1),              frames.stride(2), frames.stride(3)};
  Tensor rows = torch::stable::new_empty(frames, {bands * (width / patch), 3 * patch * patch}, dtype);
  const double* scale = static_cast<const double*>(factors.const_data_ptr());
  void* out = rows.mutable_data_ptr();
  torch::stable::parallel_for(0, bands, 1, [&](int64_t begin, int64_t end) {
    xclip_fast::patch_rows(view, patch, scale, element(dtype), out, begin, end);
  });
  return rows;
}

std::tuple<Tensor, Tensor, Tensor> pack_weights(const Tensor& weight, const Tensor& factors, int64_t pieces) {
  const int64_t width = weight.size(0), patch = weight.size(3);
  Tensor packed = torch::stable::new_empty(weight, {pieces * width, 3 * patch * patch}, ScalarType::Char);
  Tensor unit = torch::stable::new_empty(weight, {width}, ScalarType::Float);
  Tensor bias = torch::stable::new_empty(weight, {width}, ScalarType::Float);
  const void* source = weight.const_data_ptr();
  const double* scale = static_cast<const double*>(factors.const_data_ptr());
  auto* bytes = static_cast<int8_t*>(packed.mutable_data_ptr());
  auto* units = static_cast<float*>(unit.mutable_data_ptr());
  auto* biases = static_cast<float*>(bias.mutable_data_ptr());
  torch::stable::parallel_for(0, width, 16, [&](int64_t begin, int64_t end) {
    xclip_fast::pack_weights(source, element(weight.scalar_type()), width, patch, scale, pieces, bytes, units, biases,
                             begin, end);
  });
  return {packed, unit, bias};
}

void patch_tokens(const Tensor& product, const std::optional<Tensor>& unit, const std::optional<Tensor>& bias,
                  const Tensor& class_embedding, const Tensor& positions, const std::optional<Tensor>& norm_weight,
                  const std::optional<Tensor>& norm_bias, double eps, Tensor tokens, std::optional<Tensor> embedded) {
  const int64_t count = positions.size(0), width = positions.size(1);
  const xclip_fast::Tokens work{
      .product = product.const_data_ptr(),
      .product_type = element(product.scalar_type()),
      .pieces = product.size(1) / width,
      .unit = static_cast<const float*>(data(unit)),
      .bias = static_cast<const float*>(data(bias)),
      .class_embedding = class_embedding.const_data_ptr(),
      .positions = positions.const_data_ptr(),
      .norm_weight = data(norm_weight),
      .norm_bias = data(norm_bias),
      .eps = eps,
      .patches = count - 1,
      .width = width,
      .tokens = tokens.mutable_data_ptr(),
      .tokens_type = element(tokens.scalar_type()),
      .embedded = embedded ? embedded->mutable_data_ptr() : nullptr,
      .embedded_type = element((embedded ? *embedded : tokens).scalar_type()),
  };
  torch::stable::parallel_for(0, tokens.size(0) * count, 16, [&](int64_t begin, int64_t end) {
    xclip_fast::write_tokens(work, begin, end);
  });
}

// Rows of tokens (frames, tokens, 3 D) and messages (frames, 2 D), each without gaps, the rows any distance apart.
std::tuple<Tensor, Tensor> frame_attention(const Tensor& tokens, const Tensor& messages, int64_t heads, int64_t queries,
                                           double scale, bool with_lse) {
  const int64_t frames = tokens.size(0);
  Tensor mixed = torch::stable::new_empty(tokens, {frames, queries, heads * xclip_fast::kHeadDim});
  Tensor lse = with_lse ? torch::stable::new_empty(tokens, {frames, heads, queries}, ScalarType::Float)
                        : torch::stable::new_empty(tokens, {0}, ScalarType::Float);
  const xclip_fast::FrameAttention work{
      .tokens = static_cast<const uint16_t*>(tokens.const_data_ptr()),
      .frame_stride = tokens.stride(0),
      .token_stride = tokens.stride(1),
      .messages = static_cast<const uint16_t*>(messages.const_data_ptr()),
      .message_stride = messages.stride(0),
      .token_count = tokens.size(1),
      .heads = heads,
      .queries = queries,
      .scale = static_cast<float>(scale),
      .mixed = static_cast<uint16_t*>(mixed.mutable_data_ptr()),
      .lse = with_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr,
  };
  torch::stable::parallel_for(0, frames * heads, 1, [&](int64_t begin, int64_t end) {
    xclip_fast::frame_attention(work, begin, end);
  });
  return {mixed, lse};
}

// Weights (columns, inner) in panels, in their own dtype: flat, the last panel filled up with zeros.
Tensor pack_linear(const Tensor& weight) {
  const int64_t columns = weight.size(0), inner = weight.size(1);
  Tensor panels = torch::stable::new_empty(weight, {xclip_fast::packed_size(columns, inner)});
  const void* source = weight.const_data_ptr();
  void* packed = panels.mutable_data_ptr();
  const auto type = element(weight.scalar_type());
  const int64_t count = (columns + xclip_fast::kPanelColumns - 1) / xclip_fast::kPanelColumns;
  torch::stable::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
    xclip_fast::pack_panels(source, type, columns, inner, packed, begin, end);
  });
  return panels;
}

// float32 rows (M, inner) times packed weights: added to the stream (M, columns), or a new tensor without one.
Tensor linear(const Tensor& rows, const Tensor& panels, int64_t columns, const std::optional<Tensor>& bias,
              std::optional<Tensor> stream, bool silu) {
  Tensor result = stream ? *stream : torch::stable::new_empty(rows, {rows.size(0), columns});
  const xclip_fast::Linear work{
      .rows = static_cast<const float*>(rows.const_data_ptr()),
      .row_count = rows.size(0),
      .inner = rows.size(1),
      .columns = columns,
      .panels = panels.const_data_ptr(),
      .type = element(panels.scalar_type()),
      .bias = static_cast<const float*>(data(bias)),
      .add = stream.has_value(),
      .silu = silu,
      .result = static_cast<float*>(result.mutable_data_ptr()),
  };
  torch::stable::parallel_for(0, xclip_fast::linear_units(work), 1, [&](int64_t begin, int64_t end) {
    xclip_fast::linear(work, begin, end);
  });
  return result;
}

// Bytes with their scale and zero point: rows = scale * (bytes - zero). One number that is not finite spoils all of them.
// `steps` lie between the smallest number and the largest: 253 for whole bytes, 125 for bytes of seven bits.
std::tuple<Tensor, double, int64_t> int8_rows(const Tensor& rows, int64_t steps) {
  constexpr int64_t kBlock = 1 << 15;
  constexpr double kLeastRange = 1e-35;  // of numbers that are not taken for zeros: the inverse of their step is a float
  const int64_t count = rows.numel(), blocks = (count + kBlock - 1) / kBlock;
  const xclip_fast::Numbers numbers{rows.const_data_ptr(), rows.scalar_type() == ScalarType::BFloat16};
  std::vector<xclip_fast::Range> ranges(blocks);
  const auto blockwise = [&](const auto& work) {
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        work(block, block * kBlock, std::min(count, (block + 1) * kBlock));
      }
    });
  };
  blockwise([&](int64_t block, int64_t begin, int64_t end) {
    ranges[block] = xclip_fast::range_of(numbers, begin, end);
  });
  double low = 0.0, high = 0.0;
  bool finite = true;
  for (const auto& range : ranges) {
    finite = finite && std::isfinite(range.low);
    low = std::min<double>(low, range.low);
    high = std::max<double>(high, range.high);
  }
  Tensor bytes = torch::stable::new_empty(rows, {rows.size(0), rows.size(1)}, ScalarType::Byte);
  auto* out = static_cast<uint8_t*>(bytes.mutable_data_ptr());
  const double scale = high - low < kLeastRange ? 1.0 : (high - low) / static_cast<double>(steps);
  if (!finite) {
    std::fill(out, out + count, uint8_t{0});
    return {bytes, std::nan(""), 0};
  }
  const int64_t zero = std::llrint(-low / scale) + 1;
  blockwise([&](int64_t, int64_t begin, int64_t end) {
    xclip_fast::to_bytes(numbers, static_cast<float>(1.0 / scale), static_cast<float>(zero), out, begin, end);
  });
  return {bytes, scale, zero};
}

#ifdef XCLIP_FAST_CUDA
// The rows of float16 that patch_rows_cuda.h describes. The caller has made the device of the frames current; `stream` is
// a cudaStream_t of it.
Tensor patch_rows_cuda(const Tensor& frames, int64_t patch, int64_t stream) {
  const int64_t count = frames.size(0), height = frames.size(1), width = frames.size(2);
  const int64_t patches = count * (height / patch) * (width / patch);
  Tensor rows =
      torch::stable::new_empty(frames, {patches, xclip_fast::patch_row_columns(patch)}, ScalarType::Half);
  const xclip_fast::PatchRowsArguments arguments{
      .pixels = static_cast<const uint8_t*>(frames.const_data_ptr()),
      .frame_stride = frames.stride(0),
      .row_stride = frames.stride(1),
      .column_stride = frames.stride(2),
      .channel_stride = frames.stride(3),
      .frames = count,
      .height = height,
      .width = width,
      .patch = patch,
      .rows = rows.mutable_data_ptr(),
  };
  const char* refusal = xclip_fast::patch_rows_launch(arguments, reinterpret_cast<void*>(stream));
  STD_TORCH_CHECK(refusal == nullptr, refusal);
  return rows;
}
#endif

}  // namespace

extern "C" __attribute__((visibility("default"))) int xclip_fast_interface() { return 6; }

extern "C" __attribute__((visibility("default"))) const char* xclip_fast_architectures() {
  return XCLIP_FAST_ARCHITECTURES;
}

extern "C" __attribute__((visibility("default"))) bool xclip_fast_attends() {
  return xclip_fast::frame_attention_runs();
}

extern "C" __attribute__((visibility("default"))) bool xclip_fast_multiplies() { return xclip_fast::linear_runs(); }

STABLE_TORCH_LIBRARY(xclip_fast_native, m) {
  m.def("patch_rows(Tensor frames, int patch, Tensor factors, ScalarType dtype) -> Tensor");
  m.def("pack_weights(Tensor weight, Tensor factors, int pieces) -> (Tensor, Tensor, Tensor)");
  m.def(
      "patch_tokens(Tensor product, Tensor? unit, Tensor? bias, Tensor class_embedding, Tensor positions, "
      "Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor(a!) tokens, Tensor(b!)? embedded) -> ()");
  m.def(
      "frame_attention(Tensor tokens, Tensor messages, int heads, int queries, float scale, bool with_lse) -> "
      "(Tensor, Tensor)");
  m.def("pack_linear(Tensor weight) -> Tensor");
  m.def(
      "linear(Tensor rows, Tensor panels, int columns, Tensor? bias, Tensor(a!)? stream, bool silu) -> Tensor");
  m.def("int8_rows(Tensor rows, int steps) -> (Tensor, float, int)");
  m.def("patch_rows_cuda(Tensor frames, int patch, int stream) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(xclip_fast_native, CPU, m) {
  m.impl("patch_rows", TORCH_BOX(&patch_rows));
  m.impl("pack_weights", TORCH_BOX(&pack_weights));
  m.impl("patch_tokens", TORCH_BOX(&patch_tokens));
  m.impl("frame_attention", TORCH_BOX(&frame_attention));
  m.impl("pack_linear", TORCH_BOX(&pack_linear));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("int8_rows", TORCH_BOX(&int8_rows));
}

#ifdef XCLIP_FAST_CUDA
STABLE_TORCH_LIBRARY_IMPL(xclip_fast_native, CUDA, m) {
  m.impl("patch_rows_cuda", TORCH_BOX(&patch_rows_cuda));
}
#endif
