// Index maths of the frame-patch embedding: what the CUDA kernels, their emulator on the host and the packing of the
// weights share. Pure functions, no state, no CUDA headers.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define XCLIP_FAST_BOTH __host__ __device__
#else
#define XCLIP_FAST_BOTH
#endif

namespace xclip_fast {

// Pixels enter the product as uint8 - 128, which float16 holds exactly; weights are scaled up by a power of two so that
// few are subnormal, and the sum is scaled back in float32.
constexpr int kPixelCentre = 128;
constexpr float kWeightScale = 256.0f;

// A stage of the pipeline is 48 bytes of a pixel row of a patch: the whole row for patch 14 (42 bytes and 6 zero weights)
// and 16, half of it for patch 32.
constexpr int kStageBytes = 48;

XCLIP_FAST_BOTH constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

XCLIP_FAST_BOTH constexpr int64_t stages_per_row(int64_t patch) { return ceil_div(3 * patch, kStageBytes); }

XCLIP_FAST_BOTH constexpr int64_t stage_count(int64_t patch) { return patch * stages_per_row(patch); }

// Packed weights are float16 (stage_count, token_width, 48): stage = y * stages_per_row + (3 * x + channel) / 48.
constexpr int64_t packed_weight_elements(int64_t patch, int64_t token_width) {
  return stage_count(patch) * token_width * kStageBytes;
}

// The column of a 16-wide matrix fragment that byte 0..15 of a pixel row is multiplied in. A lane holds columns 2t, 2t+1,
// 2t+8, 2t+9 of a row of A: in this order they are the four bytes 4t..4t+3, one load. In torch, for rows (patch,
// token_width, 48 * stages_per_row) of zero-padded bytes:
//   rows.unflatten(-1, (-1, 3, 4, 2, 2)).transpose(-3, -2).flatten(-4).transpose(1, 2)
XCLIP_FAST_BOTH constexpr int fragment_column(int byte) { return byte % 16 / 4 * 2 + byte % 2 + byte % 4 / 2 * 8; }

// Where weight[token_column, channel, y, x] stands in the packed weights.
constexpr int64_t packed_weight_index(
    int64_t patch, int64_t token_width, int64_t token_column, int64_t channel, int64_t y, int64_t x) {
  const int64_t byte = 3 * x + channel;
  const int64_t stage = y * stages_per_row(patch) + byte / kStageBytes;
  const int64_t inside = byte % kStageBytes;
  return (stage * token_width + token_column) * kStageBytes + inside / 16 * 16 +
         fragment_column(static_cast<int>(inside % 16));
}

}  // namespace xclip_fast
