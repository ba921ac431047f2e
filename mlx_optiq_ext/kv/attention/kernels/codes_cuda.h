// Codes in registers as halves for tensor cores, and the packed keys and values that they come from.

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

// Scales of a row, and biases behind them in a stack.
constexpr int PITCH = STACKED ? 2 : 1;

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
    return *reinterpret_cast<const Values<GROUPS>*>(scales + token * (DENSE ? PITCH * GROUPS : scale_row));
  }
  INLINE Values<GROUPS> biases_of(long token) const {
    return *reinterpret_cast<const Values<GROUPS>*>(biases + token * (DENSE ? PITCH * GROUPS : bias_row));
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
