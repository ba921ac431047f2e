// Flash decoding on tensor cores. A warp takes 16 tokens at a time: scores = K Q' with the tokens as
// rows of the product, output = V' P' with the head dimension as rows, so that packed data is always
// the left factor, goes from memory into the registers that hold it, and is read once for all
// queries of a key/value head. Lane = 4 * quad + part.
//
// Affine codes are never converted: a code in the low bits of a half *is* a number, code * 2^-24, and
// tensor cores take such subnormal numbers exactly. What is left is one mask for two codes. A group's
// scale multiplies its scores, or its tokens' weights; biases are products of their own.

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
