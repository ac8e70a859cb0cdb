// AdamW over flat vectors, its clipping and its loss scale.  optimizer.py puts in front of this text:
//   A        float or double: what weights, gradients and moments are
//   THREADS  in a block
// A chunk is a run of elements of one parameter, {number of the parameter, first element, end}; a block has one chunk.
// Sums are made in double precision and in one order, so that they are the same in every run.

enum { SCALE, GOOD, STOPPED };                       // of `control`, which lives from step to step
enum { LOSS, NORM, NEXT_SCALE, NEXT_GOOD, FINITE };  // of `told`, what the host is told of one step
enum { MADE, SHRINK, ROOT, SIZE, GRADIENT, FACTORS };  // of `factors`, for each parameter

// The same in every thread.
__device__ double block_sum(double x) {
  __shared__ double parts[THREADS];
  parts[threadIdx.x] = x;
  __syncthreads();
  for (int half = THREADS / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    __syncthreads();
  }
  return parts[0];
}

extern "C" __global__ void sums_of_squares(
    const A* gradient, const long long* chunks, const unsigned char* present, double* sums) {
  const long long* chunk = chunks + 3 * blockIdx.x;
  double sum = 0;
  if (present[chunk[0]]) {
    for (long long i = chunk[1] + threadIdx.x; i < chunk[2]; i += THREADS) {
      const double x = gradient[i];
      sum += x * x;
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// One block.  From the sums of squares: the norm, whether there is a step to make, and what each parameter's needs.
// Gradients are those of SCALE times the loss.  With an `interval` a step whose gradients are not finite is left out and
// halves SCALE, which doubles after so many good steps; without, or if it is the loss, nothing is changed any more.
extern "C" __global__ void plan(
    const double* sums, long long blocks, const A* loss, const unsigned char* present, const double* rates,
    const double* decays, long long* steps, double* factors, double* control, double* told, long long parameters,
    double rate, double b1, double b2, double largest, long long interval) {
  double sum = 0;
  for (long long i = threadIdx.x; i < blocks; i += THREADS) sum += sums[i];
  const double scale = control[SCALE], norm = sqrt(block_sum(sum)) / scale;
  const bool finite = isfinite(norm) && isfinite(double(loss[0]));
  const bool step = finite && control[STOPPED] == 0;
  const double clip = largest / (norm + 1e-6);
  for (long long i = threadIdx.x; i < parameters; i += THREADS) {
    const bool made = step && present[i];
    if (made) steps[i] += 1;
    const double own = rate * rates[i], t = double(steps[i]);
    double* f = factors + FACTORS * i;
    f[MADE] = made;
    f[SHRINK] = 1 - own * decays[i];
    f[ROOT] = made ? 1 / sqrt(1 - pow(b2, t)) : 0;
    f[SIZE] = made ? own / (1 - pow(b1, t)) : 0;
    f[GRADIENT] = (clip < 1 ? clip : 1) / scale;
  }
  __syncthreads();  // all have read `control`
  if (threadIdx.x != 0) return;
  if (interval > 0 && isfinite(double(loss[0]))) {
    control[GOOD] = finite ? control[GOOD] + 1 : 0;
    if (!finite) control[SCALE] = scale / 2;
    if (control[GOOD] >= interval) {
      control[SCALE] = scale * 2;
      control[GOOD] = 0;
    }
  } else if (!finite) {
    control[STOPPED] = 1;
  }
  told[LOSS] = loss[0];
  told[NORM] = norm;
  told[NEXT_SCALE] = control[SCALE];
  told[NEXT_GOOD] = control[GOOD];
  told[FINITE] = finite;
}

extern "C" __global__ void adamw(
    A* weights, const A* gradient, A* mean, A* square, const long long* chunks, const double* factors, double b1,
    double b2, double eps) {
  const long long* chunk = chunks + 3 * blockIdx.x;
  const double* f = factors + FACTORS * chunk[0];
  if (f[MADE] == 0) return;
  const A shrink = f[SHRINK], root = f[ROOT], size = f[SIZE], factor = f[GRADIENT], tiny = eps;
  const A keep_square = b2, new_mean = 1 - b1, new_square = 1 - b2;
  for (long long i = chunk[1] + threadIdx.x; i < chunk[2]; i += THREADS) {
    const A g = gradient[i] * factor;
    const A m = mean[i] + new_mean * (g - mean[i]);
    const A v = square[i] * keep_square + new_square * (g * g);
    mean[i] = m;
    square[i] = v;
    weights[i] = weights[i] * shrink - size * m / (sqrt(v) * root + tiny);
  }
}

extern "C" __global__ void average(A* average, const A* weights, long long count, double share) {
  const long long i = blockIdx.x * (long long)THREADS + threadIdx.x;
  if (i < count) average[i] += A(share) * (weights[i] - average[i]);
}
