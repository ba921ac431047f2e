// What kernels/cuda.h gives a kernel, in C++: the same names, computed lane by lane.
#include <algorithm>
#include <cmath>

#include "lockstep.h"

#define GLOBAL
#define LOCAL
#define SHARED static
#define CONSTANT
#define INLINE inline
#define BARRIER lockstep::meet(lockstep::block)
#define BARRIER_ALL lockstep::meet(lockstep::block)
#define __shared__ static

typedef unsigned int uint;
typedef lockstep::bfloat16 __nv_bfloat16;
typedef _Float16 __half;
using std::max;
using std::min;
using std::rint;

struct uint2 {
  uint x, y;
};
struct Index {
  int x, y, z;
};
#define threadIdx (Index{lockstep::current->number, 0, 0})
#define blockIdx (Index{lockstep::place[0], lockstep::place[1], lockstep::place[2]})
#define blockDim (Index{lockstep::group[0], lockstep::group[1], lockstep::group[2]})
#define gridDim (Index{lockstep::grid[0], lockstep::grid[1], lockstep::grid[2]})

inline float exp2_fast(float x) { return std::exp2(x); }

template <int N>
void read_words(uint* out, const uint* in) {
  // An address that the device would not take must not pass here.
  constexpr int WIDTH = N % 4 == 0 ? 16 : N % 2 == 0 ? 8 : 4;
  if (reinterpret_cast<uintptr_t>(in) % WIDTH) std::abort();
  for (int i = 0; i < N; i++) out[i] = in[i];
}

inline uint bytes_of(uint a, uint b, uint selector) {
  uint64_t all = uint64_t(b) << 32 | a;
  uint y = 0;
  for (int i = 0; i < 4; i++) {
    uint nibble = selector >> 4 * i & 15, byte = all >> 8 * (nibble & 7) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    y |= byte << 8 * i;
  }
  return y;
}

inline float low_of(uint x) { return lockstep::same_bits<_Float16>(uint16_t(x)); }
inline float high_of(uint x) { return low_of(x >> 16); }
inline uint halves_of(float low, float high) {
  return lockstep::same_bits<uint16_t>(_Float16(low)) |
         uint(lockstep::same_bits<uint16_t>(_Float16(high))) << 16;
}
inline uint transposed(uint x) {
  int row = lockstep::lane() / 4, column = lockstep::lane() % 4 * 2;
  return lockstep::exchange({x}, [=](uint32_t (*all)[8]) {
    auto at = [&](int r, int c) { return all[4 * r + c / 2][0] >> c % 2 * 16 & 0xFFFF; };
    return at(column, row) | at(column + 1, row) << 16;
  });
}

inline void multiply_add(float* c, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  int quad = lockstep::lane() / 4, part = lockstep::lane() % 4;
  lockstep::exchange({a0, a1, a2, a3, b0, b1}, [=](uint32_t (*all)[8]) {
    auto half = [](uint word, int which) { return which ? high_of(word) : low_of(word); };
    auto a = [&](int r, int k) { return half(all[4 * (r % 8) + k % 8 / 2][r / 8 + k / 8 * 2], k % 2); };
    auto b = [&](int k, int n) { return half(all[4 * n + k % 8 / 2][4 + k / 8], k % 2); };
    for (int i = 0; i < 4; i++) {
      double sum = c[i];
      for (int k = 0; k < 16; k++) sum += a(quad + i / 2 * 8, k) * b(k, 2 * part + i % 2);
      c[i] = float(sum);
    }
    return 0;
  });
}

inline float of_lane(float x, int other) {
  return lockstep::exchange({lockstep::same_bits<uint32_t>(x)}, [=](uint32_t (*all)[8]) {
    return lockstep::same_bits<float>(all[other][0]);
  });
}

inline float from_lane(float x, int distance) { return of_lane(x, lockstep::lane() ^ distance); }

inline float sum_of_lanes(float x) {
  for (int d = 1; d < 32; d *= 2) x += from_lane(x, d);
  return x;
}
inline float min_of_lanes(float x) {
  for (int d = 1; d < 32; d *= 2) x = min(x, from_lane(x, d));
  return x;
}
inline float max_of_lanes(float x) { return -min_of_lanes(-x); }

inline bool any_lane(bool x) {
  return lockstep::exchange({x}, [](uint32_t (*all)[8]) {
    bool any = false;
    for (int i = 0; i < 32; i++) any |= all[i][0] != 0;
    return any;
  });
}
