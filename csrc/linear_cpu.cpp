#include "linear_cpu.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace xclip_fast {
namespace {

// kBlockInner columns of a block of rows stay in the second cache, two panels' parts in the first
constexpr int64_t kBlockRows = 204;
constexpr int64_t kBlockInner = 256;
constexpr int64_t kLineNumbers = 16;
static_assert(kLineNumbers == kPanelColumns);

// a vector that crosses two lines of the cache takes two loads
struct alignas(64) Line {
  float numbers[kLineNumbers];
};

template <class T>
void pack(const T* weight, int64_t columns, int64_t inner, T* panels, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    T* to = panels + panel * inner * kPanelColumns;
    for (int64_t c = 0; c < kPanelColumns; ++c) {
      const int64_t column = panel * kPanelColumns + c;
      for (int64_t k = 0; k < inner; ++k) {
        to[k * kPanelColumns + c] = column < columns ? weight[column * inner + k] : T(0);
      }
    }
  }
}

}  // namespace

void pack_panels(const void* weight, Element type, int64_t columns, int64_t inner, void* panels, int64_t begin,
                 int64_t end) {
  if (type == Element::kFloat32) {
    return pack(static_cast<const float*>(weight), columns, inner, static_cast<float*>(panels), begin, end);
  }
  pack(static_cast<const uint16_t*>(weight), columns, inner, static_cast<uint16_t*>(panels), begin, end);
}

int64_t linear_units(const Linear& work) {
  const int64_t blocks = (work.row_count + kBlockRows - 1) / kBlockRows;
  return blocks * ((work.columns + 2 * kPanelColumns - 1) / (2 * kPanelColumns));
}

}  // namespace xclip_fast

#if defined(__x86_64__) && defined(__gnu_linux__)

// GCC 12 takes the intrinsics' own undefined registers for mistakes
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace xclip_fast {

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
namespace {

using Vector = __m256;
constexpr int64_t kLanes = 8;
constexpr int kRows = 6;  // with two vectors each 12 of 16 registers hold sums

inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vector x) { _mm256_storeu_ps(to, x); }
inline Vector broadcast(float x) { return _mm256_set1_ps(x); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector minimum(Vector a, Vector b) { return _mm256_min_ps(a, b); }
inline Vector maximum(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline Vector nearest(Vector x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline Vector scale(Vector x, Vector exponent) {
  // in two steps: either power is a float where their product may be none
  const __m256i whole = _mm256_cvtps_epi32(exponent), half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const auto power = [bias](__m256i e) __attribute__((target("avx2,fma,f16c"))) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, bias), 23));
  };
  return x * power(half) * power(_mm256_sub_epi32(whole, half));
}

inline Vector from_bfloat16(const uint16_t* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

inline Vector from_float16(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

#include "linear_kernel.h"

}  // namespace
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
namespace avx512 {
namespace {

using Vector = __m512;
constexpr int64_t kLanes = 16;
constexpr int kRows = 12;  // with two vectors each 24 of 32 registers hold sums

inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vector x) { _mm512_storeu_ps(to, x); }
inline Vector broadcast(float x) { return _mm512_set1_ps(x); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector minimum(Vector a, Vector b) { return _mm512_min_ps(a, b); }
inline Vector maximum(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline Vector nearest(Vector x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vector scale(Vector x, Vector exponent) { return _mm512_scalef_ps(x, exponent); }

inline Vector from_bfloat16(const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline Vector from_float16(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

#include "linear_kernel.h"

}  // namespace
}  // namespace avx512
#pragma GCC pop_options

bool linear_runs() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

void linear(const Linear& work, int64_t begin, int64_t end) {
  static const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  wide ? avx512::linear_part(work, begin, end) : avx2::linear_part(work, begin, end);
}

}  // namespace xclip_fast

#else

namespace xclip_fast {

bool linear_runs() { return false; }

void linear(const Linear&, int64_t, int64_t) {}

}  // namespace xclip_fast

#endif
