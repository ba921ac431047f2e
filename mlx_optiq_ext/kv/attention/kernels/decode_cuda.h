// Flash decoding on tensor cores. A warp takes 16 tokens at a time: scores = K Q' with the tokens as
// rows of the product, output = V' P' with the head dimension as rows, so that packed data is always
// the left factor, goes from memory into the registers that hold it, and is read once for all
// queries of a key/value head. Lane = 4 * quad + part.
//
// Affine codes are never converted: a code in the low bits of a half *is* a number, code * 2^-24, and
// tensor cores take such subnormal numbers exactly. What is left is one mask for two codes. A group's
// scale multiplies its scores, or its tokens' weights; biases are products of their own.

// MLX writes a kernel's signature, so that its launch bounds have no other place. Sums of up to 128
// elements leave room for two blocks on a multiprocessor.
constexpr int RESIDENT = TILES * (K_DIM > V_DIM ? K_DIM : V_DIM) <= 128 ? 2 : 1;
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(WARPS * 32, RESIDENT)

// Of up to eight levels in half precision the low bytes, then the high ones.
struct Levels {
  uint bytes[4];
};

// The maximum of a softmax may lag behind by so much (a power of two) before all is scaled anew.
constexpr float SLACK = 4.0f;

constexpr int K_CHUNK = K_GROUP / 4, K_GROUPS = K_DIM / K_GROUP, K_WIDTH = K_DIM * K_BITS / 32;
constexpr int V_CHUNK = V_GROUP / 8, V_GROUPS = V_DIM / V_GROUP, V_WIDTH = V_DIM * V_BITS / 32;
constexpr int V_TILES = V_DIM / 16, STEPS = K_DIM / 16, STEPS_OF_GROUP = K_GROUP / 16;
constexpr float SUBNORMAL = 16777216.0f;
constexpr float K_UNIT = K_CODEBOOK ? 1.0f : SUBNORMAL, V_UNIT = V_CODEBOOK ? 1.0f : SUBNORMAL;
// The warps' outputs meet in shared memory, so many codes of a lane at a time; the padding keeps lanes
// off each other's banks.
constexpr int V_PARTS = V_DIM > 128 ? 2 : 1, V_CODES = V_DIM / 8 / V_PARTS;
constexpr int PART_STRIDE = 8 * V_CODES + 4;

// The bit of its half at which the i-th of four codes is left: ten bits of a half are a number, so
// that only what lies above has to be shifted.
INLINE constexpr int place_of(int bits, bool codebook, int i) {
  if (codebook || bits == 8 || bits == 6) return 0;
  if (bits == 5) return i % 2 * 5;
  if (bits == 4) return i % 2 * 4;
  return i * bits + bits <= 10 ? i * bits : 0;
}

// Four codes each of two spans, side by side: pairs (low[i], high[i]) as halves. Of a whole word of
// four-bit codes `high` is its upper half.
template <int BITS, bool CODEBOOK, bool WORD>
INLINE void pairs_of(uint low, uint high, Levels levels, uint* out) {
  constexpr uint MASK = ((1u << BITS) - 1) * 0x00010001u;
  if constexpr (CODEBOOK) {
    // One code a nibble: the level's number below, the sign on top.
    if constexpr (BITS < 4) {
      uint l = 0, h = 0;
      for (int i = 0; i < 4; i++) {
        l |= ((low >> (BITS * i)) & (MASK & 0xFF)) << (4 * i);
        h |= ((high >> (BITS * i)) & (MASK & 0xFF)) << (4 * i);
      }
      low = l, high = h;
    }
    uint codes = WORD && BITS == 4 ? low : bytes_of(low, high, 0x5410);
    uint numbers = codes & ((((1u << BITS) - 1) >> 1) * 0x11111111u);
    uint low_ends = bytes_of(levels.bytes[0], levels.bytes[1], numbers);
    uint low_tops = bytes_of(levels.bytes[2], levels.bytes[3], numbers);
    uint high_ends = bytes_of(levels.bytes[0], levels.bytes[1], numbers >> 16);
    uint high_tops = bytes_of(levels.bytes[2], levels.bytes[3], numbers >> 16);
    for (int i = 0; i < 2; i++) {
      uint one = bytes_of(low_ends, low_tops, i ? 0x7362 : 0x5140);
      uint other = bytes_of(high_ends, high_tops, i ? 0x7362 : 0x5140);
      for (int j = 0; j < 2; j++) {
        uint sign = codes << (16 - BITS - 4 * (2 * i + j));
        out[2 * i + j] = bytes_of(one, other, j ? 0x7632 : 0x5410) ^ (sign & 0x80008000u);
      }
    }
  } else if constexpr (BITS == 8) {
    for (int i = 0; i < 2; i++) {
      uint both = bytes_of(low, high, i ? 0x7632 : 0x5410);
      out[2 * i] = both & MASK;
      out[2 * i + 1] = bytes_of(both, 0, 0x4341);
    }
  } else if constexpr (BITS <= 4) {
    uint both = WORD && BITS == 4 ? low : bytes_of(low, high, 0x5410);
    for (int i = 0; i < 4; i++) {
      int place = place_of(BITS, false, i);
      out[i] = (both >> (BITS * i - place)) & (MASK << place);
    }
  } else {
    for (int i = 0; i < 4; i += 2) {
      uint both = bytes_of(low >> (BITS * i), high >> (BITS * i), 0x5410);
      int place = place_of(BITS, false, i + 1);
      out[i] = both & MASK;
      out[i + 1] = (both >> (BITS - place)) & (MASK << place);
    }
  }
}

// A row's scales, in one load where their number allows.
template <int N>
struct alignas(N == 8 ? 16 : N == 4 ? 8 : N == 2 ? 4 : 2) Values {
  T v[N];
};

// Keys or values of a head. Rows mostly follow each other without gaps: then their distance is known
// to the compiler, and addresses cost nothing.
template <bool DENSE, int WIDTH, int GROUPS>
struct Source {
  const uint* codes;
  const T *scales, *biases;
  long row, scale_row, bias_row;

  INLINE const uint* codes_of(long token) const { return codes + token * (DENSE ? WIDTH : row); }
  INLINE Values<GROUPS> scales_of(long token) const {
    return *reinterpret_cast<const Values<GROUPS>*>(scales + token * (DENSE ? GROUPS : scale_row));
  }
  INLINE Values<GROUPS> biases_of(long token) const {
    return *reinterpret_cast<const Values<GROUPS>*>(biases + token * (DENSE ? GROUPS : bias_row));
  }
};

// Sixteen tokens: this lane's codes of ROWS of them, and the scales of tokens `quad` and `quad + 8`.
template <int ROWS_, int BITS, int CHUNK, int GROUPS, bool CODEBOOK>
struct Tile {
  enum { LANES = ROWS_ == 2 ? 4 : 8 };  // that share a group of a row
  Codes<BITS, CHUNK> codes[ROWS_][GROUPS];
  Values<GROUPS> scales[2], biases[2];

  // `token(i)` is the i-th row of codes, `lane` this lane's place in a group.
  template <typename S, typename F>
  INLINE void load(const S& in, int start, int quad, int lane, F token) {
#pragma unroll
    for (int r = 0; r < ROWS_; r++)
#pragma unroll
      for (int g = 0; g < GROUPS; g++)
        codes[r][g].load(
            in.codes_of(start + token(r)), (g * LANES + lane) * CHUNK,
            GROUPS * LANES * CHUNK * BITS / 32 - 1);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      scales[r] = in.scales_of(start + quad + 8 * r);
      if constexpr (!CODEBOOK) biases[r] = in.biases_of(start + quad + 8 * r);
    }
  }
};

using Keys = Tile<2, K_BITS, K_CHUNK, K_GROUPS, K_CODEBOOK>;
using Vectors = Tile<4, V_BITS, V_CHUNK, V_GROUPS, V_CODEBOOK>;

template <typename S>
INLINE void load_keys(Keys& out, const S& in, int start, int quad, int part) {
  out.load(in, start, quad, part, [=](int r) { return quad + 8 * r; });
}

template <typename S>
INLINE void load_values(Vectors& out, const S& in, int start, int quad, int part) {
  out.load(in, start, quad, quad, [=](int r) { return 2 * part + (r & 1) + 8 * (r >> 1); });
}

// The queries' share of a product, out of a lane's part of a group, in the order in which pairs_of
// puts the keys.
INLINE void query_pair(const float* chunk, int step, uint* out) {
  int first = step / 2 * 8 + step % 2 * 2;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float unit = 1.0f / (1 << place_of(K_BITS, K_CODEBOOK, step % 2 * 2 + i));
    out[i] = halves_of(unit * chunk[first + i], unit * chunk[first + i + 4]);
  }
}

// Scores of sixteen tokens, in units of K_UNIT: [tile][token, token + 8][query, query + 1].
INLINE void score(
    float (*out)[4], const Keys& keys, const uint (*query)[STEPS][2], const float (*sums)[2]) {
#pragma unroll
  for (int n = 0; n < TILES; n++)
    for (int i = 0; i < 4; i++) out[n][i] = 0.0f;
#pragma unroll
  for (int g = 0; g < K_GROUPS; g++) {
    float found[TILES][4] = {};
#pragma unroll
    for (int u = 0; u < K_CHUNK / 8; u++) {
      uint pairs[2][4];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const auto& codes = keys.codes[r][g];
        pairs_of<K_BITS, K_CODEBOOK, true>(codes.from(8 * u), codes.from(8 * u + 4), K_LEVELS, pairs[r]);
      }
#pragma unroll
      for (int s = 0; s < 2; s++)
#pragma unroll
        for (int n = 0; n < TILES; n++) {
          const uint* q = query[n][g * STEPS_OF_GROUP + 2 * u + s];
          multiply_add(
              found[n], pairs[0][2 * s], pairs[1][2 * s], pairs[0][2 * s + 1], pairs[1][2 * s + 1],
              q[0], q[1]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          out[n][2 * r + i] += float(keys.scales[r].v[g]) * found[n][2 * r + i];
          if constexpr (!K_CODEBOOK)
            out[n][2 * r + i] += float(keys.biases[r].v[g]) * sums[n * K_GROUPS + g][i];
        }
  }
}

// output += V' P', in units of V_UNIT; `weights` are the tokens' exponentials as `score` puts them.
INLINE void weigh(float (*out)[V_TILES][4], const Vectors& values, const float (*weights)[4]) {
#pragma unroll
  for (int g = 0; g < V_GROUPS; g++) {
    uint scaled[TILES][2], biased[TILES][2];
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float* w = weights[n] + 2 * r;
        float scale = float(values.scales[r].v[g]);
        scaled[n][r] = transposed(halves_of(w[0] * scale, w[1] * scale));
        if constexpr (!V_CODEBOOK) {
          float bias = float(values.biases[r].v[g]);
          biased[n][r] = transposed(halves_of(w[0] * bias, w[1] * bias));
        }
      }
#pragma unroll
    for (int u = 0; u < V_CHUNK / 4; u++) {
      uint pairs[2][4];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const auto &low = values.codes[2 * r][g], &high = values.codes[2 * r + 1][g];
        if constexpr (V_BITS == 4) {
          // Halves of words need no shift to get there.
          uint word = bytes_of(low.words[u / 2], high.words[u / 2], u % 2 ? 0x7632 : 0x5410);
          pairs_of<V_BITS, V_CODEBOOK, true>(word, 0, V_LEVELS, pairs[r]);
        } else {
          pairs_of<V_BITS, V_CODEBOOK, false>(low.from(4 * u), high.from(4 * u), V_LEVELS, pairs[r]);
        }
      }
#pragma unroll
      for (int k = 0; k < 2; k++)
#pragma unroll
        for (int n = 0; n < TILES; n++) {
          float* sum = out[n][g * V_CHUNK / 2 + 2 * u + k];
          multiply_add(
              sum, pairs[0][2 * k], pairs[0][2 * k + 1], pairs[1][2 * k], pairs[1][2 * k + 1],
              scaled[n][0], scaled[n][1]);
          if constexpr (!V_CODEBOOK) {
            // Added tile by tile, or large sums would have to cancel in the end.
            uint one = 0x00010001u << place_of(V_BITS, false, 2 * k);
            uint other = 0x00010001u << place_of(V_BITS, false, 2 * k + 1);
            multiply_add(sum, one, other, one, other, biased[n][0], biased[n][1]);
          }
        }
    }
  }
}

template <bool VALUE>
struct Flag {
  enum { value = VALUE };
};

// This warp's tiles, every WARPS-th of a split's: `output` and `state` are the sums so far. `prepare`
// fills `query` and `sums`.
template <bool DENSE, typename P, typename M>
INLINE void attend(
    const Source<DENSE, K_WIDTH, K_GROUPS>& keys, const Source<DENSE, V_WIDTH, V_GROUPS>& values,
    P prepare, const uint (*query)[STEPS][2], const float (*sums)[2], M mask, int tile, int stop,
    int tokens, float (*output)[V_TILES][4], Softmax (*state)[2]) {
  const int lane = threadIdx.x % 32, quad = lane / 4, part = lane % 4;
  // The last tile lies further back than the others would have it, rather than over the end.
  auto start_of = [=](int tile) { return min(16 * tile, tokens - 16); };
  Keys key_tile;
  Vectors value_tile;
  load_keys(key_tile, keys, start_of(tile), quad, part);
  load_values(value_tile, values, start_of(tile), quad, part);
  prepare();
  for (; tile < stop; tile += WARPS) {
    int start = start_of(tile), next = start_of(min(tile + WARPS, stop - 1));
    float scores[TILES][4];
    score(scores, key_tile, query, sums);
    load_keys(key_tile, keys, next, quad, part);

    bool grown = false;
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int token = start + quad + i / 2 * 8;
        float found = mask(scores[n][i] * (SCALE * LOG2E * K_UNIT), 8 * n + 2 * part + i % 2, token);
        scores[n][i] = token < 16 * tile ? NOWHERE : found;
        grown |= scores[n][i] > state[n][i % 2].maximum + SLACK;
      }
    // The maximum only has to keep exponentials in range: it follows when it lags behind by much.
    if (any_lane(grown)) {
#pragma unroll
      for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float top = max(scores[n][i], scores[n][i + 2]);
          for (int d = 4; d < 32; d *= 2) top = max(top, from_lane(top, d));
          float unused, factor = state[n][i].join(top, 0.0f, unused);
#pragma unroll
          for (int m = 0; m < V_TILES; m++) output[n][m][i] *= factor, output[n][m][i + 2] *= factor;
        }
    }
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        scores[n][i] = exp2_fast(scores[n][i] - state[n][i % 2].maximum);
        state[n][i % 2].sum += scores[n][i];
      }
    weigh(output, value_tile, scores);
    load_values(value_tile, values, next, quad, part);
  }
}
