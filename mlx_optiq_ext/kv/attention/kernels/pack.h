// Packs one row of keys or values, a group by 32 lanes: scale and bias are fitted to the group by
// least squares, FITS times to the codes of the fit before (see rounding.py), from a range of which
// SHARE is covered.

template <int BITS, int GROUP, int GROUPS, int FITS, typename P, typename S, typename C, typename O>
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
  float span = high - low, scale = max(span * share / top, tiny), bias = low + span * (1 - share) / 2;
  for (int fit = 0; fit < FITS; fit++) {
    float code[EACH], middle = 0.0f, product = 0.0f, square = 0.0f;
    for (int i = 0; i < EACH; i++) {
      code[i] = min(max(rint((x[i] - bias) / scale), 0.0f), top);
      middle += code[i];
    }
    middle = sum_of_lanes(middle) / GROUP;
    for (int i = 0; i < EACH; i++) {
      product += code[i] * (x[i] - mean);
      square += (code[i] - middle) * (code[i] - middle);
    }
    scale = max(sum_of_lanes(product) / max(sum_of_lanes(square), tiny), tiny);
    bias = mean - scale * middle;
  }
  // Codes go by what is stored, not what was found.
  const T stored_scale = T(scale), stored_bias = T(bias);
  scale = max(float(stored_scale), tiny), bias = float(stored_bias);
  for (int i = 0; i < EACH; i++)
    shared[warp * GROUP + 32 * i + lane] = uint(min(max(rint((x[i] - bias) / scale), 0.0f), top));
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
