// Arithmetic that the CUDA and the Metal kernel have in common. The text before it defines GLOBAL (a
// pointer to device memory), LOCAL (one to a thread's own memory), SHARED (memory of a block),
// INLINE, exp2_fast and the constants of the shape family.

enum { MASK_NONE = 0, MASK_CAUSAL = 1, MASK_BOOL = 2, MASK_ADDED = 3 };

// What stands for minus infinity: differences of it are finite.
constexpr CONSTANT float LOWEST = -1e30f;
// And what even a row that looks nowhere gives no weight to.
constexpr CONSTANT float NOWHERE = -3e30f;
constexpr CONSTANT float LOG2E = 1.44269504f;

// CODES codes of BITS bits, cut out of a row in which codes follow each other without gaps, least
// significant bits first (the order of mx.quantize).
template <int BITS, int CODES>
struct Codes {
  enum {
    SPAN = BITS * CODES,
    // Where in a word a span may begin: at multiples of this.
    STEP = (SPAN & -SPAN) < 32 ? (SPAN & -SPAN) : 32,
    WORDS = (SPAN + 63 - STEP) / 32
  };
  uint words[WORDS];

  // `first` is the number of the span's first code in its row, `last` the row's last word.
  INLINE void load(GLOBAL const uint* row, int first, int last) {
    int bit = first * BITS;
    int word = bit >> 5;
    if (STEP == 32) {
      read_words<WORDS>(words, row + word);
      return;
    }
    int shift = bit & 31;
    uint next = row[word];
    for (int i = 0; i < WORDS; i++) {
      uint low = next;
      next = row[word + i + 1 < last ? word + i + 1 : last];
      words[i] = shift ? (low >> shift) | (next << (32 - shift)) : low;
    }
  }

  // The bits from code `i` on, as many as fit into a word.
  INLINE uint from(int i) const {
    int bit = i * BITS, word = bit / 32, shift = bit % 32;
    uint low = words[word] >> shift;
    return shift == 0 || word + 1 >= WORDS ? low : low | (words[word + 1] << (32 - shift));
  }

  INLINE uint at(int i) const { return from(i) & ((1u << BITS) - 1); }
};

// Maximum, sum of exponentials and their base so far: powers of two, scores times log2(e).
struct Softmax {
  float maximum, sum;

  // Take in others that were summed elsewhere; returns the factor for what belongs to *this*.
  INLINE float join(float maximum_, float sum_, LOCAL float& factor_) {
    float both = maximum > maximum_ ? maximum : maximum_;
    float factor = exp2_fast(maximum - both);
    factor_ = exp2_fast(maximum_ - both);
    sum = sum * factor + sum_ * factor_;
    maximum = both;
    return factor;
  }
};

// Where the newest token of a sliding window ends, and where the tokens begin that it goes around.
struct Ring {
  int end, floor;
};

// A score in powers of two under the mask. `row` counts the queries of a head, `mask` points at the
// first token of its row. The last tokens before a query are left to the kernel that joins the splits.
template <int MASK, typename M>
INLINE float masked(
    float score, GLOBAL const M* mask, long stride, int row, int length, int token, int tokens,
    Ring ring) {
  const int own = tokens - length + row;
  if (RECENT) {
    int back = (RING ? ring.end - 1 : own) - token;
    if (RING && back < 0 && token >= ring.floor) back += tokens - ring.floor;
    if (back >= 0 && back < RECENT && (!RING || token >= ring.floor)) return LOWEST;
  }
  if (MASK == MASK_CAUSAL) return token <= own ? score : LOWEST;
  if (MASK == MASK_BOOL) return float(mask[token * stride]) != 0.0f ? score : LOWEST;
  if (MASK == MASK_ADDED) {
    float sum = score + LOG2E * float(mask[token * stride]);
    return sum > LOWEST ? sum : LOWEST;
  }
  return score;
}

// What a first key's score gets added, in powers of two. `firsts` points at those of a query; a row of
// the batch begins at `start`.
template <typename F>
INLINE float first_of(F firsts, int start, int token) {
  int place = token - start;
  return FIRSTS == 0 || place < 0 || place >= FIRSTS ? 0.0f : firsts[place];
}

// What one thread joins of a row's partial results, for one element of the output: of every
// STRIDE-th split from `first` on. `states` holds a maximum and a sum for each split, `parts` an
// output that is not divided. (P is a pointer: in Metal small arrays lie elsewhere than large ones.)
// Reads are four at a time, so that they wait together.
template <int STRIDE, int DIM, typename P, typename Q>
INLINE float combined(
    P states, Q parts, int first, int splits, int rows, int element, LOCAL Softmax& state) {
  float output = 0.0f;
  for (int start = first; start < splits; start += 4 * STRIDE) {
    float maxima[4], sums[4], values[4];
    for (int i = 0; i < 4; i++) {
      int s = start + i * STRIDE;
      bool there = s < splits;
      long place = (long)(there ? s : first) * rows;
      maxima[i] = there ? states[2 * place] : LOWEST;
      sums[i] = there ? states[2 * place + 1] : 0.0f;
      values[i] = there ? parts[place * DIM + element] : 0.0f;
    }
    for (int i = 0; i < 4; i++) {
      float factor_, factor = state.join(maxima[i], sums[i], factor_);
      output = output * factor + values[i] * factor_;
    }
  }
  return output;
}
