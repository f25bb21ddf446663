// Replays the CUDA kernel of csrc/patch_embed_cuda.cu on the host: blocks, warps, lanes, the ring of stages with its
// asynchronous copies, matrix fragments as the PTX manual lays them out, and every address from patch_embed_index.h.
// Built with the address and undefined-behaviour sanitizers. It cannot see a missing barrier.
//
//   patch_embed_emulator [NAME...]   prints a line of figures a case and tile; fails at the first broken rule
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "patch_embed_index.h"

using namespace xclip_fast;

namespace {

std::string running;

void require(bool holds, const char* rule) {
  if (holds) return;
  std::printf("%s: broken rule: %s\n", running.c_str(), rule);
  std::exit(1);
}

uint16_t to_half(double value) {
  const double magnitude = std::fabs(value);
  if (magnitude == 0) return 0;
  const int exponent = std::max(std::ilogb(magnitude), -14);
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // 1024..2048 when normal
  return static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | (((exponent + 14) << 10) + steps));
}

float from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  require(exponent != 31, "a weight read was never written, or is not finite");
  const double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return static_cast<float>(bits & 0x8000 ? -magnitude : magnitude);
}

struct Case {
  std::string name;
  int64_t patch, frames, height, width, token_width;
  // a crop: columns and rows of the larger frame that lie before and after it
  int64_t before = 0, after = 0;
  bool planar = false;
  bool exact = false;  // weights that float16 holds: nothing is rounded but sums
};

struct Data {
  std::vector<uint8_t> frames;
  std::vector<double> weight;  // (token_width, 3, patch, patch)
  std::vector<uint16_t> packed;
  std::vector<float> table;      // (1 + per_frame, token_width)
  std::vector<double> expected;  // (frames, 1 + per_frame, token_width)
  std::vector<float> tokens;
  std::vector<int> writes;
  PatchGrid grid;
  const uint8_t* origin;  // what sources count from
};

constexpr double kMean[3] = {0.48145466, 0.4578275, 0.40821073};
constexpr double kStd[3] = {0.26862954, 0.26130258, 0.27577711};

Data make_data(const Case& c) {
  Data data;
  std::mt19937 random(static_cast<unsigned>(c.patch * 1000 + c.width));
  std::uniform_real_distribution<double> uniform(-1, 1);
  const int64_t full_width = c.before + c.width + c.after, full_height = c.before + c.height + c.after;
  data.frames.resize(c.frames * full_height * full_width * 3);
  for (auto& byte : data.frames) byte = static_cast<uint8_t>(random());
  require(reinterpret_cast<uintptr_t>(data.frames.data()) % 16 == 0, "allocations are 16-byte aligned");

  const int64_t frame_stride = full_height * full_width * 3;
  const int64_t column_stride = c.planar ? 1 : 3;
  const int64_t row_stride = full_width * column_stride;
  const int64_t channel_stride = c.planar ? full_height * full_width : 1;
  const uint8_t* pixels = data.frames.data() + c.before * (row_stride + column_stride);
  data.grid = patch_grid(reinterpret_cast<uintptr_t>(pixels), frame_stride, row_stride, column_stride, channel_stride,
                         c.frames, c.height, c.width, c.patch);
  data.origin = pixels - data.grid.origin;

  const int64_t p = c.patch, d = c.token_width, n = data.grid.per_frame;
  data.weight.resize(d * 3 * p * p);
  data.packed.assign(packed_weight_elements(p, d), 0);
  std::vector<double> folded(d, 0);
  for (int64_t i = 0; i < static_cast<int64_t>(data.weight.size()); ++i) {
    const int64_t column = i / (3 * p * p), channel = i / (p * p) % 3, y = i / p % p, x = i % p;
    double weight = 0.05 * uniform(random);
    if (c.exact) weight = std::nearbyint(40 * weight) / kWeightScale * 255 * kStd[channel];
    data.weight[i] = weight;
    data.packed[packed_weight_index(p, d, column, channel, y, x)] = to_half(weight / (255 * kStd[channel]) * kWeightScale);
    folded[column] += weight * (kPixelCentre / 255.0 - kMean[channel]) / kStd[channel];
  }
  data.table.resize((1 + n) * d);
  for (int64_t i = 0; i < static_cast<int64_t>(data.table.size()); ++i) {
    const double position = 0.01 * uniform(random);
    data.table[i] = static_cast<float>(position + (i < d ? 0 : folded[i % d]));
  }
  data.tokens.assign(c.frames * (1 + n) * d, std::numeric_limits<float>::quiet_NaN());
  data.writes.assign(data.tokens.size(), 0);

  // the convolution, from its definition; the table's own rounding is taken from it
  data.expected.resize(data.tokens.size());
  std::vector<double> values(3 * p * p);
  for (int64_t row = 0; row < c.frames * (1 + n); ++row) {
    const int64_t frame = row / (1 + n), place = row % (1 + n);
    double* expected = data.expected.data() + row * d;
    for (int64_t column = 0; column < d; ++column) expected[column] = data.table[place * d + column];
    if (place == 0) continue;
    const int64_t top = (place - 1) / data.grid.across * p, left = (place - 1) % data.grid.across * p;
    for (int64_t i = 0; i < 3 * p * p; ++i) {
      const int64_t channel = i / (p * p), y = top + i / p % p, x = left + i % p;
      const uint8_t byte = pixels[frame * frame_stride + y * row_stride + x * column_stride + channel * channel_stride];
      values[i] = (byte / 255.0 - kMean[channel]) / kStd[channel];
    }
    for (int64_t column = 0; column < d; ++column) {
      const double* weight = data.weight.data() + column * 3 * p * p;
      for (int64_t i = 0; i < 3 * p * p; ++i) expected[column] += weight[i] * values[i];
      expected[column] -= folded[column];
    }
  }
  return data;
}

// The shared memory of a block: unwritten bytes are known, and copies land when a group of them is waited for.
class Shared {
 public:
  Shared(int bytes, bool at_once) : bytes_(bytes), written_(bytes, 0), at_once_(at_once) {}

  void clear(int first, int count) { std::fill_n(written_.begin() + first, count, 0); }

  void store(int at, const void* source, int count) {
    require(at >= 0 && at + count <= static_cast<int>(bytes_.size()), "shared memory ends here");
    const bool fresh = std::all_of(written_.begin() + at, written_.begin() + at + count, [](auto byte) { return !byte; });
    require(fresh, "no two threads write a byte of a stage");
    std::fill_n(written_.begin() + at, count, 1);
    std::memcpy(bytes_.data() + at, source, count);
  }

  void copy_16_bytes(int at, const void* source, int count) {
    require(at % 16 == 0 && reinterpret_cast<uintptr_t>(source) % 16 == 0, "copies are 16-byte aligned");
    open_.push_back({at, {}});
    std::memcpy(open_.back().bytes.data(), source, count);
  }

  // a stage is written anew, each byte once, by the copies that follow
  void begin_copies(int first, int count) { open_.push_back({first, {}, count}); }

  void end_of_copies() {
    groups_.push_back(std::move(open_));
    open_.clear();
    if (at_once_) wait_for_copies(0);
  }

  void wait_for_copies(int in_flight) {
    for (; static_cast<int>(groups_.size()) > in_flight; groups_.pop_front()) {
      for (const Copy& copy : groups_.front()) {
        copy.cleared ? clear(copy.at, copy.cleared) : store(copy.at, copy.bytes.data(), 16);
      }
    }
  }

  template <class Value>
  Value load(int at) const {
    require(at >= 0 && at + static_cast<int>(sizeof(Value)) <= static_cast<int>(bytes_.size()), "shared memory ends here");
    require(at % sizeof(Value) == 0, "loads are aligned");
    constexpr uint64_t kArrived = 0x0101010101010101 >> (64 - 8 * sizeof(Value));
    uint64_t arrived = 0;
    std::memcpy(&arrived, written_.data() + at, sizeof(Value));
    require(arrived == kArrived, "a byte read has arrived");
    Value value;
    std::memcpy(&value, bytes_.data() + at, sizeof(Value));
    return value;
  }

 private:
  struct Copy {
    int at;
    std::array<uint8_t, 16> bytes;
    int cleared = 0;
  };

  std::vector<uint8_t> bytes_, written_;
  bool at_once_;
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
};

// how often the worst bank is asked for when 32 lanes load a word each
int bank_conflicts(std::array<int, 32> addresses) {
  for (int& address : addresses) address /= 4;
  std::sort(addresses.begin(), addresses.end());
  const auto end = std::unique(addresses.begin(), addresses.end());
  std::array<int, 32> words = {};
  for (auto word = addresses.begin(); word != end; ++word) ++words[*word % 32];
  return *std::max_element(words.begin(), words.end());
}

// plain sums of arrays, not worth the sanitizers' time
__attribute__((no_sanitize("address", "undefined"))) void add_product(
    float (&sums)[16][8], const float (&a)[16][16], const float (&b)[16][8]) {
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sums[row][column] += a[row][k] * b[k][column];
    }
  }
}

template <class SomeTile, PixelPath kPath>
class Block {
  using Memory = SharedMemory<SomeTile, kPath>;
  static constexpr int kM = SomeTile::kWarpRows / 16, kN = SomeTile::kWarpColumns / 8;

 public:
  Block(Data& data, int64_t token_width, int64_t index, bool at_once)
      : data_(data), token_width_(token_width), shared_(Memory::kTotal, at_once) {
    const int64_t column_tiles = ceil_div(token_width, SomeTile::kColumns);
    first_column_ = index % column_tiles * SomeTile::kColumns;
    for (int row = 0; row < SomeTile::kRows; ++row) {
      rows_.push_back(patch_row(data.grid, index / column_tiles * SomeTile::kRows + row));
    }
  }

  void run() {
    const int stages = static_cast<int>(stage_count(data_.grid.patch));
    Stage now;
    for (int i = 0; i < SomeTile::kDepth - 1; ++i) load(stages);
    for (int i = 0; i < stages; ++i) {
      shared_.wait_for_copies(SomeTile::kDepth - 2);
      load(stages);
      for (int warp = 0; warp < SomeTile::kThreads / 32; ++warp) multiply(warp, i % SomeTile::kDepth, now);
      now.advance(data_.grid);
    }
    for (int thread = 0; thread < SomeTile::kThreads; ++thread) write(thread);
  }

  int pixel_conflicts = 0, weight_conflicts = 0;

 private:
  void load(int stages) {
    if (loaded_ < stages) {
      const int pixels = Memory::kPixels + loaded_ % SomeTile::kDepth * Memory::kPixelStage;
      const int weights = Memory::kWeights + loaded_ % SomeTile::kDepth * Memory::kWeightStage;
      shared_.begin_copies(weights, Memory::kWeightStage);
      if constexpr (kPath == PixelPath::kScattered) {
        gather_pixels(pixels);
      } else {
        load_pixels(pixels);
      }
      load_weights(weights);
      ahead_.advance(data_.grid);
      ++loaded_;
    }
    shared_.end_of_copies();
  }

  void load_pixels(int slots) {
    constexpr int kCopies = PixelSlot<kPath>::kCopies;
    shared_.begin_copies(slots, Memory::kPixelStage);
    for (int index = 0; index < SomeTile::kRows * kCopies; ++index) {
      const PatchRow& row = rows_[index / kCopies];
      const PixelCopy copy = pixel_copy<kPath>(row, index / kCopies, index % kCopies, ahead_);
      const int64_t end = row.source + ahead_.row_offset + row.row_left;
      require(copy.bytes == 0 || copy.source + copy.bytes <= end, "no pixel past the row is read");
      shared_.copy_16_bytes(slots + copy.destination, data_.origin + copy.source, copy.bytes);
    }
  }

  void gather_pixels(int slots) {
    shared_.clear(slots, Memory::kPixelStage);
    for (int index = 0; index < SomeTile::kRows * kStageBytes; ++index) {
      const int row = index / kStageBytes, byte = ahead_.byte + index % kStageBytes;
      uint8_t value = 0;
      if (byte < 3 * data_.grid.patch) {
        value = data_.origin[rows_[row].source + ahead_.row_offset + scattered_offset(data_.grid, byte)];
      }
      shared_.store(slots + row * PixelSlot<kPath>::kBytes + index % kStageBytes, &value, 1);
    }
  }

  void load_weights(int slots) {
    for (int index = 0; index < SomeTile::kColumns * kWeightCopies; ++index) {
      const int column = index / kWeightCopies, value = index % kWeightCopies * 8;
      const int64_t source = std::min(first_column_ + column, token_width_ - 1);
      const uint16_t* weights = data_.packed.data() + loaded_ * token_width_ * kStageBytes;
      shared_.copy_16_bytes(
          slots + (weight_slot(column) * kWeightSlot + value) * 2, weights + source * kStageBytes + value, 16);
    }
  }

  // registers of a lane in the PTX manual's layouts of mma.m16n8k16 and ldmatrix
  void multiply(int warp, int place, const Stage& stage) {
    const int first_row = SomeTile::warp_row(warp * 32), first_column = SomeTile::warp_column(warp * 32);
    for (int step = 0; step < kStageBytes / 16; ++step) {
      float a[kM][16][16], b[kN][16][8];
      for (int m = 0; m < kM; ++m) {
        for (int half = 0; half < 2; ++half) {
          load_pixel_fragments(a[m], first_row + 16 * m, half, place, stage, step);
        }
      }
      for (int pair = 0; pair < kN / 2; ++pair) load_weight_fragments(b + 2 * pair, first_column + 16 * pair, place, step);
      for (int m = 0; m < kM; ++m) {
        for (int n = 0; n < kN; ++n) add_product(sums_[warp][m][n], a[m], b[n]);
      }
    }
  }

  void load_pixel_fragments(float (&a)[16][16], int first_row, int half, int place, const Stage& stage, int step) {
    std::array<int, 32> words;
    for (int lane = 0; lane < 32; ++lane) {
      const int row = first_row + fragment_row(half, lane);
      const int offset = pixel_fragment<kPath>(rows_[row], row, lane, stage) + 16 * step;
      const int at = Memory::kPixels + place * Memory::kPixelStage + offset;
      words[lane] = at & ~3;
      uint32_t four = shared_.template load<uint32_t>(at & ~3);
      if (kPath == PixelPath::kSkewed) {
        const uint64_t both = static_cast<uint64_t>(shared_.template load<uint32_t>((at & ~3) + 4)) << 32 | four;
        four = static_cast<uint32_t>(both >> (8 * (at & 3)));
      } else {
        require(at % 4 == 0, "loads are aligned");
      }
      for (int i = 0; i < 4; ++i) {
        // registers 0 and 1 hold columns 2t and 2t + 1 of rows g and g + 8, registers 2 and 3 those eight columns on
        a[lane / 4 + 8 * half][lane % 4 * 2 + i % 2 + i / 2 * 8] = static_cast<float>(four >> (8 * i) & 255) - kPixelCentre;
      }
    }
    pixel_conflicts = std::max(pixel_conflicts, bank_conflicts(words));
  }

  // lanes 8i..8i+7 name the rows of matrix i; each lane receives two values of row lane / 4 of every matrix, which are
  // k = 2t, 2t + 1 of column lane / 4 of B: matrices 0 and 1 are the halves of k of one B, 2 and 3 of the next
  void load_weight_fragments(float (*b)[16][8], int first_slot, int place, int step) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      std::array<int, 32> words;
      for (int lane = 0; lane < 32; ++lane) {
        const int named = weight_fragment(first_slot, 8 * matrix + lane / 4, step) * 2;
        const int at = Memory::kWeights + place * Memory::kWeightStage + named;
        require(at % 16 == 0, "ldmatrix reads aligned rows");
        words[lane] = at + lane % 4 * 4;
        for (int i = 0; i < 2; ++i) {
          b[matrix / 2][matrix % 2 * 8 + lane % 4 * 2 + i][lane / 4] =
              from_half(shared_.template load<uint16_t>(at + lane % 4 * 4 + 2 * i));
        }
      }
      weight_conflicts = std::max(weight_conflicts, bank_conflicts(words));
    }
  }

  void write(int thread) {
    const int lane = thread % 32;
    for (int m = 0; m < kM; ++m) {
      for (int half = 0; half < 2; ++half) {
        const PatchRow& row = rows_[SomeTile::warp_row(thread) + 16 * m + fragment_row(half, lane)];
        for (int group = 0; group < SomeTile::kWarpColumns / 32 && row.token >= 0; ++group) {
          const int64_t column = first_column_ + SomeTile::warp_column(thread) + lane_column(group, lane);
          std::array<float, 8> eight;
          for (int i = 0; i < 8; ++i) {
            // sums 0 and 1 are columns 2t and 2t + 1 of row g, sums 2 and 3 those of row g + 8
            eight[i] = sums_[thread / 32][m][4 * group + i / 2][lane / 4 + 8 * half][lane % 4 * 2 + i % 2];
          }
          write_token(row.token, row.position + 1, column, eight);
        }
      }
    }
    constexpr int kEights = SomeTile::kColumns / 8;
    for (int row = thread / kEights; row < SomeTile::kRows; row += SomeTile::kThreads / kEights) {
      if (rows_[row].token < 0 || rows_[row].position != 0) continue;
      write_token(rows_[row].token - 1, 0, first_column_ + thread % kEights * 8, {});
    }
  }

  void write_token(int64_t token, int64_t entry, int64_t column, const std::array<float, 8>& sums) {
    const int64_t count = std::min<int64_t>(8, token_width_ - column);
    if (count > 0 && token_width_ % 8 == 0) require(count == 8 && column % 8 == 0, "stores are 16-byte aligned");
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = token * token_width_ + column + i;
      data_.tokens.at(at) = sums[i] / kWeightScale + data_.table.at(entry * token_width_ + column + i);
      ++data_.writes[at];
    }
  }

  Data& data_;
  int64_t token_width_;
  Shared shared_;
  int64_t first_column_;
  std::vector<PatchRow> rows_;
  Stage ahead_;
  int loaded_ = 0;
  float sums_[SomeTile::kThreads / 32][kM][kN][16][8] = {};
};

double relative_error(const Data& data) {
  double error = 0, total = 0;
  for (size_t i = 0; i < data.tokens.size(); ++i) {
    require(data.writes[i] == 1, "every token value is written once");
    error += std::pow(data.tokens[i] - data.expected[i], 2);
    total += std::pow(data.expected[i], 2);
  }
  return std::sqrt(error / total);
}

template <class SomeTile, PixelPath kPath>
void emulate(const Case& c, Data& data, const char* tile) {
  int pixel_conflicts = 0, weight_conflicts = 0;
  // copies that land as late as they may, and, where it is cheap, at once
  for (int at_once = 0; at_once <= (c.exact ? 1 : 0); ++at_once) {
    std::fill(data.tokens.begin(), data.tokens.end(), std::numeric_limits<float>::quiet_NaN());
    std::fill(data.writes.begin(), data.writes.end(), 0);
    const int64_t blocks = block_count(data.grid.patches, c.token_width, SomeTile::kRows, SomeTile::kColumns);
    for (int64_t index = 0; index < blocks; ++index) {
      Block<SomeTile, kPath> block(data, c.token_width, index, at_once == 1);
      block.run();
      pixel_conflicts = std::max(pixel_conflicts, block.pixel_conflicts);
      weight_conflicts = std::max(weight_conflicts, block.weight_conflicts);
    }
    // a NaN fails the comparison too
    require(relative_error(data) <= (c.exact ? 1e-6 : 5e-4), "tokens are those of the convolution");
  }
  std::printf("%s %s %s %.2e %d %d %d\n", c.name.c_str(), tile,
              std::array{"aligned", "skewed", "scattered"}[static_cast<int>(kPath)], relative_error(data), pixel_conflicts,
              weight_conflicts, SharedMemory<SomeTile, kPath>::kTotal);
}

template <PixelPath kPath>
void emulate_tiles(const Case& c, Data& data) {
  emulate<LargeTile, kPath>(c, data, "large");
  emulate<SmallTile, kPath>(c, data, "small");
}

const std::vector<Case> kCases = {
    // production shapes
    {"b32-224", 32, 3, 224, 224, 72},
    {"b16-224", 16, 1, 224, 224, 136},
    {"l14-224", 14, 1, 224, 224, 72},
    {"l14-336", 14, 1, 336, 336, 8},
    {"b32-320", 32, 1, 320, 320, 16},
    {"b16-336", 16, 1, 336, 336, 8},
    // widths around the tiles, and one that has no vectors
    {"wide", 16, 1, 32, 64, 264},
    {"narrow", 16, 2, 32, 32, 1},
    {"odd-width", 32, 2, 64, 32, 131},
    // many frames in a tile, patches of other sizes, rectangles
    {"one-patch-frames", 16, 131, 16, 16, 8},
    {"patch-8", 8, 2, 40, 56, 24},
    {"patch-7", 7, 3, 35, 63, 16},
    {"patch-1", 1, 2, 5, 9, 8},
    {"patch-48", 48, 1, 96, 144, 8},
    {"patch-20", 20, 1, 60, 100, 8},
    {"tall", 16, 1, 512, 16, 8},
    {"flat", 14, 1, 14, 1400, 8},
    // other layouts
    {"crop", 16, 2, 64, 96, 40, 5, 6},
    {"aligned-crop", 16, 2, 64, 96, 40, 16, 16},
    {"odd-crop", 14, 2, 56, 84, 40, 3, 4},
    {"planar", 16, 2, 48, 80, 40, 0, 0, true},
    {"planar-crop", 14, 1, 42, 70, 24, 1, 2, true},
    // nothing to round
    {"exact-aligned", 16, 2, 48, 80, 40, 0, 0, false, true},
    {"exact-skewed", 14, 2, 42, 70, 40, 1, 0, false, true},
    {"exact-scattered", 10, 2, 30, 50, 40, 0, 0, true, true},
};

}  // namespace

int main(int count, char** names) {
  for (const Case& c : kCases) {
    const bool asked = std::find(names + 1, names + count, c.name) != names + count;
    if (count > 1 && !asked) continue;
    running = c.name;
    Data data = make_data(c);
    switch (choose_path(data.grid)) {
      case PixelPath::kAligned: emulate_tiles<PixelPath::kAligned>(c, data); break;
      case PixelPath::kSkewed: emulate_tiles<PixelPath::kSkewed>(c, data); break;
      case PixelPath::kScattered: emulate_tiles<PixelPath::kScattered>(c, data); break;
    }
  }
}
