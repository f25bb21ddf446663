// Runs csrc/patch_embed_kernel.h as it stands on the GPU of simt.h, against a convolution in double precision.
// Built with the address and undefined-behaviour sanitizers; buffers have the exact size.
//
//   patch_embed_emulator [NAME...]              prints figures of a case and tile; fails at the first broken rule
//   patch_embed_emulator --run FOLDER NUMBER... computes tokens of files, and rows
#include <sys/mman.h>

#include <fstream>
#include <iterator>
#include <random>
#include <type_traits>

#include "simt.h"

#include "patch_embed_kernel.h"
#include "patch_rows_kernel.h"

using namespace xclip_fast;
using simt::require;

namespace {

struct Case {
  std::string name;
  int64_t patch, frames, height, width, token_width;
  // a crop: columns and rows of the larger frame that lie before and after it
  int64_t before = 0, after = 0;
  bool planar = false;
  bool exact = false;  // weights that float16 holds: nothing is rounded but sums
};

struct Data {
  PatchEmbedArguments arguments = {};
  std::vector<uint8_t> frames;
  std::vector<uint16_t> weight;
  std::vector<float> table;      // (1 + patches, token_width)
  std::vector<double> expected;  // (frames, 1 + patches, token_width)
};

constexpr double kMean[3] = {0.48145466, 0.4578275, 0.40821073};
constexpr double kStd[3] = {0.26862954, 0.26130258, 0.27577711};

void make_frames(const Case& c, Data& data, std::mt19937& random) {
  const int64_t full_width = c.before + c.width + c.after, full_height = c.before + c.height + c.after;
  data.frames.resize(c.frames * full_height * full_width * 3);
  for (auto& byte : data.frames) byte = static_cast<uint8_t>(random());
  PatchEmbedArguments& a = data.arguments;
  a.frame_stride = full_height * full_width * 3;
  a.column_stride = c.planar ? 1 : 3;
  a.row_stride = full_width * a.column_stride;
  a.channel_stride = c.planar ? full_height * full_width : 1;
  a.pixels = data.frames.data() + c.before * (a.row_stride + a.column_stride);
  a.frames = c.frames;
  a.height = c.height;
  a.width = c.width;
  a.patch = c.patch;
  a.token_width = c.token_width;
}

// tokens from the definition: normalised pixels times weights, added to the table, whose own rounding is not counted
void convolve(const Case& c, Data& data, const std::vector<double>& weight, const std::vector<double>& folded) {
  const PatchEmbedArguments& a = data.arguments;
  const int64_t p = c.patch, d = c.token_width, across = c.width / p, places = 1 + c.height / p * across;
  data.expected.resize(c.frames * places * d);
  std::vector<double> values(3 * p * p);
  for (int64_t row = 0; row < c.frames * places; ++row) {
    const int64_t frame = row / places, place = row % places;
    double* expected = data.expected.data() + row * d;
    for (int64_t column = 0; column < d; ++column) expected[column] = data.table[place * d + column];
    if (place == 0) continue;
    const int64_t top = (place - 1) / across * p, left = (place - 1) % across * p;
    for (int64_t i = 0; i < 3 * p * p; ++i) {
      const int64_t channel = i / (p * p), y = top + i / p % p, x = left + i % p;
      const int64_t at = frame * a.frame_stride + y * a.row_stride + x * a.column_stride + channel * a.channel_stride;
      values[i] = (a.pixels[at] / 255.0 - kMean[channel]) / kStd[channel];
    }
    for (int64_t column = 0; column < d; ++column) {
      for (int64_t i = 0; i < 3 * p * p; ++i) expected[column] += weight[column * 3 * p * p + i] * values[i];
      expected[column] -= folded[column];
    }
  }
}

Data make_data(const Case& c) {
  Data data;
  std::mt19937 random(static_cast<unsigned>(c.patch * 1000 + c.width));
  std::uniform_real_distribution<double> uniform(-1, 1);
  make_frames(c, data, random);
  const int64_t p = c.patch, d = c.token_width, patches = c.height / p * (c.width / p);
  std::vector<double> weight(d * 3 * p * p), folded(d, 0);
  data.weight.assign(packed_weight_elements(p, d), 0);
  for (int64_t i = 0; i < static_cast<int64_t>(weight.size()); ++i) {
    const int64_t column = i / (3 * p * p), channel = i / (p * p) % 3, y = i / p % p, x = i % p;
    weight[i] = 0.05 * uniform(random);
    if (c.exact) weight[i] = std::nearbyint(40 * weight[i]) / kWeightScale * 255 * kStd[channel];
    const double scaled = weight[i] / (255 * kStd[channel]) * kWeightScale;
    data.weight[packed_weight_index(p, d, column, channel, y, x)] = simt::to_half(scaled);
    folded[column] += weight[i] * (kPixelCentre / 255.0 - kMean[channel]) / kStd[channel];
  }
  data.table.resize((1 + patches) * d);
  for (int64_t i = 0; i < static_cast<int64_t>(data.table.size()); ++i) {
    data.table[i] = static_cast<float>(0.01 * uniform(random) + (i < d ? 0 : folded[i % d]));
  }
  convolve(c, data, weight, folded);
  data.arguments.weight = data.weight.data();
  data.arguments.table = data.table.data();
  return data;
}

struct Conflicts {
  int pixels = 0, weights = 0;
};

// runs the kernel for the patches from `first` on, the start of a tile
template <class SomeTile, PixelPath kPath>
Conflicts run(const PatchEmbedArguments& arguments, int64_t first = 0) {
  Conflicts conflicts;
  const Problem problem = make_problem(arguments);
  const auto blocks = [&](int64_t patches) {
    return block_count(patches, problem.token_width, SomeTile::kRows, SomeTile::kColumns);
  };
  for (int64_t index = blocks(first); index < blocks(problem.grid.patches); ++index) {
    blockIdx.x = static_cast<unsigned>(index);
    simt::Block block(SomeTile::kThreads, SharedMemory<SomeTile, kPath>::kTotal);
    block.run([&] { patch_embed_kernel<SomeTile, kPath>(problem); });
    conflicts.pixels = std::max(conflicts.pixels, block.pixel_conflicts);
    conflicts.weights = std::max(conflicts.weights, block.weight_conflicts);
  }
  return conflicts;
}

template <class Value>
std::vector<Value> poisoned_tokens(Data& data, TokenType type) {
  std::vector<Value> tokens(data.expected.size());
  std::memset(tokens.data(), 0xff, tokens.size() * sizeof(Value));  // NaN in all types
  data.arguments.tokens = tokens.data();
  data.arguments.token_type = type;
  return tokens;
}

template <class SomeTile, PixelPath kPath>
void report(const Case& c, const char* tile, double error, const Conflicts& conflicts) {
  const char* paths[] = {"aligned", "skewed", "scattered"};
  std::printf("%s %s %s %.2e %d %d %d\n", c.name.c_str(), tile, paths[static_cast<int>(kPath)], error, conflicts.pixels,
              conflicts.weights, SharedMemory<SomeTile, kPath>::kTotal);
}

template <class SomeTile, PixelPath kPath>
void emulate(const Case& c, Data& data, const char* tile) {
  const auto exact = poisoned_tokens<float>(data, TokenType::kFloat32);
  const Conflicts conflicts = run<SomeTile, kPath>(data.arguments);
  double error = 0, total = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    error += std::pow(exact[i] - data.expected[i], 2);
    total += std::pow(data.expected[i], 2);
  }
  error = std::sqrt(error / total);
  // a NaN fails the comparison too
  require(error <= (c.exact ? 1e-6 : 5e-4), "tokens are those of the convolution");
  if (c.exact) {
    const auto half = poisoned_tokens<uint16_t>(data, TokenType::kFloat16);
    run<SomeTile, kPath>(data.arguments);
    const auto bfloat = poisoned_tokens<uint16_t>(data, TokenType::kBFloat16);
    run<SomeTile, kPath>(data.arguments);
    for (size_t i = 0; i < exact.size(); ++i) {
      require(half[i] == simt::to_half(exact[i]), "float16 tokens are those of float32, rounded");
      require(bfloat[i] == simt::to_bfloat(exact[i]), "bfloat16 tokens are those of float32, rounded");
    }
  }
  report<SomeTile, kPath>(c, tile, error, conflicts);
}

// runs the gathering kernel from a block on; its threads need nothing of each other
template <int kUnit>
void run_rows(const PatchRowsArguments& arguments, int64_t first) {
  const RowsProblem problem = make_rows_problem(arguments);
  for (int64_t block = first; block < rows_blocks(problem); ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    for (threadIdx.x = 0; threadIdx.x < kRowThreads; ++threadIdx.x) patch_rows_kernel<kUnit>(problem);
  }
}

int gather(const PatchRowsArguments& arguments, int64_t first = 0) {
  const int unit = load_unit(make_rows_problem(arguments).grid);
  if (unit == 8) run_rows<8>(arguments, first);
  if (unit == 2) run_rows<2>(arguments, first);
  if (unit == 1) run_rows<1>(arguments, first);
  return unit;
}

PatchRowsArguments rows_arguments(const PatchEmbedArguments& a, uint16_t* rows) {
  return {a.pixels, a.frame_stride, a.row_stride, a.column_stride, a.channel_stride,
          a.frames, a.height,       a.width,      a.patch,         rows};
}

// rows are poisoned first: every number of them is asked for, the zeros that fill them up too
void emulate_rows(const Case& c, const Data& data) {
  const PatchEmbedArguments& a = data.arguments;
  const int64_t p = c.patch, across = c.width / p, per_frame = c.height / p * across, columns = patch_row_columns(p);
  std::vector<uint16_t> rows(c.frames * per_frame * columns, 0xffff);
  const int unit = gather(rows_arguments(a, rows.data()));
  for (int64_t i = 0; i < static_cast<int64_t>(rows.size()); ++i) {
    const int64_t row = i / columns, column = i % columns, place = row % per_frame;
    const int64_t y = place / across * p + column / (3 * p), x = place % across * p + column / 3 % p;
    const int64_t at = row / per_frame * a.frame_stride + y * a.row_stride + x * a.column_stride +
                       column % 3 * a.channel_stride;
    const double expected = column < 3 * p * p ? a.pixels[at] - kPixelCentre : 0;
    require(simt::from_half(rows[i]) == expected, "rows hold the pixels of their patches less 128");
  }
  std::printf("%s rows %d 0 0 0 0\n", c.name.c_str(), unit);
}

template <class Action>
void with_path(const PatchEmbedArguments& arguments, Action action) {
  switch (choose_path(make_problem(arguments).grid)) {
    case PixelPath::kAligned: return action(std::integral_constant<PixelPath, PixelPath::kAligned>());
    case PixelPath::kSkewed: return action(std::integral_constant<PixelPath, PixelPath::kSkewed>());
    case PixelPath::kScattered: return action(std::integral_constant<PixelPath, PixelPath::kScattered>());
  }
}

void* reserve(int64_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  require(memory != MAP_FAILED, "there are addresses for a large batch");
  return memory;
}

// the same frames behind 2^32 other bytes, their tokens behind 2^32 others: memory of zeros that is never touched
template <class SomeTile>
void emulate_far(const Case& c, Data data, const char* tile) {
  const auto near = poisoned_tokens<uint16_t>(data, TokenType::kFloat16);
  run<SomeTile, PixelPath::kAligned>(data.arguments);
  const int64_t frame_bytes = data.arguments.frame_stride, frame_tokens = near.size() / c.frames;
  const int64_t before = ceil_div(INT64_C(1) << 32, std::min(frame_bytes, frame_tokens)), frames = before + c.frames;
  auto* pixels = static_cast<uint8_t*>(reserve(frames * frame_bytes));
  auto* tokens = static_cast<uint16_t*>(reserve(frames * frame_tokens * 2));
  std::memcpy(pixels + before * frame_bytes, data.frames.data(), data.frames.size());
  data.arguments.pixels = pixels;
  data.arguments.tokens = tokens;
  data.arguments.frames = frames;
  const int64_t first = frames / SomeTile::kRows * SomeTile::kRows;  // a frame is a patch
  require(first >= before && first < frames, "the last tile is one of these frames");
  const Conflicts conflicts = run<SomeTile, PixelPath::kAligned>(data.arguments, first);
  const bool same = std::equal(tokens + first * frame_tokens, tokens + frames * frame_tokens,
                               near.data() + (first - before) * frame_tokens);
  require(same, "tokens of far frames are those of near ones");
  munmap(pixels, frames * frame_bytes);
  munmap(tokens, frames * frame_tokens * 2);
  report<SomeTile, PixelPath::kAligned>(c, tile, 0, conflicts);
}

// the same for rows: frames and rows behind 2^32 others
void emulate_far_rows(const Case& c, const Data& data) {
  const int64_t columns = patch_row_columns(c.patch), bytes = data.arguments.frame_stride;  // a frame is a patch
  const int64_t before = ceil_div(INT64_C(1) << 32, bytes), frames = before + c.frames;
  std::vector<uint16_t> near(c.frames * columns);
  gather(rows_arguments(data.arguments, near.data()));
  auto* pixels = static_cast<uint8_t*>(reserve(frames * bytes));
  auto* rows = static_cast<uint16_t*>(reserve(frames * columns * 2));
  std::memcpy(pixels + before * bytes, data.frames.data(), data.frames.size());
  PatchRowsArguments arguments = rows_arguments(data.arguments, rows);
  arguments.pixels = pixels;
  arguments.frames = frames;
  const int unit = gather(arguments, before);
  require(std::equal(near.begin(), near.end(), rows + before * columns), "rows of far frames are those of near ones");
  munmap(pixels, frames * bytes);
  munmap(rows, frames * columns * 2);
  std::printf("%s rows %d 0 0 0 0\n", c.name.c_str(), unit);
}

const Case kFar = {"far", 16, 150, 16, 16, 384};

const std::vector<Case> kCases = {
    // production shapes
    {"b32-224", 32, 3, 224, 224, 72},
    {"b16-224", 16, 1, 224, 224, 136},
    {"l14-224", 14, 1, 224, 224, 72},
    {"l14-336", 14, 1, 336, 336, 8},
    {"b32-320", 32, 1, 320, 320, 16},
    {"b16-336", 16, 1, 336, 336, 8},
    // widths around the tiles, and one that has no vectors
    {"wide", 8, 1, 16, 32, 264},
    {"narrow", 16, 2, 32, 32, 1},
    {"odd-width", 32, 2, 64, 32, 131},
    // many frames in a tile, patches of other sizes, rectangles
    {"one-patch-frames", 8, 131, 8, 8, 8},
    {"patch-8", 8, 2, 40, 56, 24},
    {"patch-7", 7, 3, 35, 63, 16},
    {"patch-1", 1, 2, 5, 9, 8},
    {"patch-48", 48, 1, 96, 144, 8},
    {"patch-20", 20, 1, 60, 100, 8},
    {"tall", 16, 1, 1040, 16, 8},
    {"flat", 14, 1, 14, 1400, 8},
    // other layouts
    {"crop", 16, 2, 64, 96, 40, 5, 6},
    {"aligned-crop", 16, 2, 64, 96, 40, 16, 16},
    {"odd-crop", 14, 2, 56, 84, 40, 3, 4},
    {"planar", 16, 2, 48, 80, 40, 0, 0, true},
    {"planar-crop", 14, 1, 42, 70, 24, 1, 2, true},
    // nothing to round
    {"exact-odd-width", 16, 2, 32, 48, 37, 0, 0, false, true},
    {"exact-aligned", 16, 2, 48, 80, 40, 0, 0, false, true},
    {"exact-skewed", 14, 2, 42, 70, 40, 1, 0, false, true},
    {"exact-scattered", 10, 2, 30, 50, 40, 0, 0, true, true},
};

template <class Value>
std::vector<Value> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<Value> values(bytes.size() / sizeof(Value));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(Value));
  return values;
}

template <class Value>
void write_file(const std::string& path, const std::vector<Value>& values) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(Value)));
}

// a problem of the caller's: files `pixels`, `weight` and `table` of a folder become the float32 file `tokens` and the
// float16 file `rows`
void run_folder(const std::string& folder, const std::vector<int64_t>& numbers) {
  const auto pixels = read_file<uint8_t>(folder + "/pixels");
  const auto weight = read_file<uint16_t>(folder + "/weight");
  const auto table = read_file<float>(folder + "/table");
  const int64_t frames = numbers.at(5), token_width = numbers.at(9);
  std::vector<float> tokens(frames * table.size());
  const PatchEmbedArguments arguments = {
      .pixels = pixels.data() + numbers.at(0),
      .frame_stride = numbers.at(1),
      .row_stride = numbers.at(2),
      .column_stride = numbers.at(3),
      .channel_stride = numbers.at(4),
      .frames = frames,
      .height = numbers.at(6),
      .width = numbers.at(7),
      .patch = numbers.at(8),
      .token_width = token_width,
      .weight = weight.data(),
      .table = table.data(),
      .tokens = tokens.data(),
      .token_type = TokenType::kFloat32,
  };
  with_path(arguments, [&](auto path) { run<SmallTile, path>(arguments); });
  write_file(folder + "/tokens", tokens);
  std::vector<uint16_t> rows(make_problem(arguments).grid.patches * patch_row_columns(arguments.patch));
  gather(rows_arguments(arguments, rows.data()));
  write_file(folder + "/rows", rows);
}

}  // namespace

int main(int count, char** names) {
  if (count > 2 && std::string(names[1]) == "--run") {
    std::vector<int64_t> numbers;
    for (int i = 3; i < count; ++i) numbers.push_back(std::stoll(names[i]));
    run_folder(names[2], numbers);
    return 0;
  }
  const auto asked = [&](const Case& c) {
    simt::running = c.name;
    return count == 1 || std::find(names + 1, names + count, c.name) != names + count;
  };
  if (asked(kFar)) {
    emulate_far<LargeTile>(kFar, make_data(kFar), "large");
    emulate_far<SmallTile>(kFar, make_data(kFar), "small");
    emulate_far_rows(kFar, make_data(kFar));
  }
  for (const Case& c : kCases) {
    if (!asked(c)) continue;
    Data data = make_data(c);
    with_path(data.arguments, [&](auto path) {
      emulate<LargeTile, path>(c, data, "large");
      emulate<SmallTile, path>(c, data, "small");
    });
    emulate_rows(c, data);
  }
}
