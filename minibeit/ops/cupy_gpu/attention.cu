// The kernels of attention; they follow those of kernels.cu.

// (B, N, 3, H, d) + bias -> (3, B, H, N, d).
template <int W> __global__ void split_heads(
    const T* x, const A* bias, T* y, long long B, long long N, long long heads, long long head_size) {
  const int H = int(heads), d = int(head_size), D = H * d;
  const long long b = blockIdx.x / int(N), n = blockIdx.x % int(N);
  for (int c = threadIdx.x * W; c < 3 * D; c += blockDim.x * W) {
    Numbers<W> v = load<W>(x + blockIdx.x * (3LL * D) + c);
    add_product<W>(v, load<W>(bias + c), A(1));
    const int part = c / D, h = c / d % H;
    store<W>(y + (((part * B + b) * H + h) * N + n) * d + c % d, v);
  }
}

// (B, H, N, d) -> (B, N, H, d).
template <int W> __global__ void merge_heads(const T* x, T* y, long long N, long long heads, long long head_size) {
  const int H = int(heads), d = int(head_size);
  const long long b = blockIdx.x / int(N), n = blockIdx.x % int(N);
  for (int c = threadIdx.x * W; c < H * d; c += blockDim.x * W)
    store<W>(y + blockIdx.x * (long long)(H * d) + c, load<W>(x + ((b * H + c / d) * N + n) * d + c % d));
}

// Calls use(b, score) for every number b of a row that is this thread's.  The first KEPT scores of each thread stay in
// registers; longer rows stay where they are.
constexpr int KEPT = 8;
template <class Use> __device__ inline void each_score(A* row, A* kept, int N, Use use) {
#pragma unroll
  for (int i = 0; i < KEPT; i++) {
    const int b = threadIdx.x + i * blockDim.x;
    if (b < N) use(b, kept[i]);
  }
  for (int b = threadIdx.x + KEPT * blockDim.x; b < N; b += blockDim.x) use(b, row[b]);
}

// One row of scores becomes probabilities, in place: softmax(scores + bias), as T from the start of the row on.
// bias = table[index[a, b], h]; `first` is the number of the first (image, head) pair of this chunk.  `probs`, if
// there, receives what is in use before `keep`, the factors of dropout; both are (pairs of this chunk, N, N).
__global__ void softmax(
    A* scores, long long tokens, long long stride, const A* table, long long table_row, long long table_head,
    const int* index, long long H, long long first, A* probs, const A* keep) {
  const int N = int(tokens), a = blockIdx.x % N;
  const long long place = blockIdx.x * (long long)N;
  A* row = scores + blockIdx.x * stride;
  if (table) table += int(first + blockIdx.x / N) % int(H) * table_head;
  A kept[KEPT], largest = A(-3e38), sum = 0;
  each_score(row, kept, N, [&](int b, A& score) {
    score = row[b];
    if (table) score += table[index[a * N + b] * table_row];
    largest = larger(largest, score);
  });
  largest = over_block<true>(largest);
  each_score(row, kept, N, [&](int, A& score) {
    score = exp(score - largest);
    sum += score;
  });
  sum = over_block<false>(sum);
  const auto finished = [&](int b, A score) {
    const A p = score / sum;
    if (probs) probs[place + b] = p;
    return narrow<T>(keep ? p * keep[place + b] : p);
  };
  T* y = reinterpret_cast<T*>(row);
#pragma unroll
  for (int i = 0; i < KEPT; i++) {
    const int b = threadIdx.x + i * blockDim.x;
    if (b < N) y[b] = finished(b, kept[i]);
  }
  for (int b = threadIdx.x + KEPT * blockDim.x; b - int(threadIdx.x) < N; b += blockDim.x) {
    const A score = b < N ? row[b] : A(0);
    if (STORAGE != 0) __syncthreads();  // a T is written over an A that another thread has just read
    if (b < N) y[b] = finished(b, score);
  }
}
