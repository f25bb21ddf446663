// The GEMM of linear_cpu.cpp for one set of instructions; it is included once for each, after `Vector`, `kLanes`,
// `kRows` and the functions on vectors. All of it has internal linkage: two sets never share a function.

constexpr int64_t kVectors = kPanelColumns / kLanes;  // of one panel
constexpr int64_t kTile = 2;                          // vectors of a tile: two panels of one vector, or one of two

// 2^x; a NaN stays one. The polynomial is off by less than a rounding.
inline Vector power_of_two(Vector x) {
  // the second operand is the result where either is a NaN
  x = minimum(broadcast(128.0f), maximum(broadcast(-127.0f), x));
  const Vector whole = nearest(x), rest = x - whole;
  Vector y = broadcast(1.5252734e-5f);  // log(2)^7 / 7! and so on
  y = fma(y, rest, broadcast(1.5403530e-4f));
  y = fma(y, rest, broadcast(1.3333558e-3f));
  y = fma(y, rest, broadcast(9.6181291e-3f));
  y = fma(y, rest, broadcast(5.5504109e-2f));
  y = fma(y, rest, broadcast(2.4022651e-1f));
  y = fma(y, rest, broadcast(6.9314718e-1f));
  y = fma(y, rest, broadcast(1.0f));
  return scale(y, whole);
}

inline Vector silu(Vector x) {
  return x / (broadcast(1.0f) + power_of_two(x * broadcast(-1.44269504f)));
}

// The epilogue of a tile.
struct Finish {
  bool first;         // of the sum over blocks of `inner`
  bool add;           // the result is a term of the sum
  const float* bias;  // at the last one, or null
  bool silu;          // at the last one
};

// result (rows, vectors * kLanes) += a (rows, inner) b (inner, vectors * kLanes); a lies (inner, rows).
template <int rows, int vectors>
void multiply(const float* a, const float* const* b, int64_t inner, const Finish& finish, float* const* results,
              int64_t stride) {
  Vector sums[rows][vectors];
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      sums[r][v] = broadcast(0.0f);
    }
  }
  const float* column[vectors];
  for (int v = 0; v < vectors; ++v) column[v] = b[v];
  // fewer instructions beside the multiplications
#pragma GCC unroll 4
  for (int64_t k = 0; k < inner; ++k, a += rows) {
    Vector weights[vectors];
    for (int v = 0; v < vectors; ++v) weights[v] = load(column[v] + k * kPanelColumns);
    for (int r = 0; r < rows; ++r) {
      const Vector number = broadcast(a[r]);
      for (int v = 0; v < vectors; ++v) sums[r][v] = fma(number, weights[v], sums[r][v]);
    }
  }
  for (int v = 0; v < vectors; ++v) {
    const Vector bias = finish.bias ? load(finish.bias + v * kLanes) : broadcast(0.0f);
    for (int r = 0; r < rows; ++r) {
      Vector sum = sums[r][v];
      // once for all of `inner`: what is large there rounds no single addition
      if (!finish.first || finish.add) sum = sum + load(results[v] + r * stride);
      if (finish.bias) sum = sum + bias;
      store(results[v] + r * stride, finish.silu ? silu(sum) : sum);
    }
  }
}

using Multiply = void (*)(const float*, const float* const*, int64_t, const Finish&, float* const*, int64_t);

template <int vectors, int... rows>
Multiply multiply_of(int64_t count, std::integer_sequence<int, rows...>) {
  static constexpr Multiply kernels[] = {multiply<rows + 1, vectors>...};
  return kernels[count - 1];
}

// Rows [first, first + count) and columns [from, from + inner) of the rows, in groups of kRows, each (inner, its rows).
// Up to three numbers past the end are written.
inline void pack_rows(const Linear& work, int64_t first, int64_t count, int64_t from, int64_t inner, float* packed) {
  for (int64_t group = 0; group < count; group += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, count - group);
    const float* row = work.rows + (first + group) * work.inner + from;
    float* to = packed + group * inner;
    int64_t k = 0;
    for (; rows == kRows && k + 4 <= inner; k += 4) {
      // four by four, the last rows first: what these write too far is written again
      for (int r = (kRows - 1) / 4 * 4; r >= 0; r -= 4) {
        __m128 square[4];
        for (int i = 0; i < 4; ++i) square[i] = _mm_loadu_ps(row + std::min(r + i, kRows - 1) * work.inner + k);
        _MM_TRANSPOSE4_PS(square[0], square[1], square[2], square[3]);
        for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + (k + i) * kRows + r, square[i]);
      }
    }
    for (; k < inner; ++k) {
      for (int64_t r = 0; r < rows; ++r) to[k * rows + r] = row[r * work.inner + k];
    }
  }
}

// One panel's part as float32: where it lies, or a copy.
inline const float* widened(const Linear& work, int64_t panel, int64_t from, int64_t inner, float* copy) {
  const int64_t start = (panel * work.inner + from) * kPanelColumns, count = inner * kPanelColumns;
  if (work.type == Element::kFloat32) return static_cast<const float*>(work.panels) + start;
  const uint16_t* halves = static_cast<const uint16_t*>(work.panels) + start;
  if (work.type == Element::kBFloat16) {
    for (int64_t i = 0; i < count; i += kLanes) store(copy + i, from_bfloat16(halves + i));
  } else {
    for (int64_t i = 0; i < count; i += kLanes) store(copy + i, from_float16(halves + i));
  }
  return copy;
}

// Asks for the lines of [from, to), so that they are on their way while others are multiplied.
inline void prefetch(const char* from, const char* to) {
  for (; from < to; from += 64) _mm_prefetch(from, _MM_HINT_T1);
}

void linear_part(const Linear& work, int64_t begin, int64_t end) {
  const int64_t panels = (work.columns + kPanelColumns - 1) / kPanelColumns, pairs = (panels + 1) / 2;
  // kept by the thread: fresh memory comes from the system a page at a time
  static thread_local std::vector<Line> row_lines, copies(2 * kBlockInner), edges(2 * kBlockRows);
  const size_t lines = kBlockRows * ((work.inner + kLineNumbers - 1) / kLineNumbers) + 1;
  if (row_lines.size() < lines) row_lines = std::vector<Line>(lines);
  const int64_t size = work.type == Element::kFloat32 ? 4 : 2;
  float* const rows = row_lines.data()->numbers;
  while (begin < end) {
    const int64_t block = begin / pairs, stop = std::min(end, (block + 1) * pairs);
    const int64_t first_row = block * kBlockRows, count = std::min(kBlockRows, work.row_count - first_row);
    for (int64_t from = 0; from < work.inner; from += kBlockInner) {
      pack_rows(work, first_row, count, from, std::min(kBlockInner, work.inner - from), rows + count * from);
    }
    for (int64_t pair = begin % pairs; pair < stop - block * pairs; ++pair) {
      const int64_t first = 2 * pair, column = first * kPanelColumns;
      const int64_t wide = std::min(2 * kPanelColumns, work.columns - column);
      const bool whole = wide % kPanelColumns == 0;
      float* result = work.result + first_row * work.columns + column;
      int64_t stride = work.columns;
      float bias[2 * kPanelColumns] = {};
      if (work.bias) std::copy_n(work.bias + column, wide, bias);
      if (!whole) {
        // the columns that fill up the last panel are written beside the result
        for (int64_t r = 0; r < count; ++r) std::copy_n(result + r * stride, wide, edges[2 * r].numbers);
        stride = 2 * kPanelColumns;
      }
      float* target = whole ? result : edges.data()->numbers;
      const int64_t vectors = (wide + kPanelColumns - 1) / kPanelColumns * kVectors;
      const int64_t shares = (vectors + kTile - 1) / kTile * ((count + kRows - 1) / kRows);
      // all blocks of a pair, one after the other: its results stay in the cache
      for (int64_t from = 0; from < work.inner; from += kBlockInner) {
        const int64_t inner = std::min(kBlockInner, work.inner - from), next = from + inner;
        const bool last = next == work.inner;
        const float* parts[2];
        for (int64_t p = 0; p < 2 && first + p < panels; ++p) {
          parts[p] = widened(work, first + p, from, inner, copies[p * kBlockInner].numbers);
        }
        // the pair's next parts, or the next pair's first ones
        const int64_t ahead = last ? first + 2 : first, ahead_from = last ? 0 : next;
        const int64_t bytes = std::min(kBlockInner, work.inner - ahead_from) * kPanelColumns * size;
        const int64_t share = (bytes + 64 * shares - 1) / (64 * shares) * 64;
        int64_t asked = 0;
        for (int64_t v = 0; v < vectors; v += kTile) {
          const int64_t some = std::min(kTile, vectors - v);
          const float* b[kTile];
          float* results[kTile];
          for (int64_t i = 0; i < some; ++i) b[i] = parts[(v + i) / kVectors] + (v + i) % kVectors * kLanes;
          for (int64_t row = 0; row < count; row += kRows) {
            const int64_t height = std::min<int64_t>(kRows, count - row);
            for (int64_t i = 0; i < some; ++i) results[i] = target + row * stride + (v + i) * kLanes;
            const Finish finish{from == 0, work.add, last && work.bias ? bias + v * kLanes : nullptr, last && work.silu};
            const auto heights = std::make_integer_sequence<int, kRows>();
            const Multiply kernel = some == 1 ? multiply_of<1>(height, heights) : multiply_of<2>(height, heights);
            for (int64_t p = 0; p < 2 && ahead + p < panels; ++p) {
              const char* part = static_cast<const char*>(work.panels) +
                                 ((ahead + p) * work.inner + ahead_from) * kPanelColumns * size;
              prefetch(part + asked, part + std::min(bytes, asked + share));
            }
            asked += share;
            kernel(rows + count * from + row * inner, b, inner, finish, results, stride);
          }
        }
      }
      if (!whole) {
        for (int64_t r = 0; r < count; ++r) std::copy_n(edges[2 * r].numbers, wide, result + r * work.columns);
      }
    }
    begin = stop;
  }
}
