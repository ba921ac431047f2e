// What kernels/metal.h gives a kernel, in C++: Metal's names, computed lane by lane.
#include <algorithm>
#include <cmath>

#include "lockstep.h"

#define device
#define constant
#define thread
#define threadgroup static
#define GLOBAL device
#define LOCAL thread
#define SHARED static
#define CONSTANT constant
#define INLINE inline
#define BARRIER lockstep::meet(lockstep::block)
#define BARRIER_ALL lockstep::meet(lockstep::block)

typedef unsigned int uint;
typedef lockstep::bfloat16 bfloat16_t;
typedef _Float16 half;
using std::max;
using std::min;
using std::rint;

struct uint3 {
  uint x, y, z;
};
inline uint3 three(const int* v) { return {uint(v[0]), uint(v[1]), uint(v[2])}; }
// Metal hands a kernel those of these that its source names.
inline uint3 get_thread_position_in_threadgroup() { return {uint(lockstep::current->number), 0, 0}; }
inline uint3 get_thread_position_in_grid() {
  return {uint(lockstep::place[0] * lockstep::group[0] + lockstep::current->number), 0, 0};
}
inline uint3 get_threadgroup_position_in_grid() { return three(lockstep::place); }
inline uint3 get_threadgroups_per_grid() { return three(lockstep::grid); }
inline uint get_thread_index_in_simdgroup() { return lockstep::lane(); }
inline uint get_simdgroup_index_in_threadgroup() { return lockstep::current->number / 32; }

inline float exp2_fast(float x) { return std::exp2(x); }

template <int N>
void read_words(uint* out, const uint* in) {
  for (int i = 0; i < N; i++) out[i] = in[i];
}

template <typename Join>
float of_lanes(float x, Join join) {
  return lockstep::exchange({lockstep::same_bits<uint32_t>(x)}, [=](uint32_t (*all)[8]) {
    float found = lockstep::same_bits<float>(all[0][0]);
    for (int i = 1; i < 32; i++) found = join(found, lockstep::same_bits<float>(all[i][0]));
    return found;
  });
}
inline float sum_of_lanes(float x) {
  return of_lanes(x, [](float a, float b) { return a + b; });
}
inline float min_of_lanes(float x) {
  return of_lanes(x, [](float a, float b) { return min(a, b); });
}
inline float max_of_lanes(float x) {
  return of_lanes(x, [](float a, float b) { return max(a, b); });
}
inline float simd_sum(float x) { return sum_of_lanes(x); }
inline float of_lane(float x, int other) {
  return lockstep::exchange({lockstep::same_bits<uint32_t>(x)}, [=](uint32_t (*all)[8]) {
    return lockstep::same_bits<float>(all[other][0]);
  });
}
