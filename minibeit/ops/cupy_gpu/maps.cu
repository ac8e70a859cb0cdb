// Kernels on maps, which are (B, h, w, C) in memory; they follow those of kernels.cu.

// (B, h, w, C) -> (B, h + 2 border, w + 2 border, C), zeros around.
template <int W> __global__ void pad(const A* x, T* y, long long h, long long w, long long C, long long border) {
  const long long across = w + 2 * border, down = h + 2 * border;
  const long long j = blockIdx.x % across - border, i = blockIdx.x / across % down - border;
  const long long b = blockIdx.x / across / down;
  const bool inside = i >= 0 && i < h && j >= 0 && j < w;
  for (int c = threadIdx.x * W; c < C; c += blockDim.x * W)
    store<W>(y + blockIdx.x * C + c, inside ? load<W>(x + ((b * h + i) * w + j) * C + c) : all<W>(A(0)));
}

// y (B, h, w, C) = f(z + bias, or + y) for z (B, h + 2 border, w + 2 border, C), of which the last rows and columns of
// every image are left out.
template <int W> __global__ void finish_padded(
    const A* z, const A* bias, A* y, long long h, long long w, long long C, long long border, long long add,
    long long kind) {
  const long long j = blockIdx.x % w, i = blockIdx.x / w % h, b = blockIdx.x / w / h;
  z += ((b * (h + 2 * border) + i) * (w + 2 * border) + j) * C;
  y += blockIdx.x * C;
  for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) finish<W>(load<W>(z + c), bias, y, c, add != 0, int(kind));
}

// Where place i of `size` lies among `old` sources (pixel centres at half integers): the first of the places that
// count, and their weights.  As `reference.resize_bilinear` and `resize_bicubic`.
__device__ inline long long bilinear(long long i, double scale, A* weight) {
  const double here = (i + 0.5) * scale - 0.5, position = here > 0 ? here : 0;
  const long long first = (long long)position;
  weight[1] = A(position - first);
  weight[0] = A(1 - (position - first));
  return first;
}

__device__ inline long long bicubic(long long i, double scale, A* weight) {
  const double position = (i + 0.5) * scale - 0.5, first = floor(position), a = -0.75;
  for (int k = 0; k < 4; k++) {
    const double s = fabs(position - first - (k - 1));
    weight[k] = A(s <= 1 ? ((a + 2) * s - (a + 3)) * s * s + 1 : ((a * s - 5 * a) * s + 8 * a) * s - 4 * a);
  }
  return (long long)first - 1;
}

__device__ inline long long within(long long i, long long size) { return i < 0 ? 0 : i < size ? i : size - 1; }

// (B, old_h, old_w, C) -> (B, h, w, C); TAPS 2: bilinear, 4: bicubic.  Rows are mixed first.
template <int W, int TAPS> __global__ void resize(
    const A* x, A* y, long long old_h, long long old_w, long long h, long long w, long long C, double scale_h,
    double scale_w) {
  const long long j = blockIdx.x % w, i = blockIdx.x / w % h, b = blockIdx.x / w / h;
  A down[TAPS], across[TAPS];
  const long long top = TAPS == 2 ? bilinear(i, scale_h, down) : bicubic(i, scale_h, down);
  const long long left = TAPS == 2 ? bilinear(j, scale_w, across) : bicubic(j, scale_w, across);
  for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
    Numbers<W> sum = all<W>(A(0));
    for (int l = 0; l < TAPS; l++) {
      Numbers<W> column = all<W>(A(0));
      for (int k = 0; k < TAPS; k++) {
        const long long source = (b * old_h + within(top + k, old_h)) * old_w + within(left + l, old_w);
        add_product<W>(column, load<W>(x + source * C + c), down[k]);
      }
      add_product<W>(sum, column, across[l]);
    }
    store<W>(y + blockIdx.x * C + c, sum);
  }
}

// The convolution of an enlarged map, from the products of the small one: z (B, old_h, old_w, side * side, C) holds
// W_t x for every tap t.  y (B, h, w, C) = f(sum over t of shift_t(enlarge(z_t)) + bias, or + y); taps that look beyond
// the border of the large map count nothing, as in the convolution.
template <int W> __global__ void spread(
    const A* z, const A* bias, A* y, long long old_h, long long old_w, long long h, long long w, long long C,
    double scale_h, double scale_w, long long side, long long add, long long kind) {
  const long long j = blockIdx.x % w, i = blockIdx.x / w % h, b = blockIdx.x / w / h, reach = side / 2;
  const long long pixel = side * side * C;
  y += blockIdx.x * C;
  for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
    Numbers<W> sum = all<W>(A(0));
    for (long long s = 0; s < side; s++) {
      const long long row = i + s - reach;
      if (row < 0 || row >= h) continue;
      A down[2];
      const long long top = bilinear(row, scale_h, down), below = within(top + 1, old_h);
      for (long long t = 0; t < side; t++) {
        const long long column = j + t - reach;
        if (column < 0 || column >= w) continue;
        A across[2];
        const long long left = bilinear(column, scale_w, across), right = within(left + 1, old_w);
        const A* tap = z + (s * side + t) * C + c;
        const A* upper = tap + (b * old_h + top) * old_w * pixel;
        const A* lower = tap + (b * old_h + below) * old_w * pixel;
        add_product<W>(sum, load<W>(upper + left * pixel), down[0] * across[0]);
        add_product<W>(sum, load<W>(lower + left * pixel), down[1] * across[0]);
        add_product<W>(sum, load<W>(upper + right * pixel), down[0] * across[1]);
        add_product<W>(sum, load<W>(lower + right * pixel), down[1] * across[1]);
      }
    }
    finish<W>(sum, bias, y, c, add != 0, int(kind));
  }
}

// (B, h, w, 2, 2, C) -> (B, 2 h, 2 w, C): y = f((x + bias) scale + shift); a null scale is none.
template <int W> __global__ void interleave(
    const A* x, const A* bias, const A* scale, const A* shift, A* y, long long h, long long w, long long C,
    long long kind) {
  const long long j = blockIdx.x % (2 * w), i = blockIdx.x / (2 * w) % (2 * h), b = blockIdx.x / (4 * w * h);
  x += ((((b * h + i / 2) * w + j / 2) * 2 + i % 2) * 2 + j % 2) * C;
  for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
    Numbers<W> v = load<W>(x + c);
    add_product<W>(v, load<W>(bias + c), A(1));
    for (int k = 0; k < W; k++) {
      if (scale) v.v[k] = v.v[k] * scale[c + k] + shift[c + k];
      v.v[k] = activate(v.v[k], int(kind));
    }
    store<W>(y + blockIdx.x * C + c, v);
  }
}

// (B, h, w, C) -> (B, h / 2, w / 2, C), the largest of every square.
template <int W> __global__ void max_pool(const A* x, A* y, long long h, long long w, long long C) {
  const long long across = w / 2, down = h / 2;
  const long long j = blockIdx.x % across, i = blockIdx.x / across % down, b = blockIdx.x / across / down;
  x += ((b * h + 2 * i) * w + 2 * j) * C;
  for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
    Numbers<W> v = load<W>(x + c);
    for (int k = 1; k < 4; k++) {
      const Numbers<W> other = load<W>(x + (k / 2 * w + k % 2) * C + c);
      for (int l = 0; l < W; l++) v.v[l] = larger(v.v[l], other.v[l]);
    }
    store<W>(y + blockIdx.x * C + c, v);
  }
}

// (B, h, w, C) -> (B, size, size, C), means of cells, summed in float64.  blockIdx.y counts stretches of channels.
__global__ void average_pool(
    const A* x, A* y, long long h, long long w, long long C, long long size) {
  const long long j = blockIdx.x % size, i = blockIdx.x / size % size, b = blockIdx.x / size / size;
  const long long c = blockIdx.y * (long long)blockDim.x + threadIdx.x;
  const long long top = i * h / size, bottom = ((i + 1) * h + size - 1) / size;
  const long long left = j * w / size, right = ((j + 1) * w + size - 1) / size;
  if (c >= C) return;
  double sum = 0;
  for (long long row = top; row < bottom; row++)
    for (long long column = left; column < right; column++) sum += x[((b * h + row) * w + column) * C + c];
  y[blockIdx.x * C + c] = A(sum / double((bottom - top) * (right - left)));
}

// Winograd's F(2x2, 3x3) ---------------------------------------------------------------------------------------------

// B^T d of four numbers that lie `step` apart, in place.
__device__ inline void transform_input(A* d, int step) {
  const A d1 = d[step], d2 = d[2 * step];
  d[0] -= d2;
  d[step] = d1 + d2;
  d[2 * step] = d2 - d1;
  d[3 * step] = d1 - d[3 * step];
}

// A^T m of four numbers that lie `step` apart: the first two places receive the result.
__device__ inline void transform_output(A* m, int step) {
  const A m1 = m[step], m2 = m[2 * step];
  m[0] += m1 + m2;
  m[step] = m1 - m2 - m[3 * step];
}

// x (B, h, w, C) -> v (16, tiles, C): tile number first + blockIdx.x, transformed; blockIdx.y counts stretches of channels.
__global__ void winograd_input(
    const A* x, A* v, long long h, long long w, long long C, long long first, long long tiles) {
  const long long across = (w + 1) / 2, down = (h + 1) / 2, tile = first + blockIdx.x;
  const long long left = tile % across * 2 - 1, top = tile / across % down * 2 - 1, b = tile / across / down;
  const long long c = blockIdx.y * (long long)blockDim.x + threadIdx.x;
  if (c >= C) return;
  A d[16];
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const long long row = top + i, column = left + j;
      const bool inside = row >= 0 && row < h && column >= 0 && column < w;
      d[i * 4 + j] = inside ? x[((b * h + row) * w + column) * C + c] : A(0);
    }
#pragma unroll
  for (int j = 0; j < 4; j++) transform_input(d + j, 4);
#pragma unroll
  for (int i = 0; i < 4; i++) transform_input(d + 4 * i, 1);
#pragma unroll
  for (int p = 0; p < 16; p++) v[(p * tiles + blockIdx.x) * C + c] = d[p];
}

// m (16, tiles, C) -> y (B, h, w, C) = f(products + bias, or + y).
__global__ void winograd_output(
    const A* m, const A* bias, A* y, long long h, long long w, long long C, long long first, long long tiles,
    long long add, long long kind) {
  const long long across = (w + 1) / 2, down = (h + 1) / 2, tile = first + blockIdx.x;
  const long long left = tile % across * 2, top = tile / across % down * 2, b = tile / across / down;
  const long long c = blockIdx.y * (long long)blockDim.x + threadIdx.x;
  if (c >= C) return;
  A d[16];
#pragma unroll
  for (int p = 0; p < 16; p++) d[p] = m[(p * tiles + blockIdx.x) * C + c];
#pragma unroll
  for (int j = 0; j < 4; j++) transform_output(d + j, 4);
#pragma unroll
  for (int i = 0; i < 2; i++) transform_output(d + 4 * i, 1);
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 2; j++)
      if (top + i < h && left + j < w) {
        Numbers<1> sum;
        sum.v[0] = d[i * 4 + j];
        finish<1>(sum, bias, y + ((b * h + top + i) * w + left + j) * C, c, add != 0, int(kind));
      }
}
