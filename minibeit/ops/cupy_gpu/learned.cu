// The kernels of training: backwards of the transformer's ops, and forwards that keep what those need.  They follow
// kernels.cu.  All sums over rows are float64 and go in a fixed order.

__device__ inline double warp_total(double x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Sums over rows -----------------------------------------------------------------------------------------------------

constexpr int ROWS_AT_ONCE = 8, ROWS_OF_A_SUM = 128;

// sums (blocks, K, C): each block of 256 threads adds up K numbers for each of 32 W columns, over ROWS_OF_A_SUM rows.
// use(row, c, x) does the rest of the work on W elements and fills x[K][W].
template <int W, int K, class Use> __device__ inline void sum_columns(double* sums, long long rows, int C, Use use) {
  __shared__ double parts[ROWS_AT_ONCE][K][32 * W];
  const int own = threadIdx.x % 32 * W, c = blockIdx.x * 32 * W + own, lane = threadIdx.x / 32;
  const long long first = blockIdx.y * (long long)ROWS_OF_A_SUM, end = min(first + ROWS_OF_A_SUM, rows);
  double sum[K][W] = {};
  if (c < C)
    for (long long row = first + lane; row < end; row += ROWS_AT_ONCE) {
      double x[K][W];
      use(row, c, x);
      for (int k = 0; k < K; k++)
        for (int i = 0; i < W; i++) sum[k][i] += x[k][i];
    }
  if (!sums) return;
  for (int k = 0; k < K; k++)
    for (int i = 0; i < W; i++) parts[lane][k][own + i] = sum[k][i];
  __syncthreads();
  if (lane != 0 || c >= C) return;
  for (int k = 0; k < K; k++)
    for (int i = 0; i < W; i++) {
      double total = 0;
      for (int part = 0; part < ROWS_AT_ONCE; part++) total += parts[part][k][own + i];
      sums[(blockIdx.y * (long long)K + k) * C + c + i] = total;
    }
}

// y = x as an operand of products, where y is there, and the sums of x.
template <int W> __global__ void to_operand(double* sums, long long rows, long long C, const A* x, T* y) {
  sum_columns<W, 1>(sums, rows, int(C), [&](long long row, int c, double (&out)[1][W]) {
    const Numbers<W> v = load<W>(x + row * C + c);
    if (y) store<W>(y + row * C + c, v);
    for (int i = 0; i < W; i++) out[0][i] = v.v[i];
  });
}

// Layer norm ---------------------------------------------------------------------------------------------------------

// dx, and mean and 1 / deviation of each row, in float64: where a row's spread is small, the terms of dx nearly cancel.
template <int W> __global__ void layer_norm_backward(
    const A* g, const A* x, const A* weight, A* dx, double* moments, long long rows, long long D, double eps) {
  const long long row = blockIdx.x * (long long)(blockDim.x / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  x += row * D;
  g += row * D;
  const int step = 32 * W, start = threadIdx.x % 32 * W;
  double sum = 0;
  for (int c = start; c < D; c += step) {
    const Numbers<W> v = load<W>(x + c);
    for (int i = 0; i < W; i++) sum += v.v[i];
  }
  const double mean = warp_total(sum) / D;
  double squares = 0;
  for (int c = start; c < D; c += step) {
    const Numbers<W> v = load<W>(x + c);
    for (int i = 0; i < W; i++) squares += (v.v[i] - mean) * (v.v[i] - mean);
  }
  const double r = 1 / sqrt(warp_total(squares) / D + eps);
  double all_a = 0, all_ah = 0;
  for (int c = start; c < D; c += step) {
    const Numbers<W> v = load<W>(x + c), u = load<W>(g + c), w = load<W>(weight + c);
    for (int i = 0; i < W; i++) {
      const double a = double(u.v[i]) * w.v[i];
      all_a += a;
      all_ah += a * (v.v[i] - mean) * r;
    }
  }
  const double mean_a = warp_total(all_a) / D, mean_ah = warp_total(all_ah) / D;
  for (int c = start; c < D; c += step) {
    const Numbers<W> v = load<W>(x + c), u = load<W>(g + c), w = load<W>(weight + c);
    Numbers<W> y;
    for (int i = 0; i < W; i++)
      y.v[i] = A(r * (double(u.v[i]) * w.v[i] - mean_a - (v.v[i] - mean) * r * mean_ah));
    store<W>(dx + row * D + c, y);
  }
  if (threadIdx.x % 32 == 0) {
    moments[2 * row] = mean;
    moments[2 * row + 1] = r;
  }
}

// The sums of g h, h = (x - mean) / deviation, and of g.
template <int W> __global__ void layer_norm_sums(
    double* sums, long long rows, long long D, const A* g, const A* x, const double* moments) {
  sum_columns<W, 2>(sums, rows, int(D), [&](long long row, int c, double (&out)[2][W]) {
    const Numbers<W> u = load<W>(g + row * D + c), v = load<W>(x + row * D + c);
    for (int i = 0; i < W; i++) {
      out[0][i] = u.v[i] * ((v.v[i] - moments[2 * row]) * moments[2 * row + 1]);
      out[1][i] = u.v[i];
    }
  });
}

// Linear layers ------------------------------------------------------------------------------------------------------

// z = z + bias, y = f(z); a null bias is none.
template <int W> __global__ void activation_kept(T* z, const A* bias, T* y, long long C, long long kind) {
  const long long row = blockIdx.x * C;
  for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
    Numbers<W> v = load<W>(z + row + c);
    if (bias) add_product<W>(v, load<W>(bias + c), A(1));
    store<W>(z + row + c, v);
    activate_all<W>(v, int(kind));
    store<W>(y + row + c, v);
  }
}

// f'(x); the numbers are those of kernels.ACTIVATIONS.  At a kink it is what PyTorch takes.
__device__ inline A gelu_slope(A x) {
  return A(0.5) * erfc(x * A(-0.70710678118654752440)) + x * exp(A(-0.5) * x * x) * A(0.39894228040143267794);
}
__device__ inline A gelu_tanh_slope(A x) {
  const A c = A(0.79788456080286535588), t = tanh(c * (x + A(0.044715) * x * x * x));
  return A(0.5) * (1 + t) + A(0.5) * x * (1 - t * t) * c * (1 + A(3 * 0.044715) * x * x);
}
__device__ inline A silu_slope(A x, A steepness) {
  const A s = sigmoid(steepness * x);
  return s + steepness * x * s * (1 - s);
}
__device__ inline A mish_slope(A x) {
  const A t = tanh(softplus(x));
  return t + x * (1 - t * t) * sigmoid(x);
}
__device__ inline A laplace_slope(A x) {
  const A z = (x - A(0.707107)) / A(0.282095 * 1.41421356237309504880);
  return exp(-z * z) / A(2.50662827463100050242 * 0.282095);
}
__device__ inline A slope(A x, int kind) {
  switch (kind) {
    case 1: return gelu_slope(x);
    case 2: return x > 0;
    case 3: return gelu_tanh_slope(x);
    case 4: return gelu(x) <= 10 ? gelu_slope(x) : A(0);
    case 5: return x >= 3 ? A(1) : x >= -3 ? (2 * x + 3) / 6 : A(0);
    case 6: return laplace_slope(x);
    case 7: return x > 0 ? A(1) : A(0.01);
    case 8: return mish_slope(x);
    case 9: return silu_slope(x, A(1.702));
    case 10: return x > 0 ? 2 * x : A(0);
    case 11: return x > 0 && x < 6;
    case 12: return sigmoid(x) * (1 - sigmoid(x));
    case 13: return silu_slope(x, A(1));
    case 14: return x < -80 ? A(0.5) * exp(A(0.5) * x) : sigmoid(x) / (2 * sqrt(softplus(x)));  // 0 / 0 far below
    case 15: return 1 - tanh(x) * tanh(x);
    default: return A(1);
  }
}

// y = g f'(z) as an operand of products, and the sums of it.
template <int W> __global__ void activation_backward(
    double* sums, long long rows, long long C, const A* g, const T* z, T* y, long long kind_) {
  const int kind = int(kind_);
  sum_columns<W, 1>(sums, rows, int(C), [&](long long row, int c, double (&out)[1][W]) {
    Numbers<W> v = load<W>(g + row * C + c);
    const Numbers<W> x = load<W>(z + row * C + c);
    for (int i = 0; i < W; i++) {
      v.v[i] *= kind == 1 ? gelu_slope(x.v[i]) : slope(x.v[i], kind);
      out[0][i] = v.v[i];
    }
    store<W>(y + row * C + c, v);
  });
}

// a = g keep, with a factor for every `share` rows (null: 1), as an operand of products: by itself and times `scale`,
// where they are there; and the sums of a.
template <int W> __global__ void residual_backward(
    double* sums, long long rows, long long C, const A* g, const A* keep, long long share, const A* scale, T* plain,
    T* scaled) {
  sum_columns<W, 1>(sums, rows, int(C), [&](long long row, int c, double (&out)[1][W]) {
    Numbers<W> v = load<W>(g + row * C + c);
    const A factor = keep ? keep[row / share] : A(1);
    for (int i = 0; i < W; i++) {
      v.v[i] *= factor;
      out[0][i] = v.v[i];
    }
    if (plain) store<W>(plain + row * C + c, v);
    if (!scaled) return;
    const Numbers<W> s = load<W>(scale + c);
    for (int i = 0; i < W; i++) v.v[i] *= s.v[i];
    store<W>(scaled + row * C + c, v);
  });
}

// Attention whose scores are in memory ---------------------------------------------------------------------------------

// In place of the gradients of probabilities those of scores: probs (x - sum over the row of x probs) with x = keep
// d_probs + extra, each null if there is none.  Rows of d_probs are `stride` apart, those of `operand`, which receives them
// as operands of products if it is there, `operand_stride`, all others N.
__global__ void softmax_backward(
    A* d_probs, const A* probs, const A* keep, const A* extra, T* operand, long long tokens, long long stride,
    long long operand_stride) {
  const int N = int(tokens);
  const long long place = blockIdx.x * (long long)N;
  A* row = d_probs + blockIdx.x * stride;
  A sum = 0;
  for (int b = threadIdx.x; b < N; b += blockDim.x) {
    A x = row[b];
    if (keep) x *= keep[place + b];
    if (extra) x += extra[place + b];
    row[b] = x;
    sum += x * probs[place + b];
  }
  sum = over_block<false>(sum);
  for (int b = threadIdx.x; b < N; b += blockDim.x) {
    const A d = probs[place + b] * (row[b] - sum);
    row[b] = d;
    if (operand) operand[blockIdx.x * operand_stride + b] = narrow<T>(d);
  }
}

// pairs (H, N stride) += the scores of `count` (image, head) pairs from number `first` on, each head's in their order; a
// thread for each place.
__global__ void add_scores(
    const A* scores, A* pairs, long long count, long long first, long long H, long long size) {
  const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i >= size) return;
  const int head = blockIdx.y;
  A sum = pairs[head * size + i];
  for (long long p = (head - first % H + H) % H; p < count; p += H) sum += scores[p * size + i];
  pairs[head * size + i] = sum;
}

// d_table (R, H): the sum of pairs (parts, H, N, stride) over all parts and the places a N + b that read a row of the table;
// `places` (R, most) has them in order, and -1 behind the last.  A block for each row and head.
__global__ void table_backward(
    const A* pairs, const int* places, A* d_table, long long most, long long tokens, long long stride, long long H,
    long long parts_of_images) {
  __shared__ double parts[32];
  const int N = int(tokens), head = blockIdx.y;
  pairs += head * tokens * stride;
  double sum = 0;
  for (int i = threadIdx.x; i < most; i += blockDim.x) {
    const int place = places[blockIdx.x * most + i];
    for (int part = 0; part < parts_of_images && place >= 0; part++)
      sum += pairs[part * H * tokens * stride + place / N * stride + place % N];
  }
  sum = warp_total(sum);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < blockDim.x / 32; i++) sum += parts[i];
  d_table[blockIdx.x * H + head] = A(sum);
}

// Cross-entropy --------------------------------------------------------------------------------------------------------

// y = factor (p softmax(x) - target(c)) of one row, whose target adds up to p.
template <class Target> __device__ inline void cross_entropy_row(
    const A* x, A* y, int K, A p, A factor, Target target) {
  A largest = A(-3e38), sum = 0;
  for (int c = threadIdx.x; c < K; c += blockDim.x) largest = larger(largest, x[c]);
  largest = over_block<true>(largest);
  for (int c = threadIdx.x; c < K; c += blockDim.x) sum += exp(x[c] - largest);
  sum = over_block<false>(sum);
  for (int c = threadIdx.x; c < K; c += blockDim.x) y[c] = factor * (p * (exp(x[c] - largest) / sum) - target(c));
}

// The target is a label and `smoothing` spread over all classes; a row counts as much as its share, that of an ignored
// one is 0.  g is one number.
__global__ void cross_entropy_backward(
    const A* x, const long long* labels, const A* shares, const A* g, A* y, long long classes, double smoothing) {
  const int K = int(classes), label = int(labels[blockIdx.x]);
  const A share = shares[blockIdx.x], low = A(smoothing / classes), high = A(1 - smoothing);
  x += blockIdx.x * classes;
  y += blockIdx.x * classes;
  if (share == 0)
    for (int c = threadIdx.x; c < K; c += blockDim.x) y[c] = 0;
  else
    cross_entropy_row(x, y, K, A(1), share * g[0], [&](int c) { return c == label ? low + high : low; });
}

// The target is a row of numbers.
__global__ void soft_cross_entropy_backward(const A* x, const A* target, const A* g, A* y, long long classes) {
  const int K = int(classes);
  x += blockIdx.x * classes;
  y += blockIdx.x * classes;
  target += blockIdx.x * classes;
  A sum = 0;
  for (int c = threadIdx.x; c < K; c += blockDim.x) sum += target[c];
  sum = over_block<false>(sum);
  cross_entropy_row(x, y, K, sum, g[0] / A(gridDim.x), [&](int c) { return target[c]; });
}
