#include "frame_attention_cpu.h"

#if defined(__x86_64__) && defined(__gnu_linux__)

// GCC 12 takes the intrinsics' own undefined registers for mistakes
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#define XCLIP_FAST_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define XCLIP_FAST_PART XCLIP_FAST_TARGET inline __attribute__((always_inline))

namespace xclip_fast {
namespace {

constexpr int64_t kLanes = 16;             // 32-bit numbers of a vector, or pairs of bfloat16
constexpr int64_t kPairs = kHeadDim / 2;   // of one row of a head
constexpr int64_t kColumns = 4 * kLanes;   // of a panel: keys in the first GEMM, kHeadDim in the second
constexpr int64_t kPanel = kPairs * kColumns;
constexpr int kRows = 6;                   // queries at a time: with them 24 of 32 registers hold sums
constexpr float kLog2E = 1.44269504f;
static_assert(kColumns == kHeadDim);

struct alignas(64) Line {
  uint32_t pairs[kLanes];
};

// What a thread writes in between: `keys` and `values` are of one head of one frame.
struct Buffers {
  explicit Buffers(int64_t panels)
      : keys(panels * kPanel / kLanes), values(keys.size()), scores(kRows * panels * 4), weights(scores.size() / 2) {}

  static uint32_t* of(std::vector<Line>& lines) { return lines.data()->pairs; }

  std::vector<Line> keys;     // (panels, kPairs, kColumns keys) pairs of neighbours in a key
  std::vector<Line> values;   // (keys / 2, kColumns) pairs of neighbouring keys
  std::vector<Line> scores;   // (kRows, keys) float
  std::vector<Line> weights;  // (kRows, keys) bfloat16
};

XCLIP_FAST_PART __m512 product(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// sums (rows, 16 * vectors) = a (rows, 2 * pairs) b (2 * pairs, 16 * vectors); b is packed, its rows of kColumns pairs.
template <int rows, int vectors>
XCLIP_FAST_PART void multiply(const uint16_t* a, int64_t a_stride, const uint32_t* b, int64_t pairs,
                                __m512 (&sums)[rows][vectors]) {
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) sums[r][v] = _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < pairs; ++p) {
    __m512i column[vectors];
    for (int v = 0; v < vectors; ++v) column[v] = _mm512_load_si512(b + p * kColumns + v * kLanes);
    for (int r = 0; r < rows; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * a_stride + 2 * p, sizeof pair);
      const __m512i row = _mm512_set1_epi32(pair);
      for (int v = 0; v < vectors; ++v) sums[r][v] = product(sums[r][v], row, column[v]);
    }
  }
}

// Scores of some rows of queries and the 16 * vectors keys of a panel.
template <int rows, int vectors>
XCLIP_FAST_PART void score(const uint16_t* query, int64_t query_stride, const uint32_t* keys, float* scores,
                             int64_t stride) {
  __m512 sums[rows][vectors];
  multiply<rows, vectors>(query, query_stride, keys, kPairs, sums);
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) _mm512_store_ps(scores + r * stride + v * kLanes, sums[r][v]);
  }
}

// 2^x for x <= 0, to 3e-6 of itself; a NaN stays one.
XCLIP_FAST_PART __m512 power_of_two(__m512 x) {
  // the second operand is the result where either is a NaN
  x = _mm512_max_ps(_mm512_set1_ps(-130.0f), x);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(1.3333558e-3f);  // log(2)^5 / 5! and so on
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(9.6181291e-3f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(5.5504109e-2f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(2.4022651e-1f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(6.9314718e-1f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, whole);
}

// The logarithm of a sum of powers of two, kept as their largest exponent and the sum without it.
struct LogSum {
  float exponent;
  float sum;
};

// Scores of one query to weights that are not yet divided by their sum.
XCLIP_FAST_PART LogSum soften(float* scores, int64_t keys, float scale, uint16_t* weights) {
  const int64_t vectors = (keys + kLanes - 1) / kLanes;
  const __mmask16 tail = static_cast<__mmask16>((1u << (keys - (vectors - 1) * kLanes)) - 1u);
  float* last = scores + (vectors - 1) * kLanes;
  _mm512_store_ps(last, _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), tail, _mm512_load_ps(last)));
  __m512 most = _mm512_load_ps(scores);
  for (int64_t v = 1; v < vectors; ++v) most = _mm512_max_ps(most, _mm512_load_ps(scores + v * kLanes));
  const __m512 factor = _mm512_set1_ps(scale * kLog2E);
  const float exponent = scale * kLog2E * _mm512_reduce_max_ps(most);
  const __m512 shift = _mm512_set1_ps(exponent);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t v = 0; v < vectors; ++v) {
    const __m512 power = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + v * kLanes), factor, shift));
    sum = _mm512_add_ps(sum, power);
    const __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(power));
    _mm256_store_si256(reinterpret_cast<__m256i*>(weights + v * kLanes), narrow);
  }
  return {exponent, _mm512_reduce_add_ps(sum)};
}

// Some rows of queries from start to end; `mixed` and, unless it is null, `lse` are those of the first.
template <int rows>
XCLIP_FAST_TARGET void attend(const FrameAttention& work, const uint16_t* query, Buffers& buffers, uint16_t* mixed,
                              float* lse) {
  const int64_t keys = work.token_count + 1, query_stride = work.token_stride;
  const int64_t stride = static_cast<int64_t>(buffers.scores.size()) * kLanes / kRows;
  float* scores = reinterpret_cast<float*>(buffers.scores.data());
  for (int64_t first = 0; first < keys; first += kColumns) {
    const uint32_t* panel = Buffers::of(buffers.keys) + first / kColumns * kPanel;
    const int64_t vectors = (keys - first + kLanes - 1) / kLanes;
    if (vectors == 1) {
      score<rows, 1>(query, query_stride, panel, scores + first, stride);
    } else if (vectors == 2) {
      score<rows, 2>(query, query_stride, panel, scores + first, stride);
    } else if (vectors == 3) {
      score<rows, 3>(query, query_stride, panel, scores + first, stride);
    } else {
      score<rows, 4>(query, query_stride, panel, scores + first, stride);
    }
  }
  uint16_t* weights = reinterpret_cast<uint16_t*>(buffers.weights.data());
  float inverse[rows];
  for (int r = 0; r < rows; ++r) {
    const LogSum found = soften(scores + r * stride, keys, work.scale, weights + r * stride);
    inverse[r] = 1.0f / found.sum;
    if (lse) lse[r] = found.exponent + std::log2(found.sum);
  }
  __m512 sums[rows][4];
  multiply<rows, 4>(weights, stride, Buffers::of(buffers.values), (keys + 1) / 2, sums);
  for (int r = 0; r < rows; ++r) {
    const __m512 factor = _mm512_set1_ps(inverse[r]);
    uint16_t* row = mixed + r * work.heads * kHeadDim;
    for (int v = 0; v < 4; ++v) {
      const __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_mul_ps(sums[r][v], factor)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + v * kLanes), narrow);
    }
  }
}

// Turns a square of 16 by 16 pairs: at distance 1, 2, 4 and 8 the rows exchange what stands off the diagonal.
XCLIP_FAST_PART void transpose(__m512i (&rows)[kLanes]) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const __m512i bit = _mm512_set1_epi32(distance), other = _mm512_set1_epi32(kLanes);
    // of the first row the lanes without the bit, and in their neighbours' places those of the second row
    const __mmask16 odd = _mm512_test_epi32_mask(lane, bit);
    const __m512i low = _mm512_mask_or_epi32(lane, odd, _mm512_xor_si512(lane, bit), other);
    const __m512i high = _mm512_mask_or_epi32(_mm512_or_si512(lane, bit), odd, lane, other);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
      if (r & distance) continue;
      const __m512i first = rows[r], second = rows[r + distance];
      rows[r] = _mm512_permutex2var_epi32(first, low, second);
      rows[r + distance] = _mm512_permutex2var_epi32(first, high, second);
    }
  }
}

// Keys and values of one head of one frame into panels; after the last key come zeros.
XCLIP_FAST_TARGET void pack(const FrameAttention& work, int64_t frame, int64_t head, Buffers& buffers) {
  const int64_t part = work.heads * kHeadDim, keys = work.token_count + 1;
  const uint16_t* tokens = work.tokens + frame * work.frame_stride + part + head * kHeadDim;
  const uint16_t* message = work.messages + frame * work.message_stride + head * kHeadDim;
  // one half of a row: of the key, or with `which` 1 of the value
  const auto half = [&](int64_t key, int64_t which, int64_t side) XCLIP_FAST_TARGET {
    if (key >= keys) return _mm512_setzero_si512();
    const uint16_t* row = key < work.token_count ? tokens + key * work.token_stride : message;
    return _mm512_loadu_si512(row + which * part + side * 2 * kLanes);
  };
  uint32_t* packed = Buffers::of(buffers.keys);
  for (int64_t first = 0; first < keys; first += kLanes) {
    uint32_t* panel = packed + first / kColumns * kPanel + first % kColumns;
    for (int64_t side = 0; side < 2; ++side) {
      __m512i rows[kLanes];
      for (int r = 0; r < kLanes; ++r) rows[r] = half(first + r, 0, side);
      transpose(rows);
      for (int r = 0; r < kLanes; ++r) _mm512_store_si512(panel + (side * kLanes + r) * kColumns, rows[r]);
    }
  }
  uint16_t order[2][2 * kLanes];
  for (uint16_t i = 0; i < 2 * kLanes; ++i) {
    order[0][i] = static_cast<uint16_t>(i / 2 + (i % 2) * 2 * kLanes);
    order[1][i] = static_cast<uint16_t>(order[0][i] + kLanes);
  }
  const __m512i low = _mm512_loadu_si512(order[0]), high = _mm512_loadu_si512(order[1]);
  packed = Buffers::of(buffers.values);
  for (int64_t key = 0; key < keys; key += 2, packed += kColumns) {
    for (int64_t side = 0; side < 2; ++side) {
      const __m512i first = half(key, 1, side), second = half(key + 1, 1, side);
      _mm512_store_si512(packed + side * 2 * kLanes, _mm512_permutex2var_epi16(first, low, second));
      _mm512_store_si512(packed + side * 2 * kLanes + kLanes, _mm512_permutex2var_epi16(first, high, second));
    }
  }
}

}  // namespace

bool frame_attention_runs() { return __builtin_cpu_supports("avx512bf16"); }

void frame_attention(const FrameAttention& work, int64_t begin, int64_t end) {
  Buffers buffers((work.token_count + kColumns) / kColumns);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t frame = unit / work.heads, head = unit % work.heads;
    pack(work, frame, head, buffers);
    const auto some = [&](int64_t first, auto attend_rows) {
      const uint16_t* query = work.tokens + frame * work.frame_stride + first * work.token_stride + head * kHeadDim;
      uint16_t* mixed = work.mixed + ((frame * work.queries + first) * work.heads + head) * kHeadDim;
      float* lse = work.lse ? work.lse + unit * work.queries + first : nullptr;
      attend_rows(work, query, buffers, mixed, lse);
    };
    if (work.queries < kRows) {
      for (int64_t first = 0; first < work.queries; ++first) some(first, attend<1>);
    } else {
      // the last rows overlap with those before them, and what is written twice is the same
      for (int64_t first = 0; first < work.queries; first += kRows) {
        some(std::min(first, work.queries - kRows), attend<kRows>);
      }
    }
  }
}

}  // namespace xclip_fast

#else

namespace xclip_fast {

bool frame_attention_runs() { return false; }

void frame_attention(const FrameAttention&, int64_t, int64_t) {}

}  // namespace xclip_fast

#endif
