// Runs the threads of a block as fibers, one after the other, from barrier to barrier: what a kernel
// computes comes out the same every time.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

namespace lockstep {

struct Meeting {  // of all threads of a warp, or of a block
  int size, arrived = 0;
  long generation = 0;
};

struct Warp {
  Meeting meeting{32};
  uint32_t words[32][8];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int number;
  bool done = false;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Meeting block{0};
inline Fiber* current;
inline std::function<void()> body;
inline int group[3], grid[3], place[3];  // sizes of a block and of the grid, and this block's place

inline void meet(Meeting& meeting) {
  long generation = meeting.generation;
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    meeting.generation++;
  }
  while (meeting.generation == generation) swapcontext(&current->context, &scheduler);
}

inline int lane() { return current->number % 32; }
inline Warp& warp() { return warps[current->number / 32]; }

// Shows words to the other lanes and returns what `read` makes of everybody's.
template <typename Read>
auto exchange(std::initializer_list<uint32_t> words, Read read) {
  int i = 0;
  for (uint32_t word : words) warp().words[lane()][i++] = word;
  meet(warp().meeting);
  auto found = read(warp().words);
  meet(warp().meeting);
  return found;
}

inline void start() {
  body();
  current->done = true;
}

inline void run_block() {
  int threads = group[0] * group[1] * group[2];
  fibers.clear();
  fibers.resize(threads);
  warps.assign((threads + 31) / 32, Warp{});
  block = Meeting{threads};
  constexpr size_t STACK = 256 * 1024;
  for (int i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    fiber.number = i;
    fiber.stack.reset(new char[STACK]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, start, 0);
  }
  for (bool going = true; going;) {
    going = false;
    for (Fiber& fiber : fibers) {
      if (fiber.done) continue;
      current = &fiber;
      swapcontext(&scheduler, &fiber.context);
      going = true;
    }
  }
}

// `threads` is the size of the grid in threads, as MLX counts it.
inline void run(const int* threads, const int* group_, std::function<void()> body_) {
  body = body_;
  for (int i = 0; i < 3; i++) {
    group[i] = group_[i];
    grid[i] = (threads[i] + group_[i] - 1) / group_[i];
  }
  for (place[2] = 0; place[2] < grid[2]; place[2]++)
    for (place[1] = 0; place[1] < grid[1]; place[1]++)
      for (place[0] = 0; place[0] < grid[0]; place[0]++) run_block();
}

struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  explicit bfloat16(float x) {
    uint32_t all;
    std::memcpy(&all, &x, 4);
    bits = (all + 0x7FFF + (all >> 16 & 1)) >> 16;
  }
  operator float() const {
    uint32_t all = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &all, 4);
    return x;
  }
};

template <typename To, typename From>
To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}

}  // namespace lockstep
