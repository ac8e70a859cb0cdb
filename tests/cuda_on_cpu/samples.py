"""Small CUDA C++ sources for the tests of the emulation: right ones, and one for each mistake it must report."""

HALVES = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
extern "C" __global__ void narrow(const float* x, __half* h, __nv_bfloat16* b, long long n) {
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < n) { h[i] = __float2half(x[i]); b[i] = __float2bfloat16(x[i]); }
}
extern "C" __global__ void widen(const __half* h, float* x, long long n) {
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < n) x[i] = __half2float(h[i]);
}
extern "C" __global__ void arithmetic(const __half* a, const __half* b, __half* y, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    __half2 pair(a[i], b[i]);
    y[i] = a[i] * b[i] + pair.x;
  }
}
"""

ROWS = """
__device__ __forceinline__ float warp_sum(float x) {
  #pragma unroll
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
// One warp a row.
extern "C" __global__ void softmax(const float* __restrict__ x, float* __restrict__ y, int columns) {
  const float* row = x + blockIdx.x * columns;
  float largest = -1e38f, sum = 0;
  for (int i = threadIdx.x; i < columns; i += warpSize) largest = fmaxf(largest, __ldg(row + i));
  for (int step = 16; step > 0; step >>= 1) {
    float other = __shfl_down_sync(0xffffffffu, largest, step);
    largest = max(largest, other);
  }
  largest = __shfl_sync(0xffffffffu, largest, 0);
  for (int i = threadIdx.x; i < columns; i += warpSize) sum += __expf(row[i] - largest);
  sum = warp_sum(sum);
  for (int i = threadIdx.x; i < columns; i += warpSize) y[blockIdx.x * columns + i] = __expf(row[i] - largest) / sum;
}
// One block a row: static and dynamic shared memory, a template on type and block size.
template <typename T, int BLOCK>
__global__ void __launch_bounds__(BLOCK) layer_norm(const T* x, T* y, int columns, T eps) {
  __shared__ T parts[BLOCK / 32];
  extern __shared__ __align__(16) T row[];
  T sum = 0;
  for (int i = threadIdx.x; i < columns; i += BLOCK) sum += row[i] = x[blockIdx.x * columns + i];
  for (int pass = 0; pass < 2; ++pass) {
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    T total = 0;
    for (int i = 0; i < BLOCK / 32; ++i) total += parts[i];
    total /= columns;
    __syncthreads();
    if (pass == 1) sum = 1 / sqrt(total + eps);
    else {
      sum = 0;
      for (int i = threadIdx.x; i < columns; i += BLOCK) { row[i] -= total; sum += row[i] * row[i]; }
    }
  }
  for (int i = threadIdx.x; i < columns; i += BLOCK) y[blockIdx.x * columns + i] = row[i] * sum;
}
"""

MISTAKES = """
extern "C" __global__ void divergent(float* x) {
  if (threadIdx.x < 32) __syncthreads();
  else {
    __syncthreads(); }
  x[threadIdx.x] = 1;
}
extern "C" __global__ void leaves_early(float* x) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  x[threadIdx.x] = 1;
}
extern "C" __global__ void half_a_warp(float* x) {
  if (threadIdx.x < 16) x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}
extern "C" __global__ void absent_lane(float* x) {
  x[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1.0f, 1);
}
extern "C" __global__ void writes_behind(float* x, int n) { x[n + threadIdx.x] = 1; }
extern "C" __global__ void reads_before(float* x) { x[0] = x[-1024]; }
extern "C" __global__ void misaligned(float* x) {
  struct alignas(16) Four { float v[4]; };
  *reinterpret_cast<Four*>(x + 1 + threadIdx.x) = Four{};
}
extern "C" __global__ void index_outside(float* x, int i) {
  float kept[4] = {1, 2, 3, 4};
  x[0] = kept[i];
}
// No barrier between writing and reading.  In one of the two orders of the threads this is seen.
extern "C" __global__ void races_forwards(float* x) {
  __shared__ float kept[64];
  kept[threadIdx.x] = threadIdx.x;
  x[threadIdx.x] = kept[63 - threadIdx.x];
}
extern "C" __global__ void races_backwards(float* x) {
  __shared__ float kept;
  if (threadIdx.x == 0) kept = 7;
  x[threadIdx.x] = kept;
}
// A barrier is missing after the reading: the first warp writes for the second round while another still reads.
extern "C" __global__ void overtakes(float* x) {
  __shared__ float kept[2];
  for (int round = 0; round < 2; ++round) {
    float value = round * 10 + __shfl_sync(0xffffffffu, (float)(threadIdx.x / 32), 0);
    if (threadIdx.x % 32 == 0) kept[threadIdx.x / 32] = value;
    __syncthreads();
    x[round * 64 + threadIdx.x] = kept[0] + kept[1];
  }
}
"""
