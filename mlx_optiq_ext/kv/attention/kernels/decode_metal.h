// Flash decoding by SIMD groups. A lane holds 1/32 of a head; a SIMD group takes every WARPS-th token
// of a split, unpacks its keys and values once for all queries of a key/value head, and sums scores
// over its lanes.

constexpr constant int K_CHUNK = K_DIM / 32, V_CHUNK = V_DIM / 32;
// Rows of queries that a threadgroup holds.
constexpr constant int HELD = ROWS < 8 * TILES ? ROWS : 8 * TILES;

// What a code stands for, before the norm.
template <int BITS>
INLINE float level_of(uint code, constant const float* levels) {
  float level = levels[code & ((1u << (BITS - 1)) - 1)];
  return code >> (BITS - 1) ? -level : level;
}

// This lane's elements of one row. A group may end among them where a head is no power of two.
template <int BITS, int DIM, int GROUP, bool CODEBOOK>
INLINE void unpack(
    thread float* out, device const uint* codes, device const T* scales, device const T* biases,
    constant const float* levels, int lane) {
  constexpr int CHUNK = DIM / 32;
  Codes<BITS, CHUNK> found;
  found.load(codes, lane * CHUNK, DIM * BITS / 32 - 1);
  for (int i = 0; i < CHUNK; i++) {
    int group = CODEBOOK ? 0 : (lane * CHUNK + (GROUP % CHUNK ? i : 0)) / GROUP;
    float scale = float(scales[group]);
    if (CODEBOOK)
      out[i] = scale * level_of<BITS>(found.at(i), levels);
    else
      out[i] = scale * float(found.at(i)) + float(biases[group]);
  }
}
