// One group of columns of a weight, a row by 32 lanes: lane l holds columns l, l + 32, ... The same
// steps as host.py has in numpy.

constexpr CONSTANT float TINY = 1e-7f;
constexpr CONSTANT float RANGES[8] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f, 0.6f};

INLINE float stored(float x) { return float(T(x)); }
INLINE float size_of(float x) { return max(x, -x); }
INLINE float whole(float x, float top) { return min(max(rint(x), 0.0f), top); }

// Searches scale and bias for the least squared error weighted by `share`, which sums to one.
template <int EACH>
INLINE void fit(
    LOCAL const float* x, LOCAL const float* share, float top, int starts, LOCAL float& scale,
    LOCAL float& bias) {
  float low = x[0], high = x[0], mean = 0.0f, best = -1.0f;
  for (int i = 0; i < EACH; i++)
    low = min(low, x[i]), high = max(high, x[i]), mean += x[i] * share[i];
  low = min_of_lanes(low), high = max_of_lanes(high), mean = sum_of_lanes(mean);
  for (int start = 0; start < starts; start++) {
    float s = stored(max((high - low) * (RANGES[start] / top), TINY));
    float b = stored((low + high) / 2 - s * (top / 2));
    for (int round = 0; round < 3; round++) {
      float error = 0.0f, c = 0.0f, cc = 0.0f, cx = 0.0f;
      for (int i = 0; i < EACH; i++) {
        float code = whole((x[i] - b) / s, top), left = code * s + b - x[i];
        float weighted = code * share[i];
        error += left * left * share[i], c += weighted, cc += weighted * code, cx += weighted * x[i];
      }
      error = sum_of_lanes(error), c = sum_of_lanes(c), cc = sum_of_lanes(cc), cx = sum_of_lanes(cx);
      if (best < 0.0f || error < best) scale = s, bias = b, best = error;
      // The least-squares line through the codes at hand.
      float spread = cc - c * c, slope = stored(spread > 1e-9f ? (cx - c * mean) / spread : 0.0f);
      if (size_of(slope) > TINY) s = slope;
      b = stored(mean - s * c);
    }
  }
}

// Rounds column by column; what is rounded away moves the targets of the columns that follow.
// `shift` is what earlier groups' errors moved the targets by, one column after the other; `unmixed`
// turns it into where they move all of the group at once. The error takes its place.
template <int SIZE, typename W, typename M, typename C, typename E, typename S>
INLINE void round_group(
    W weight, M share, M unmixed, M coupling, float top, int starts, int lane, C codes, E shift,
    S pushed, LOCAL float& scale, LOCAL float& bias) {
  constexpr int EACH = SIZE / 32;
  float target[EACH], exact[EACH], moved[EACH], importance[EACH], code[EACH];
  for (int i = 0; i < EACH; i++) {
    exact[i] = target[i] = weight[32 * i + lane];
    moved[i] = shift[32 * i + lane], importance[i] = share[32 * i + lane];
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    for (int from = 0; from < 32; from++) {
      float by = of_lane(moved[i], from);
      M row = unmixed + (32 * i + from) * SIZE;
      for (int j = i; j < EACH; j++) target[j] += by * row[32 * j + lane];
    }
  }
  fit<EACH>(target, importance, top, starts, scale, bias);
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    for (int from = 0; from < 32; from++) {
      float wanted = of_lane(target[i], from);
      float taken = whole((wanted - bias) / scale, top);
      float left = wanted - (taken * scale + bias);
      if (lane == from) code[i] = taken;
      M row = coupling + (32 * i + from) * SIZE;
      for (int j = i; j < EACH; j++) target[j] += left * row[32 * j + lane];
    }
  }
  for (int i = 0; i < EACH; i++) {
    float error = exact[i] - (code[i] * scale + bias);
    codes[32 * i + lane] = code[i];
    shift[32 * i + lane] = pushed[32 * i + lane] = error;
  }
}

// Refits scale and bias to the codes, then rounds each column again against the slope of the loss.
// `change` is how earlier groups' changes moved the slope; the group's own takes its place.
template <int SIZE, typename S, typename M, typename C, typename D, typename E, typename P>
INLINE void sweep_group(
    S slope, C before, D after, M moment, long stride, float top, int lane, E change_, P pushed,
    LOCAL float& scale, LOCAL float& bias) {
  constexpr int EACH = SIZE / 32;
  float own[EACH], code[EACH], weighted[EACH], column_sum[EACH], again[EACH], change[EACH];
  for (int i = 0; i < EACH; i++) {
    own[i] = slope[32 * i + lane] + change_[32 * i + lane];
    code[i] = float(before[32 * i + lane]);
    weighted[i] = column_sum[i] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    for (int from = 0; from < 32; from++) {
      float other = of_lane(code[i], from);
      M row = moment + (32 * i + from) * stride;
      for (int j = 0; j < EACH; j++) {
        float m = row[32 * j + lane];
        weighted[j] += other * m, column_sum[j] += m;
      }
    }
  }
  float oo = 0.0f, cc = 0.0f, co = 0.0f, rc = 0.0f, ro = 0.0f;
  for (int i = 0; i < EACH; i++) {
    oo += column_sum[i], cc += weighted[i] * code[i], co += weighted[i];
    rc += own[i] * code[i], ro += own[i];
  }
  oo = sum_of_lanes(oo), cc = sum_of_lanes(cc), co = sum_of_lanes(co);
  rc = sum_of_lanes(rc), ro = sum_of_lanes(ro);
  float spread = cc * oo - co * co, scale_ = scale, bias_ = bias;
  bool solvable = spread > 1e-6f * cc * oo;
  float fitted = stored(scale + (solvable ? (rc * oo - ro * co) / spread : 0.0f));
  if (size_of(fitted) > TINY) scale = fitted;
  // The bias answers for the scale as stored, not as solved.
  if (solvable) bias = stored(bias + (ro - (scale - scale_) * co) / oo);
  for (int i = 0; i < EACH; i++) {
    own[i] += (scale_ - scale) * weighted[i] + (bias_ - bias) * column_sum[i];
    change[i] = (scale_ - scale) * code[i] + (bias_ - bias);
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    for (int from = 0; from < 32; from++) {
      M row = moment + (32 * i + from) * stride;
      float old = of_lane(code[i], from);
      float taken = whole(of_lane(own[i], from) / (scale * row[32 * i + from]) + old, top);
      float moved = (old - taken) * scale;
      if (lane == from) again[i] = taken, change[i] += moved;
      for (int j = i; j < EACH; j++) own[j] += moved * row[32 * j + lane];
    }
  }
  for (int i = 0; i < EACH; i++) {
    after[32 * i + lane] = again[i];
    change_[32 * i + lane] = pushed[32 * i + lane] = change[i];
  }
}

// Adds what was pushed by the group at `start`, times its rows of a matrix, to all later columns.
template <int SIZE, int ROWS, int THREADS, typename S, typename M, typename E>
INLINE void push(S pushed, M matrix, E state, int start, int columns, int rows, int inside) {
  for (int j = start + SIZE + inside; j < columns; j += THREADS) {
    float sums[ROWS];
    for (int r = 0; r < ROWS; r++) sums[r] = 0.0f;
    for (int k = 0; k < SIZE; k++) {
      float m = matrix[(long)(start + k) * columns + j];
      for (int r = 0; r < ROWS; r++) sums[r] += pushed[r * SIZE + k] * m;
    }
    for (int r = 0; r < ROWS; r++)
      if (r < rows) state[(long)r * columns + j] += sums[r];
  }
}
