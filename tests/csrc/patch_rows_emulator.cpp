// Runs csrc/patch_rows_kernel.h as it stands on the host, against the pixels that it gathers.
// Built with the address and undefined-behaviour sanitizers; buffers have the exact size.
//
//   patch_rows_emulator [NAME...]              prints how much a case reads at once; fails at the first broken rule
//   patch_rows_emulator --run FOLDER NUMBER... gathers the rows of a file
#include <sys/mman.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <random>

#include "simt.h"

#include "patch_rows_kernel.h"

using namespace xclip_fast;
using simt::require;

namespace {

struct Case {
  std::string name;
  int64_t patch, frames, height, width;
  // a crop: columns and rows of the larger frame that lie before and after it
  int64_t before = 0, after = 0;
  bool planar = false;
};

struct Data {
  std::vector<uint8_t> frames;
  PatchRowsArguments arguments = {};
};

Data make_data(const Case& c) {
  std::mt19937 random(static_cast<unsigned>(c.patch * 1000 + c.width));
  const int64_t full_width = c.before + c.width + c.after, full_height = c.before + c.height + c.after;
  Data data;
  data.frames.resize(c.frames * full_height * full_width * 3);
  for (auto& byte : data.frames) byte = static_cast<uint8_t>(random());
  PatchRowsArguments& a = data.arguments;
  a.frame_stride = full_height * full_width * 3;
  a.column_stride = c.planar ? 1 : 3;
  a.row_stride = full_width * a.column_stride;
  a.channel_stride = c.planar ? full_height * full_width : 1;
  a.pixels = data.frames.data() + c.before * (a.row_stride + a.column_stride);
  a.frames = c.frames;
  a.height = c.height;
  a.width = c.width;
  a.patch = c.patch;
  return data;
}

int64_t patch_count(const PatchRowsArguments& a) { return a.frames * (a.height / a.patch) * (a.width / a.patch); }

// runs the kernel from a block on; its threads need nothing of each other
template <int kUnit>
void run(const RowsProblem& problem, int64_t first) {
  for (int64_t block = first; block < rows_blocks(problem); ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    for (threadIdx.x = 0; threadIdx.x < kRowThreads; ++threadIdx.x) patch_rows_kernel<kUnit>(problem);
  }
}

int gather(const PatchRowsArguments& arguments, int64_t first = 0) {
  const RowsProblem problem = make_rows_problem(arguments);
  const int unit = load_unit(reinterpret_cast<uintptr_t>(arguments.pixels), problem.grid);
  if (unit == 8) run<8>(problem, first);
  if (unit == 2) run<2>(problem, first);
  if (unit == 1) run<1>(problem, first);
  return unit;
}

// rows are poisoned first: every number of them is asked for, the zeros that fill them up too
void emulate(const Case& c) {
  Data data = make_data(c);
  PatchRowsArguments& a = data.arguments;
  const int64_t p = c.patch, across = c.width / p, per_frame = c.height / p * across, columns = patch_row_columns(p);
  std::vector<uint16_t> rows(patch_count(a) * columns, 0xffff);
  a.rows = rows.data();
  const int unit = gather(a);
  for (int64_t i = 0; i < static_cast<int64_t>(rows.size()); ++i) {
    const int64_t row = i / columns, column = i % columns, place = row % per_frame;
    const int64_t y = place / across * p + column / (3 * p), x = place % across * p + column / 3 % p;
    const int64_t at = row / per_frame * a.frame_stride + y * a.row_stride + x * a.column_stride +
                       column % 3 * a.channel_stride;
    const double expected = column < 3 * p * p ? a.pixels[at] - kPixelCentre : 0;
    require(simt::from_half(rows[i]) == expected, "rows hold the pixels of their patches less 128");
  }
  std::printf("%s %d\n", c.name.c_str(), unit);
}

void* reserve(int64_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  require(memory != MAP_FAILED, "there are addresses for a large batch");
  return memory;
}

// the same frames behind 2^32 other bytes, their rows behind 2^32 others: memory of zeros that is never touched
void emulate_far(const Case& c) {
  Data data = make_data(c);
  PatchRowsArguments& a = data.arguments;
  const int64_t columns = patch_row_columns(c.patch), bytes = a.frame_stride;  // a frame is a patch, and a block
  const int64_t before = ceil_div(INT64_C(1) << 32, bytes), frames = before + c.frames;
  std::vector<uint16_t> near(c.frames * columns);
  a.rows = near.data();
  gather(a);
  auto* pixels = static_cast<uint8_t*>(reserve(frames * bytes));
  auto* rows = static_cast<uint16_t*>(reserve(frames * columns * 2));
  std::memcpy(pixels + before * bytes, data.frames.data(), data.frames.size());
  a.pixels = pixels;
  a.rows = rows;
  a.frames = frames;
  const int unit = gather(a, before);
  require(std::equal(near.begin(), near.end(), rows + before * columns), "rows of far frames are those of near ones");
  munmap(pixels, frames * bytes);
  munmap(rows, frames * columns * 2);
  std::printf("%s %d\n", c.name.c_str(), unit);
}

const Case kFar = {"far", 16, 150, 16, 16};

const std::vector<Case> kCases = {
    // production shapes
    {"b32-224", 32, 3, 224, 224},
    {"b16-224", 16, 1, 224, 224},
    {"l14-224", 14, 1, 224, 224},
    {"l14-336", 14, 1, 336, 336},
    {"b32-320", 32, 1, 320, 320},
    // patches of other sizes, one patch a frame, rectangles
    {"one-patch-frames", 8, 131, 8, 8},
    {"patch-8", 8, 2, 40, 56},
    {"patch-7", 7, 3, 35, 63},
    {"patch-1", 1, 2, 5, 9},
    {"patch-48", 48, 1, 96, 144},
    {"patch-20", 20, 1, 60, 100},
    {"tall", 16, 1, 1040, 16},
    {"flat", 14, 1, 14, 1400},
    // other layouts
    {"crop", 16, 2, 64, 96, 5, 6},
    {"even-crop", 14, 2, 42, 70, 2, 2},
    {"aligned-crop", 16, 2, 64, 96, 16, 16},
    {"odd-crop", 14, 2, 56, 84, 3, 4},
    {"planar", 16, 2, 48, 80, 0, 0, true},
    {"planar-crop", 14, 1, 42, 70, 1, 2, true},
};

// a problem of the caller's: the file `pixels` of a folder becomes the float16 file `rows`
void run_folder(const std::string& folder, const std::vector<int64_t>& numbers) {
  std::ifstream file(folder + "/pixels", std::ios::binary);
  const std::vector<char> pixels{std::istreambuf_iterator<char>(file), {}};
  PatchRowsArguments arguments = {
      .pixels = reinterpret_cast<const uint8_t*>(pixels.data()),
      .frame_stride = numbers.at(0),
      .row_stride = numbers.at(1),
      .column_stride = numbers.at(2),
      .channel_stride = numbers.at(3),
      .frames = numbers.at(4),
      .height = numbers.at(5),
      .width = numbers.at(6),
      .patch = numbers.at(7),
      .rows = nullptr,
  };
  std::vector<uint16_t> rows(patch_count(arguments) * patch_row_columns(arguments.patch));
  arguments.rows = rows.data();
  gather(arguments);
  std::ofstream(folder + "/rows", std::ios::binary)
      .write(reinterpret_cast<const char*>(rows.data()), static_cast<std::streamsize>(2 * rows.size()));
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
  if (asked(kFar)) emulate_far(kFar);
  for (const Case& c : kCases) {
    if (asked(c)) emulate(c);
  }
}
