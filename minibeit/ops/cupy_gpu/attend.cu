// Attention in one pass, for heads of 64 numbers of T, where that is half precision: scores live in registers and never
// reach memory.  Follows kernels.cu.

// bias (H, N, stride) = table[index[a, b], h] factor; a block for each row.
__global__ void spread_bias(
    const A* table, long long table_row, long long table_head, const int* index, A* bias, long long tokens,
    long long stride, double factor) {
  const int N = int(tokens), a = blockIdx.x % N, h = blockIdx.x / N;
  for (int b = threadIdx.x; b < N; b += blockDim.x)
    bias[blockIdx.x * stride + b] = table[index[a * N + b] * table_row + h * table_head] * A(factor);
}

typedef unsigned Pair;  // two T side by side
__device__ inline Pair pair(A low, A high) {
  Pack<T, 2> p;
  p.v[0] = narrow<T>(low);
  p.v[1] = narrow<T>(high);
  return reinterpret_cast<const Pair&>(p);
}

#ifdef __CUDACC__  // the tests' stand-in for a GPU brings its own
// c (16 x 8) += a (16 x 16) b (16 x 8), spread over a warp as the instruction wants it.
template <class S> __device__ inline void mma_m16n8k16(float* c, const Pair* a, Pair b0, Pair b1) {
#if __CUDA_ARCH__ >= 800
#if STORAGE == 1
#define TYPES "f32.f16.f16.f32"
#else
#define TYPES "f32.bf16.bf16.f32"
#endif
  asm volatile("mma.sync.aligned.m16n8k16.row.col." TYPES " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four 8 x 8 matrices of T from shared memory, whose rows begin where lanes 0 to 7, 8 to 15 and so on say.
template <bool TRANSPOSED> __device__ inline void ldmatrix_x4(Pair* r, const unsigned short* row) {
#if __CUDA_ARCH__ >= 800
  const unsigned place = unsigned(__cvta_generic_to_shared(row));
  if (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(place) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(place) : "memory");
#endif
}

// 16 bytes to shared memory behind the thread's back, zeros where nothing is `there`; a commit closes a group of copies.
__device__ inline void copy_async(void* to, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
  const unsigned place = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(place), "l"(from), "r"(there ? 16 : 0) : "memory");
#endif
}
__device__ inline void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}
__device__ inline void wait_for_all_groups_but_one() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group 1;" : : : "memory");
#endif
}
#endif

constexpr int HEAD = 64, TILE = 64, PITCH = HEAD + 8;  // the pitch puts eight rows into different banks
struct alignas(16) Tile { unsigned short v[TILE * PITCH]; };

// Has keys (or values) number `from` and on of one head brought to shared memory, zeros behind the last.
__device__ inline void load_tile(Tile& tile, const T* x, int from, int N, long long step) {
  for (int i = threadIdx.x; i < TILE * HEAD / 8; i += blockDim.x) {
    const int row = i / (HEAD / 8), column = i % (HEAD / 8) * 8;
    copy_async(tile.v + row * PITCH + column, x + min(from + row, N - 1) * step + column, from + row < N);
  }
}

// Rows of one head as the first operand of products, zeros behind the last: 16 for each warp, of which a thread holds
// two, eight apart.
__device__ inline void load_rows(Pair (&r)[HEAD / 16][4], const T* x, const int (&rows)[2], int N, long long step) {
#pragma unroll
  for (int i = 0; i < HEAD / 4; i++) {
    const int row = rows[i % 2], column = i / 4 * 16 + i / 2 % 2 * 8 + threadIdx.x % 4 * 2;
    r[i / 4][i % 4] = row < N ? *reinterpret_cast<const Pair*>(x + row * step + column) : 0;
  }
}

// c (16 x 64) += a (16 x 64) tile^T, of which the first `columns` columns are wanted.
__device__ inline void add_dots(A (&c)[TILE / 8][4], const Pair (&a)[HEAD / 16][4], const Tile& tile, int columns) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < TILE / 8; j++) {
    if (8 * j >= columns) continue;
#pragma unroll
    for (int i = 0; i < HEAD / 32; i++) {
      Pair b[4];
      ldmatrix_x4<false>(b, tile.v + (8 * j + lane % 8) * PITCH + 32 * i + lane / 8 * 8);
      mma_m16n8k16<T>(c[j], a[2 * i], b[0], b[1]);
      mma_m16n8k16<T>(c[j], a[2 * i + 1], b[2], b[3]);
    }
  }
}

// c (16 x 64) += a (16 x 64) tile, of which the first `rows` rows count.
__device__ inline void add_rows(A (&c)[HEAD / 8][4], const Pair (&a)[TILE / 16][4], const Tile& tile, int rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < TILE / 16; i++) {
    if (16 * i >= rows) continue;
#pragma unroll
    for (int j = 0; j < HEAD / 16; j++) {
      Pair b[4];
      ldmatrix_x4<true>(b, tile.v + (16 * i + lane % 16) * PITCH + 16 * j + lane / 16 * 8);
      mma_m16n8k16<T>(c[2 * j], a[i], b[0], b[1]);
      mma_m16n8k16<T>(c[2 * j + 1], a[i], b[2], b[3]);
    }
  }
}

// Scores of one head begin as the bias (H, N, step) of 16 queries and of the 64 keys behind `from`.
__device__ inline void start_scores(
    A (&c)[TILE / 8][4], const A* bias, int head, const int (&rows)[2], int from, int N, long long step) {
#pragma unroll
  for (int j = 0; j < TILE / 8; j++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int column = from + 8 * j + threadIdx.x % 4 * 2;
      Numbers<2> first = all<2>(A(0));
      if (bias && column < N) first = load<2>(bias + (head * (long long)N + min(rows[r], N - 1)) * step + column);
      c[j][2 * r] = first.v[0];
      c[j][2 * r + 1] = first.v[1];
    }
}

// context (B, N, H, 64) = 2^(scale (q k^T + bias)) v, divided by the sum of the powers, for a scale that holds log2(e).
// q, k and v are views with numbers of a head side by side.  A block of four warps serves 64 queries of one head, 16
// each, and goes through the keys 64 at a time while the next 64 are on their way; a thread holds two rows of scores,
// eight apart, two columns in every eight.  `sizes` (B, H, N), if there, receives log2 of each query's sum of powers.
// Source: Dao et al. 2022 (FlashAttention); Milakov and Gimelshein 2018 for the running maximum.
__global__ void __launch_bounds__(128) attend(
    const T* q, const T* k, const T* v, const A* bias, T* context, A* sizes, long long tokens, long long heads,
    long long image_step, long long head_step, long long step, long long bias_step, double scale_) {
  __shared__ Tile keys[2], values[2];
  const int N = int(tokens), H = int(heads), blocks = (N + TILE - 1) / TILE;
  const int pair_number = blockIdx.x / blocks, image = pair_number / H, head = pair_number % H;
  const int lane = threadIdx.x % 32, quad = lane % 4, begin = blockIdx.x % blocks * TILE + threadIdx.x / 32 * 16;
  const long long place = image * image_step + head * head_step;
  const int rows[2] = {begin + lane / 4, begin + lane / 4 + 8};
  const A scale = A(scale_);

  load_tile(keys[0], k + place, 0, N, step);
  load_tile(values[0], v + place, 0, N, step);
  commit_copies();
  Pair queries[HEAD / 16][4];
  load_rows(queries, q + place, rows, N, step);
  A sums[HEAD / 8][4] = {}, largest[2] = {A(-1e30), A(-1e30)}, total[2] = {0, 0};

  for (int from = 0; from < N; from += TILE) {
    const int now = from / TILE % 2;
    if (from + TILE < N) {
      load_tile(keys[1 - now], k + place, from + TILE, N, step);
      load_tile(values[1 - now], v + place, from + TILE, N, step);
    }
    commit_copies();
    A scores[TILE / 8][4];
    start_scores(scores, bias, head, rows, from, N, bias_step);  // asked for before the keys are waited for
    wait_for_all_groups_but_one();
    __syncthreads();
    const int columns = begin < N ? min(TILE, N - from) : 0;
    add_dots(scores, queries, keys[now], columns);
    A highest[2] = {largest[0], largest[1]};  // NaN need not show here: 2^NaN does
#pragma unroll
    for (int j = 0; j < TILE / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (from + 8 * j + 2 * quad + i % 2 >= N) scores[j][i] = A(-1e30);
        highest[i / 2] = fmax(highest[i / 2], scores[j][i]);
      }
    Pair probs[TILE / 16][4];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      for (int lanes = 1; lanes < 4; lanes *= 2) highest[r] = fmax(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], lanes));
      const A shrink = exp2((largest[r] - highest[r]) * scale), shift = highest[r] * scale;
      largest[r] = highest[r];
      total[r] *= shrink;
#pragma unroll
      for (int j = 0; j < HEAD / 8; j++) sums[j][2 * r] *= shrink, sums[j][2 * r + 1] *= shrink;
#pragma unroll
      for (int j = 0; j < TILE / 8; j++) {
        const A low = exp2(scores[j][2 * r] * scale - shift), high = exp2(scores[j][2 * r + 1] * scale - shift);
        total[r] += low + high;
        probs[j / 2][j % 2 * 2 + r] = pair(low, high);
      }
    }
    add_rows(sums, probs, values[now], columns);
    __syncthreads();  // these tiles have been read and may be written over
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    for (int lanes = 1; lanes < 4; lanes *= 2) total[r] += __shfl_xor_sync(0xffffffffu, total[r], lanes);
    if (rows[r] >= N) continue;
    const A inverse = 1 / total[r];
    if (sizes && quad == 0) sizes[pair_number * (long long)N + rows[r]] = largest[r] * scale + log2(total[r]);
    T* y = context + ((image * (long long)N + rows[r]) * H + head) * HEAD + 2 * quad;
#pragma unroll
    for (int j = 0; j < HEAD / 8; j++)
      *reinterpret_cast<Pair*>(y + 8 * j) = pair(sums[j][2 * r] * inverse, sums[j][2 * r + 1] * inverse);
  }
}
