// What shared.h and decode.cu need of CUDA: names, and instructions that C++ has no words for.
#define GLOBAL
#define LOCAL
#define SHARED __shared__
#define CONSTANT
#define INLINE __device__ __forceinline__
#define BARRIER __syncthreads()
#define BARRIER_ALL __syncthreads()

typedef unsigned int uint;

INLINE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Reads N words in the widest steps that their alignment allows.
template <int N>
INLINE void read_words(uint* out, const uint* in) {
  if constexpr (N % 4 == 0) {
    for (int i = 0; i < N; i += 4) {
      uint4 v = __ldcs(reinterpret_cast<const uint4*>(in + i));
      out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
    }
  } else if constexpr (N % 2 == 0) {
    for (int i = 0; i < N; i += 2) {
      uint2 v = *reinterpret_cast<const uint2*>(in + i);
      out[i] = v.x, out[i + 1] = v.y;
    }
  } else {
    for (int i = 0; i < N; i++) out[i] = in[i];
  }
}

INLINE uint bytes_of(uint a, uint b, uint selector) {
  uint y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector));
  return y;
}

// Two numbers in half precision, the first in the low bits.
INLINE uint halves_of(float low, float high) {
  uint y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// The 8 x 8 halves that a warp holds as rows, transposed.
INLINE uint transposed(uint x) {
  uint y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// c += a b with a of 16 x 16 and b of 16 x 8 halves, c in float.
INLINE void multiply_add(float* c, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

INLINE float from_lane(float x, int distance) { return __shfl_xor_sync(~0u, x, distance); }
INLINE float sum_of_lanes(float x) {
  for (int d = 1; d < 32; d *= 2) x += from_lane(x, d);
  return x;
}
INLINE float min_of_lanes(float x) {
  for (int d = 1; d < 32; d *= 2) x = min(x, from_lane(x, d));
  return x;
}
INLINE float max_of_lanes(float x) { return -min_of_lanes(-x); }
INLINE float of_lane(float x, int lane) { return __shfl_sync(~0u, x, lane); }
INLINE bool any_lane(bool x) { return __any_sync(~0u, x); }
