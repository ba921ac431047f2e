// One group of columns of a weight, a row by 32 lanes. Lane l holds columns l, l + 32, ...; matrices
// are (SIZE, SIZE) with rows `stride` apart. The same steps as grid.py has in numpy.

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
template <int SIZE, typename W, typename M, typename C>
INLINE void round_group(
    W weight, long weight_step, W shift, long shift_step, M share, M coupling, long stride,
    float top, int starts, int lane, C codes, LOCAL float& scale, LOCAL float& bias,
    LOCAL float* error) {
  constexpr int EACH = SIZE / 32;
  float target[EACH], exact[EACH], importance[EACH], code[EACH];
  for (int i = 0; i < EACH; i++) {
    int column = 32 * i + lane;
    exact[i] = weight[column * weight_step];
    target[i] = exact[i] + shift[column * shift_step];
    importance[i] = share[column];
  }
  fit<EACH>(target, importance, top, starts, scale, bias);
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    for (int from = 0; from < 32; from++) {
      float wanted = of_lane(target[i], from);
      float taken = whole((wanted - bias) / scale, top);
      float left = wanted - (taken * scale + bias);
      if (lane == from) code[i] = taken;
      M row = coupling + (32 * i + from) * stride;
      for (int j = i; j < EACH; j++) target[j] += left * row[32 * j + lane];
    }
  }
  for (int i = 0; i < EACH; i++) {
    codes[32 * i + lane] = code[i];
    error[i] = exact[i] - (code[i] * scale + bias);
  }
}

// Refits scale and bias to the codes, then rounds each column again against the slope of the loss.
template <int SIZE, typename S, typename M, typename C, typename D>
INLINE void sweep_group(
    S slope, long slope_step, C before, D after, M moment, long stride, float top, int lane,
    LOCAL float& scale, LOCAL float& bias, LOCAL float* change) {
  constexpr int EACH = SIZE / 32;
  float own[EACH], code[EACH], weighted[EACH], column_sum[EACH], again[EACH];
  for (int i = 0; i < EACH; i++) {
    own[i] = slope[(32 * i + lane) * slope_step];
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
  for (int i = 0; i < EACH; i++) after[32 * i + lane] = again[i];
}
