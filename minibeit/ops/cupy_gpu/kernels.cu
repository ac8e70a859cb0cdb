// The kernels of the CUDA backend.  kernels.py puts in front of this text:
//   A        what is calculated in, and the type of every array that model code sees: float or double
//   T        what matrix products read: A itself, __half or __nv_bfloat16
//   STORAGE  which of the three T is: 0, 1, 2
// and the headers of T.  One block serves one row (a token, a pixel, a row of scores), its threads run along the row.
// W numbers are loaded and stored at a time: 4 where the row's length allows it.  Attention and maps have files of their
// own.  Sizes come as 64-bit numbers, as CuPy passes integers of Python; what is divided by within a row is made 32-bit
// first, since a GPU divides 64-bit numbers by long code.

__device__ inline A wide(A x) { return x; }
#if STORAGE == 1
__device__ inline A wide(T x) { return __half2float(x); }
#elif STORAGE == 2
__device__ inline A wide(T x) { return __bfloat162float(x); }
#endif

template <class S> __device__ inline S narrow(A x);
template <> __device__ inline A narrow<A>(A x) { return x; }
#if STORAGE == 1
template <> __device__ inline T narrow<T>(A x) { return __float2half_rn(x); }
#elif STORAGE == 2
template <> __device__ inline T narrow<T>(A x) { return __float2bfloat16_rn(x); }
#endif

template <class S, int W> struct alignas(W * sizeof(S)) Pack { S v[W]; };

template <int W> struct Numbers { A v[W]; };

template <int W, class S> __device__ inline Numbers<W> load(const S* x) {
  const Pack<S, W> p = *reinterpret_cast<const Pack<S, W>*>(x);
  Numbers<W> r;
  for (int i = 0; i < W; i++) r.v[i] = wide(p.v[i]);
  return r;
}

template <int W, class S> __device__ inline void store(S* x, const Numbers<W>& r) {
  Pack<S, W> p;
  for (int i = 0; i < W; i++) p.v[i] = narrow<S>(r.v[i]);
  *reinterpret_cast<Pack<S, W>*>(x) = p;
}

template <int W> __device__ inline Numbers<W> all(A x) {
  Numbers<W> r;
  for (int i = 0; i < W; i++) r.v[i] = x;
  return r;
}

template <int W> __device__ inline void add_product(Numbers<W>& sum, const Numbers<W>& x, A factor) {
  for (int i = 0; i < W; i++) sum.v[i] += x.v[i] * factor;
}

// NaN must pass through, which fmax would swallow.
__device__ inline A larger(A x, A y) { return y > x || y != y ? y : x; }
__device__ inline A clip(A x, A low, A high) { return x < low ? low : x > high ? high : x; }

// The same sum (or maximum) in every thread of a warp.
template <bool MAXIMUM> __device__ A over_warp(A x) {
  for (int step = 16; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(0xffffffffu, x, step);
    x = MAXIMUM ? larger(x, other) : x + other;
  }
  return x;
}

// The same in every thread of the block, whose size is a multiple of 32.
template <bool MAXIMUM> __device__ A over_block(A x) {
  __shared__ A parts[32];
  x = over_warp<MAXIMUM>(x);
  if (blockDim.x == 32) return x;
  __syncthreads();  // the parts of the reduction before this one have been read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[0];
  for (int i = 1; i < blockDim.x / 32; i++) x = MAXIMUM ? larger(x, parts[i]) : x + parts[i];
  return x;
}

// Activations: the numbers are those of kernels.ACTIVATIONS ----------------------------------------------------------

// erfc keeps the digits of the left tail, which half precision does not have: there erf, half the work, does.
__device__ inline A gelu(A x) {
  const A scaled = x * A(0.70710678118654752440);
  return A(0.5) * x * (STORAGE == 0 ? erfc(-scaled) : 1 + erf(scaled));
}
__device__ inline A gelu_tanh(A x) {
  return A(0.5) * x * (1 + tanh(A(0.79788456080286535588) * (x + A(0.044715) * x * x * x)));
}
__device__ inline A sigmoid(A x) {
  const A small = exp(-fabs(x));
  return (x >= 0 ? A(1) : small) / (1 + small);
}
__device__ inline A softplus(A x) { return larger(x, A(0)) + log1p(exp(-fabs(x))); }

__device__ inline A activate(A x, int kind) {
  switch (kind) {
    case 1: return gelu(x);
    case 2: return x < 0 ? A(0) : x;
    case 3: return gelu_tanh(x);
    case 4: return clip(gelu(x), A(-10), A(10));
    case 5: return x * clip(x + 3, A(0), A(6)) / 6;
    case 6: return A(0.5) * erfc(-(x - A(0.707107)) / A(0.282095 * 1.41421356237309504880));
    case 7: return x >= 0 ? x : A(0.01) * x;
    case 8: return x * tanh(softplus(x));
    case 9: return x * sigmoid(A(1.702) * x);
    case 10: return x < 0 ? A(0) : x * x;
    case 11: return clip(x, A(0), A(6));
    case 12: return sigmoid(x);
    case 13: return x * sigmoid(x);
    case 14: return sqrt(softplus(x));
    case 15: return tanh(x);
    default: return x;
  }
}

// f of all numbers; which f is asked once for all of them, so that the usual one may be interleaved.
template <int W> __device__ inline void activate_all(Numbers<W>& x, int kind) {
  if (kind == 1) {
    for (int i = 0; i < W; i++) x.v[i] = gelu(x.v[i]);
  } else if (kind != 0) {
    for (int i = 0; i < W; i++) x.v[i] = activate(x.v[i], kind);
  }
}

// y = f(x + bias), or f(x + what is in y) where `add`; a null bias is none.
template <int W> __device__ inline void finish(Numbers<W> x, const A* bias, A* y, long long c, bool add, int kind) {
  if (add) add_product<W>(x, load<W>(y + c), A(1));
  if (bias) add_product<W>(x, load<W>(bias + c), A(1));
  activate_all<W>(x, kind);
  store<W>(y + c, x);
}

// Rows ---------------------------------------------------------------------------------------------------------------

// A warp for each row: nothing waits for a barrier, and a row is read again from the first-level cache.
template <int W> __global__ void layer_norm(
    const A* x, const A* weight, const A* bias, T* y, long long rows, long long D, double eps) {
  const long long row = blockIdx.x * (long long)(blockDim.x / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  x += row * D;
  y += row * D;
  const int step = 32 * W, first = threadIdx.x % 32 * W;
  A sum = 0;
  for (int c = first; c < D; c += step) {
    const Numbers<W> v = load<W>(x + c);
    for (int i = 0; i < W; i++) sum += v.v[i];
  }
  const A mean = over_warp<false>(sum) / A(D);
  A squares = 0;
  for (int c = first; c < D; c += step) {
    const Numbers<W> v = load<W>(x + c);
    for (int i = 0; i < W; i++) squares += (v.v[i] - mean) * (v.v[i] - mean);
  }
  const A deviation = sqrt(over_warp<false>(squares) / A(D) + A(eps));
  for (int c = first; c < D; c += step) {
    Numbers<W> v = load<W>(x + c);
    const Numbers<W> w = load<W>(weight + c), b = load<W>(bias + c);
    for (int i = 0; i < W; i++) v.v[i] = (v.v[i] - mean) / deviation * w.v[i] + b.v[i];
    store<W>(y + c, v);
  }
}

// y = f(y + bias) in place.
template <int W, class S> __global__ void bias_activation(S* y, const A* bias, long long C, long long kind) {
  y += blockIdx.x * C;
  for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
    Numbers<W> v = load<W>(y + c);
    if (bias) add_product<W>(v, load<W>(bias + c), A(1));
    activate_all<W>(v, int(kind));
    store<W>(y + c, v);
  }
}

// y = residual + keep scale (x + bias), with a factor `keep` for every `share` rows; a null scale or keep is one.
template <int W> __global__ void residual(
    const T* x, const A* bias, const A* scale, const A* before, const A* keep, long long share, A* y, long long C) {
  const long long row = blockIdx.x * C;
  const A factor = keep ? keep[blockIdx.x / share] : A(1);
  for (int c = threadIdx.x * W; c < C; c += blockDim.x * W) {
    Numbers<W> v = load<W>(x + row + c);
    if (bias) add_product<W>(v, load<W>(bias + c), A(1));
    const Numbers<W> s = scale ? load<W>(scale + c) : all<W>(A(1)), r = load<W>(before + row + c);
    for (int i = 0; i < W; i++) v.v[i] = r.v[i] + factor * (s.v[i] * v.v[i]);
    store<W>(y + row + c, v);
  }
}

template <int W, class From, class To> __global__ void convert(const From* x, To* y, long long count) {
  const long long i = (blockIdx.x * (long long)blockDim.x + threadIdx.x) * W;
  if (i < count) store<W>(y + i, load<W>(x + i));
}
