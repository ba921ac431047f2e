// What shared.h and decode_metal.h need of Metal.
#include <metal_stdlib>
#include <metal_simdgroup>
using namespace metal;

#define GLOBAL device
#define LOCAL thread
#define SHARED threadgroup
#define CONSTANT constant
#define INLINE inline
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
#define BARRIER_ALL threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup)

inline float exp2_fast(float x) { return fast::exp2(x); }

template <int N>
inline void read_words(thread uint* out, device const uint* in) {
  for (int i = 0; i < N; i++) out[i] = in[i];
}

inline float sum_of_lanes(float x) { return simd_sum(x); }
inline float min_of_lanes(float x) { return simd_min(x); }
inline float max_of_lanes(float x) { return simd_max(x); }
inline float of_lane(float x, int lane) { return simd_shuffle(x, ushort(lane)); }
