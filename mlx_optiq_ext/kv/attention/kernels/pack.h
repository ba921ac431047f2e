// A row of keys or values in the basis in which it is packed, rounded to its type; `row` is room for it.
template <int TURN, int DIM, int THREADS, typename P, typename C, typename M, typename S>
INLINE void turn_row(
    P in, long stride, C centre, M matrix, float unit, S row, S turned, int place) {
  for (int i = place; i < DIM; i += THREADS)
    row[i] = float(in[i * stride]) - (TURN == MOVED ? float(centre[i]) : 0.0f);
  BARRIER;
  if (TURN == ROTATED) rotate_row<DIM, THREADS>(row, unit, place);
  for (int i = place; i < DIM; i += THREADS)
    turned[i] = float(T(TURN == MOVED ? times_column<DIM>(row, matrix, i) : row[i]));
  BARRIER;
}

// Packs one row of keys or values, a group by 32 lanes: scale and bias are fitted to the group by
// least squares, FITS times to the codes of the fit before, from each of STARTS shares of its range;
// those that explain most are kept (see affine_ranges.py).
template <int BITS, int GROUP, int GROUPS, int STARTS, int FITS, typename P, typename S, typename C, typename O>
INLINE void pack_row(
    P in, long stride, float share, int warp, int lane, S shared, C codes, O scales, O biases) {
  constexpr int EACH = GROUP / 32, WORDS = GROUP * BITS / 32;
  const float top = float((1 << BITS) - 1), tiny = 1e-9f;
  const int group = warp < GROUPS ? warp : 0;  // what has no group works along and writes nothing
  float x[EACH], low, high, mean = 0.0f;
  for (int i = 0; i < EACH; i++) {
    x[i] = float(in[(group * GROUP + 32 * i + lane) * stride]);
    low = i ? min(low, x[i]) : x[i];
    high = i ? max(high, x[i]) : x[i];
    mean += x[i];
  }
  low = min_of_lanes(low), high = max_of_lanes(high), mean = sum_of_lanes(mean) / GROUP;
  float scale = max((high - low) / top, tiny), bias = low, best = -1.0f;
  for (int start = 0; start < STARTS; start++) {
    float part = min(share + AROUND * start, 1.0f), explained = 0.0f;
    float span = high - low, slope = max(span * part / top, tiny), base = low + span * (1 - part) / 2;
    for (int fit = 0; fit < FITS; fit++) {
      float code[EACH], middle = 0.0f, product = 0.0f, square = 0.0f;
      for (int i = 0; i < EACH; i++) {
        code[i] = min(max(rint((x[i] - base) / slope), 0.0f), top);
        middle += code[i];
      }
      middle = sum_of_lanes(middle) / GROUP;
      for (int i = 0; i < EACH; i++) {
        product += code[i] * (x[i] - mean);
        square += (code[i] - middle) * (code[i] - middle);
      }
      product = sum_of_lanes(product), square = max(sum_of_lanes(square), tiny);
      slope = max(product / square, tiny), explained = product * product / square;
      base = mean - slope * middle;
    }
    if (explained > best) scale = slope, bias = base, best = explained;
  }
  // The scale that is stored keeps the product of a group with itself, the bias its mean.
  float middle = 0.0f, product = 0.0f, square = 0.0f;
  scale = max(scale, tiny);
  for (int i = 0; i < EACH; i++) {
    float code = min(max(rint((x[i] - bias) / scale), 0.0f), top);
    shared[warp * GROUP + 32 * i + lane] = uint(code);
    middle += code, product += code * (x[i] - mean), square += (x[i] - mean) * (x[i] - mean);
  }
  middle = sum_of_lanes(middle) / GROUP, product = sum_of_lanes(product);
  square = sum_of_lanes(square);
  const T stored_scale = T(STARTS == 0 ? scale : product > tiny ? square / product : 0.0f);
  const T stored_bias = T(STARTS == 0 ? bias : mean - float(stored_scale) * middle);
  BARRIER;
  if (warp >= GROUPS) return;
  if (lane == 0) scales[group] = stored_scale, biases[group] = stored_bias;
  if (lane >= WORDS) return;
  uint word = 0;
  for (int i = 32 * lane / BITS; i * BITS < 32 * lane + 32; i++) {
    int place = i * BITS - 32 * lane;
    uint code = shared[warp * GROUP + i];
    word |= place < 0 ? code >> -place : code << place;
  }
  codes[group * WORDS + lane] = word;
}
