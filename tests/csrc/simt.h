// A GPU on the host: runs a block of threads of patch_embed_kernel.h as fibers, with the functions that
// patch_embed_device.h has for a GPU. Asynchronous copies land as late as they may, matrix fragments lie as the PTX
// manual lays them out, and every word of shared memory knows who wrote and read it since which barrier: a missing
// barrier, a group of copies not waited for, or a stage loaded over too soon is an error in any order of the threads.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "patch_embed_cuda.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

struct Place {
  unsigned x;
};
inline Place threadIdx, blockIdx;

namespace simt {

inline std::string running;  // what a broken rule is reported of

inline void require(bool holds, const char* rule) {
  if (holds) return;
  std::printf("%s: broken rule: %s\n", running.c_str(), rule);
  std::exit(1);
}

// float16 of a value that is not too large for it, rounded to nearest
inline uint16_t to_half(double value) {
  const double magnitude = std::fabs(value);
  const int exponent = magnitude == 0 ? -14 : std::max(std::ilogb(magnitude), -14);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // 1024..2048 when normal
  return static_cast<uint16_t>((std::signbit(value) ? 0x8000 : 0) | (((exponent + 14) << 10) + steps));
}

inline const std::vector<float> kHalves = [] {
  std::vector<float> values(65536);
  for (int i = 0; i < 65536; ++i) {
    const int exponent = i >> 10 & 31, fraction = i & 1023;
    const double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    values[i] = static_cast<float>(exponent == 31 ? NAN : i & 0x8000 ? -magnitude : magnitude);
  }
  return values;
}();

inline float from_half(uint32_t bits) { return kHalves[bits & 0xffff]; }

inline uint16_t to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// how often the worst bank is asked for when lanes load a word each
inline int bank_conflicts(std::array<int, 32> addresses) {
  for (int& address : addresses) address /= 4;
  std::sort(addresses.begin(), addresses.end());
  const auto end = std::unique(addresses.begin(), addresses.end());
  std::array<int, 32> banks = {};
  for (auto word = addresses.begin(); word != end; ++word) ++banks[*word % 32];
  return *std::max_element(banks.begin(), banks.end());
}

struct Word {
  enum State : uint8_t { kUnwritten, kInFlight, kWritten } state = kUnwritten;
  int writer = -1, begun = -1, written = -1;  // thread, and the barriers passed when a write began and ended
  int reader = -1, read = -1;                 // -2 is more than one
};

struct Copy {
  int at;
  std::array<uint8_t, 16> bytes;
};

struct Product {
  float* sums;
  std::array<uint32_t, 4> a;
  std::array<uint32_t, 2> b;
};

// What a lane has asked for since its warp last met: a warp does it together.
struct Lane {
  std::vector<int> loads;      // addresses of words
  std::vector<Copy> matrices;  // rows it named, and what they held
  std::vector<Product> products;
};

enum class At { kStart, kBarrier, kWarp, kDone };

class Block {
 public:
  Block(int threads, int shared_bytes)
      : memory_(shared_bytes / 16), words_(shared_bytes / 4), fibers_(threads), lanes_(threads) {
    std::memset(memory(), 0xff, shared_bytes);
  }

  uint8_t* memory() { return reinterpret_cast<uint8_t*>(memory_.data()); }

  int pixel_conflicts = 0, weight_conflicts = 0;

  void run(const std::function<void()>& kernel);
  void yield(At at);  // the running thread gives way to the others

  void begin_copy(uint8_t* destination, const void* source, int bytes) {
    const Copy copy{address(destination, 16), {}};
    require(reinterpret_cast<uintptr_t>(source) % 16 == 0, "copies are 16-byte aligned");
    for (int word = copy.at / 4; word < copy.at / 4 + 4; ++word) begin_write(words_[word], Word::kInFlight);
    fibers_[current_].open.push_back(copy);
    std::memcpy(fibers_[current_].open.back().bytes.data(), source, bytes);
  }

  void end_of_copies() {
    Fiber& fiber = fibers_[current_];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
  }

  void wait_for_copies(int in_flight) {
    auto& groups = fibers_[current_].groups;
    for (; static_cast<int>(groups.size()) > in_flight; groups.pop_front()) {
      for (const Copy& copy : groups.front()) {
        std::memcpy(memory() + copy.at, copy.bytes.data(), 16);
        for (int word = copy.at / 4; word < copy.at / 4 + 4; ++word) {
          words_[word].state = Word::kWritten;
          words_[word].written = barriers_;
        }
      }
    }
  }

  uint32_t load(const uint8_t* place) {
    lanes_[current_].loads.push_back(address(place, 4));
    read(words_[lanes_[current_].loads.back() / 4], current_);
    uint32_t value;
    std::memcpy(&value, place, 4);
    return value;
  }

  void store(uint8_t* place, uint32_t value) {
    begin_write(words_[address(place, 4) / 4], Word::kWritten);
    std::memcpy(place, &value, 4);
  }

  // the values are those of rows that other lanes name: registers only say which, until the warp meets
  void load_matrices(uint32_t (&matrices)[4], const uint8_t* row) {
    auto& named = lanes_[current_].matrices;
    for (size_t i = 0; i < 4; ++i) matrices[i] = static_cast<uint32_t>(4 * named.size() + i);
    named.push_back({address(row, 16), {}});
    for (int word = named.back().at / 4; word < named.back().at / 4 + 4; ++word) read(words_[word], kMany);
    std::memcpy(named.back().bytes.data(), row, 16);
  }

  void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
    lanes_[current_].products.push_back({sums, {a[0], a[1], a[2], a[3]}, {b_low, b_high}});
  }

 private:
  static constexpr size_t kStack = 128 * 1024;
  static constexpr int kMany = -2;

  struct alignas(16) Sixteen {
    uint8_t bytes[16];
  };

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    At at = At::kStart;
    void* fake_stack = nullptr;  // of the address sanitizer
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
  };

  int address(const uint8_t* place, int alignment) {
    const int64_t at = place - memory();
    require(at >= 0 && at + alignment <= static_cast<int64_t>(16 * memory_.size()), "shared memory ends here");
    require(at % alignment == 0, "shared memory is read and written aligned");
    return static_cast<int>(at);
  }

  void begin_write(Word& word, Word::State state) {
    require(word.state != Word::kInFlight && word.begun != barriers_, "a word is written once between two barriers");
    require(word.read != barriers_ || word.reader == current_, "a word is not written while others may read it");
    word.state = state;
    word.writer = current_;
    word.begun = word.written = barriers_;
  }

  void read(Word& word, int reader) {
    require(word.state == Word::kWritten, "a word that is read was written, and its copy waited for");
    require(word.written < barriers_ || word.writer == reader, "a barrier stands between a write and others' reads");
    word.reader = word.read == barriers_ && word.reader != reader ? kMany : reader;
    word.read = barriers_;
  }

  static void enter();
  At advance(int thread);
  void meet(int warp);
  void multiply_all(const Lane* lanes, size_t index);

  std::vector<Sixteen> memory_;
  std::vector<Word> words_;
  std::vector<Fiber> fibers_;
  std::vector<Lane> lanes_;
  const std::function<void()>* kernel_ = nullptr;
  ucontext_t scheduler_;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
  int current_ = 0;
  int barriers_ = 0;
};

inline Block* block;  // the one that runs
// the address sanitizer follows changes of the stack when told
#ifdef __SANITIZE_ADDRESS__
inline void leave(void** fake, const void* stack, size_t size) { __sanitizer_start_switch_fiber(fake, stack, size); }
inline void arrive(void* fake, const void** stack, size_t* size) { __sanitizer_finish_switch_fiber(fake, stack, size); }
#else
inline void leave(void**, const void*, size_t) {}
inline void arrive(void*, const void**, size_t*) {}
#endif

inline void Block::enter() {
  arrive(nullptr, &block->scheduler_stack_, &block->scheduler_size_);
  (*block->kernel_)();
  block->yield(At::kDone);
}

inline void Block::yield(At at) {
  Fiber& fiber = fibers_[current_];
  fiber.at = at;
  leave(at == At::kDone ? nullptr : &fiber.fake_stack, scheduler_stack_, scheduler_size_);
  swapcontext(&fiber.context, &scheduler_);
  arrive(fiber.fake_stack, &scheduler_stack_, &scheduler_size_);
}

inline At Block::advance(int thread) {
  Fiber& fiber = fibers_[thread];
  current_ = thread;
  threadIdx.x = static_cast<unsigned>(thread);
  leave(&scheduler_fake_stack_, fiber.stack.get(), kStack);
  swapcontext(&scheduler_, &fiber.context);
  arrive(scheduler_fake_stack_, nullptr, nullptr);
  return fiber.at;
}

inline void Block::run(const std::function<void()>& kernel) {
  block = this;
  kernel_ = &kernel;
  for (Fiber& fiber : fibers_) {
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, &Block::enter, 0);
  }
  const int threads = static_cast<int>(fibers_.size());
  for (At first = At::kStart; first != At::kDone;) {
    first = advance(0);
    for (int thread = 1; thread < threads; ++thread) require(advance(thread) == first, "all threads meet at a barrier");
    for (int warp = 0; warp < threads / 32; ++warp) meet(warp);
    barriers_ += first == At::kBarrier;
  }
  for (const Fiber& fiber : fibers_) {
    for (const auto& group : fiber.groups) require(group.empty(), "no copy is under way at the end");
  }
}

// does what the lanes of a warp have asked for
inline void Block::meet(int warp) {
  Lane* lanes = &lanes_[32 * warp];
  for (int lane = 1; lane < 32; ++lane) {
    const bool same = lanes[lane].loads.size() == lanes[0].loads.size() &&
                      lanes[lane].matrices.size() == lanes[0].matrices.size() &&
                      lanes[lane].products.size() == lanes[0].products.size();
    require(same, "the lanes of a warp ask for the same");
  }
  std::array<int, 32> asked;
  for (size_t i = 0; i < lanes[0].loads.size(); ++i) {
    for (int lane = 0; lane < 32; ++lane) asked[lane] = lanes[lane].loads[i];
    pixel_conflicts = std::max(pixel_conflicts, bank_conflicts(asked));
  }
  for (size_t i = 0; i < lanes[0].matrices.size(); ++i) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int lane = 0; lane < 32; ++lane) asked[lane] = lanes[8 * matrix + lane / 4].matrices[i].at + lane % 4 * 4;
      weight_conflicts = std::max(weight_conflicts, bank_conflicts(asked));
    }
  }
  for (size_t i = 0; i < lanes[0].products.size(); ++i) multiply_all(lanes, i);
  for (int lane = 0; lane < 32; ++lane) {
    lanes[lane].loads.clear();
    lanes[lane].matrices.clear();
    lanes[lane].products.clear();
  }
}

// plain sums of arrays, not worth the sanitizers' time
__attribute__((no_sanitize("address", "undefined"))) inline void Block::multiply_all(const Lane* lanes, size_t index) {
  float a[16][16], b[16][8], sums[16][8] = {};
  for (int lane = 0; lane < 32; ++lane) {
    const Product& product = lanes[lane].products[index];
    // registers 0 and 1 of A are columns 2t, 2t + 1 of rows g and g + 8; registers 2 and 3 are those eight columns on
    for (int i = 0; i < 4; ++i) {
      a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8] = from_half(product.a[i]);
      a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + 1] = from_half(product.a[i] >> 16);
    }
    // registers 0 and 1 of B are k = 2t, 2t + 1 of column g, and those eight on; ldmatrix gives a lane values 2t and
    // 2t + 1 of row g of a matrix, which lane 8 * matrix + g has named
    for (int i = 0; i < 2; ++i) {
      const Lane& namer = lanes[product.b[i] % 4 * 8 + lane / 4];
      uint32_t pair;
      std::memcpy(&pair, namer.matrices[product.b[i] / 4].bytes.data() + lane % 4 * 4, 4);
      b[lane % 4 * 2 + 8 * i][lane / 4] = from_half(pair);
      b[lane % 4 * 2 + 8 * i + 1][lane / 4] = from_half(pair >> 16);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sums[row][column] += a[row][k] * b[k][column];
    }
  }
  // sums 0 and 1 are columns 2t, 2t + 1 of row g, sums 2 and 3 those of row g + 8
  for (int lane = 0; lane < 32; ++lane) {
    float* lane_sums = lanes[lane].products[index].sums;
    for (int i = 0; i < 4; ++i) lane_sums[i] += sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace simt

inline void __syncthreads() { simt::block->yield(simt::At::kBarrier); }
inline void __syncwarp() { simt::block->yield(simt::At::kWarp); }

// byte i of the result is the byte of high:low that nibble i of the selector names
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(both >> (selector >> (4 * i) & 7) * 8 & 255) << (8 * i);
  return result;
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

namespace xclip_fast {

inline uint8_t* block_memory() { return simt::block->memory(); }
inline uint32_t load_shared(const uint8_t* word) { return simt::block->load(word); }
inline void store_shared(uint8_t* word, uint32_t value) { simt::block->store(word, value); }

inline void copy_16_bytes(uint8_t* destination, const void* source, int bytes = 16) {
  simt::block->begin_copy(destination, source, bytes);
}

inline void end_of_copies() { simt::block->end_of_copies(); }
template <int kInFlight>
inline void wait_for_copies() {
  simt::block->wait_for_copies(kInFlight);
}

inline void load_matrices(uint32_t (&matrices)[4], const uint8_t* row) { simt::block->load_matrices(matrices, row); }

inline void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high) {
  simt::block->multiply(sums, a, b_low, b_high);
}

inline uint32_t pair_less(uint32_t pair, float value) {
  const uint32_t high = simt::to_half(simt::from_half(pair >> 16) - value);
  return high << 16 | simt::to_half(simt::from_half(pair) - value);
}

inline uint32_t rounded_pair(TokenType type, float first, float second) {
  if (type == TokenType::kFloat16) return static_cast<uint32_t>(simt::to_half(second)) << 16 | simt::to_half(first);
  return static_cast<uint32_t>(simt::to_bfloat(second)) << 16 | simt::to_bfloat(first);
}

}  // namespace xclip_fast
