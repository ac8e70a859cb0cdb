// The backward of `attend`: scores are computed again from what the forward kept of each query, so that no (N, N) block
// of an image reaches memory.  Every sum has one owner, which goes through its terms in order.  Follows attend.cu.

// dots (B, H, N) = g . context of each head, and g as an operand of products; a warp for each head of each token.
__global__ void attend_dots(
    const A* g, const T* context, T* operand, A* dots, long long count, long long tokens, long long heads) {
  const long long i = blockIdx.x * (long long)(blockDim.x / 32) + threadIdx.x / 32, place = i * HEAD + threadIdx.x % 32 * 2;
  if (i >= count) return;
  store<2>(operand + place, load<2>(g + place));
  const Numbers<2> x = load<2>(operand + place), y = load<2>(context + place);
  const A dot = over_warp<false>(x.v[0] * y.v[0] + x.v[1] * y.v[1]);
  const int N = int(tokens), H = int(heads), h = i % H;
  if (threadIdx.x % 32 == 0) dots[(i / H / N * H + h) * N + i / H % N] = dot;
}

// What is known of a query: log2 of its sum of powers, and g . context.
struct Query { A size, dot; };
__device__ inline Query query_at(const A* sizes, const A* dots, long long place) { return {sizes[place], dots[place]}; }

// A score becomes a probability, and its product of g and v the gradient of the score; 0 if it is not `there`.
__device__ inline void differentiate(A& score, A& product, const Query& of, A scale, bool there) {
  score = there ? exp2(score * scale - of.size) : A(0);
  product = there ? score * (product - of.dot) : A(0);
}

__device__ inline void as_operand(Pair (&r)[TILE / 16][4], const A (&x)[TILE / 8][4]) {
#pragma unroll
  for (int j = 0; j < TILE / 8; j++)
#pragma unroll
    for (int i = 0; i < 2; i++) r[j / 2][j % 2 * 2 + i] = pair(x[j][2 * i], x[j][2 * i + 1]);
}

__device__ inline void store_rows(
    A* y, const A (&x)[HEAD / 8][4], const int (&rows)[2], int N, long long step, A factor) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (rows[r] >= N) continue;
#pragma unroll
    for (int j = 0; j < HEAD / 8; j++) {
      Numbers<2> v;
      for (int i = 0; i < 2; i++) v.v[i] = x[j][2 * r + i] * factor;
      store<2>(y + rows[r] * step + 8 * j + threadIdx.x % 4 * 2, v);
    }
  }
}

// The arguments of the kernels below.  q, k, v: views as in `attend`; g (B, N, H, 64); bias as in `attend`, `sizes` and
// `dots` (B, H, N); the gradients of q, k and v are parts of y (B, N, 3, H, 64).  `scale` holds log2(e), `factor` not.
#define OPERANDS const T *q, const T *k, const T *v, const T *g, const A *bias, const A *sizes, const A *dots
#define NUMBERS                                                                                               \
  long long tokens, long long heads, long long image_step, long long head_step, long long step, long long bias_step, \
      double scale_

// Which 16 of the queries (or keys) of one head a warp has: those from `begin` on.  Blocks of the same ones of all images are
// neighbours, since they read the same bias.
struct Work { int image, head, begin; };
__device__ inline Work own_work(int N, int H) {
  const int blocks = (N + TILE - 1) / TILE, B = gridDim.x / (blocks * H), rest = blockIdx.x / B;
  return {int(blockIdx.x % B), rest / blocks, rest % blocks * TILE + int(threadIdx.x) / 32 * 16};
}

// Each block: 64 queries of one head.
__global__ void __launch_bounds__(128) attend_backward_queries(OPERANDS, A* y, NUMBERS, double factor) {
  __shared__ Tile keys[2], values[2];
  const int N = int(tokens), H = int(heads);
  const auto [image, head, begin] = own_work(N, H);
  const int number = image * H + head, lane = threadIdx.x % 32, quad = lane % 4;
  const long long place = image * image_step + head * head_step, row = H * (long long)HEAD;
  const int rows[2] = {begin + lane / 4, begin + lane / 4 + 8};
  const A scale = A(scale_);

  load_tile(keys[0], k + place, 0, N, step);
  load_tile(values[0], v + place, 0, N, step);
  commit_copies();
  Pair queries[HEAD / 16][4], cotangents[HEAD / 16][4];
  load_rows(queries, q + place, rows, N, step);
  load_rows(cotangents, g + image * N * row + head * HEAD, rows, N, row);
  Query of[2];
  for (int r = 0; r < 2; r++) of[r] = query_at(sizes, dots, number * (long long)N + min(rows[r], N - 1));
  A sums[HEAD / 8][4] = {};

  for (int from = 0; from < N; from += TILE) {
    const int now = from / TILE % 2;
    if (from + TILE < N) {
      load_tile(keys[1 - now], k + place, from + TILE, N, step);
      load_tile(values[1 - now], v + place, from + TILE, N, step);
    }
    commit_copies();
    A scores[TILE / 8][4], products[TILE / 8][4] = {};
    start_scores(scores, bias, head, rows, from, N, bias_step);
    wait_for_all_groups_but_one();
    __syncthreads();
    const int columns = begin < N ? min(TILE, N - from) : 0;
    add_dots(scores, queries, keys[now], columns);
    add_dots(products, cotangents, values[now], columns);
#pragma unroll
    for (int j = 0; j < TILE / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        differentiate(scores[j][i], products[j][i], of[i / 2], scale, from + 8 * j + 2 * quad + i % 2 < N);
    Pair gradients[TILE / 16][4];
    as_operand(gradients, products);
    add_rows(sums, gradients, keys[now], columns);
    __syncthreads();  // these tiles have been read and may be written over
  }
  store_rows(y + (image * (long long)N * 3 * H + head) * HEAD, sums, rows, N, 3 * row, A(factor));
}

// Each block: 64 keys of one head and their values.  Scores are turned: a row is a key, a column is a query.
__global__ void __launch_bounds__(128) attend_backward_keys(OPERANDS, A* y, NUMBERS, double factor) {
  __shared__ Tile queries[2], cotangents[2];
  const int N = int(tokens), H = int(heads);
  const auto [image, head, begin] = own_work(N, H);
  const int number = image * H + head, lane = threadIdx.x % 32, quad = lane % 4;
  const long long place = image * image_step + head * head_step, row = H * (long long)HEAD;
  const int rows[2] = {begin + lane / 4, begin + lane / 4 + 8};
  const A scale = A(scale_);
  const T* cotangent = g + image * N * row + head * HEAD;

  load_tile(queries[0], q + place, 0, N, step);
  load_tile(cotangents[0], cotangent, 0, N, row);
  commit_copies();
  Pair keys[HEAD / 16][4], values[HEAD / 16][4];
  load_rows(keys, k + place, rows, N, step);
  load_rows(values, v + place, rows, N, step);
  A of_keys[HEAD / 8][4] = {}, of_values[HEAD / 8][4] = {};

  for (int from = 0; from < N; from += TILE) {
    const int now = from / TILE % 2;
    if (from + TILE < N) {
      load_tile(queries[1 - now], q + place, from + TILE, N, step);
      load_tile(cotangents[1 - now], cotangent, from + TILE, N, row);
    }
    commit_copies();
    A scores[TILE / 8][4], products[TILE / 8][4] = {};
#pragma unroll
    for (int j = 0; j < TILE / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int query = min(from + 8 * j + 2 * quad + i % 2, N - 1);
        scores[j][i] = bias ? bias[(head * (long long)N + query) * bias_step + min(rows[i / 2], N - 1)] : A(0);
      }
    wait_for_all_groups_but_one();
    __syncthreads();
    const int columns = begin < N ? min(TILE, N - from) : 0;
    add_dots(scores, keys, queries[now], columns);
    add_dots(products, values, cotangents[now], columns);
#pragma unroll
    for (int j = 0; j < TILE / 8; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int query = from + 8 * j + 2 * quad + i;
        const Query of = query_at(sizes, dots, number * (long long)N + min(query, N - 1));
        for (int r = 0; r < 2; r++) differentiate(scores[j][2 * r + i], products[j][2 * r + i], of, scale, query < N);
      }
    Pair probs[TILE / 16][4], gradients[TILE / 16][4];
    as_operand(probs, scores);
    as_operand(gradients, products);
    add_rows(of_values, probs, cotangents[now], columns);
    add_rows(of_keys, gradients, queries[now], columns);
    __syncthreads();  // these tiles have been read and may be written over
  }
  A* first = y + (image * (long long)N * 3 * H + head) * HEAD;
  store_rows(first + row, of_keys, rows, N, 3 * row, A(factor));
  store_rows(first + 2 * row, of_values, rows, N, 3 * row, A(1));
}

// y (parts, H, N, bias_step) = the gradient of the bias: the sum over the images of each part, in their order.  Each block:
// 64 queries and 64 keys of one head in one part.
__global__ void __launch_bounds__(128) attend_backward_bias(OPERANDS, A* y, NUMBERS, long long images) {
  __shared__ Tile keys[2], values[2];
  const int N = int(tokens), H = int(heads), blocks = (N + TILE - 1) / TILE, parts = gridDim.y;
  const int start = int(images * blockIdx.y / parts), end = int(images * (blockIdx.y + 1) / parts);
  const int head = blockIdx.x / (blocks * blocks), from = blockIdx.x % blocks * TILE;
  const int lane = threadIdx.x % 32, quad = lane % 4, begin = blockIdx.x / blocks % blocks * TILE + threadIdx.x / 32 * 16;
  const long long row = H * (long long)HEAD;
  const int rows[2] = {begin + lane / 4, begin + lane / 4 + 8}, columns = begin < N ? min(TILE, N - from) : 0;
  const A scale = A(scale_);

  load_tile(keys[start % 2], k + start * image_step + head * head_step, from, N, step);
  load_tile(values[start % 2], v + start * image_step + head * head_step, from, N, step);
  commit_copies();
  A biases[TILE / 8][4], sums[TILE / 8][4] = {};
  start_scores(biases, bias, head, rows, from, N, bias_step);
  for (int image = start; image < end; image++) {
    const int now = image % 2;
    const long long place = image * image_step + head * head_step;
    if (image + 1 < end) {
      load_tile(keys[1 - now], k + place + image_step, from, N, step);
      load_tile(values[1 - now], v + place + image_step, from, N, step);
    }
    commit_copies();
    Pair queries[HEAD / 16][4], cotangents[HEAD / 16][4];
    load_rows(queries, q + place, rows, N, step);
    load_rows(cotangents, g + image * N * row + head * HEAD, rows, N, row);
    Query of[2];
    for (int r = 0; r < 2; r++)
      of[r] = query_at(sizes, dots, (image * (long long)H + head) * N + min(rows[r], N - 1));
    A scores[TILE / 8][4], products[TILE / 8][4] = {};
#pragma unroll
    for (int j = 0; j < TILE / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) scores[j][i] = biases[j][i];
    wait_for_all_groups_but_one();
    __syncthreads();
    add_dots(scores, queries, keys[now], columns);
    add_dots(products, cotangents, values[now], columns);
#pragma unroll
    for (int j = 0; j < TILE / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        differentiate(scores[j][i], products[j][i], of[i / 2], scale, from + 8 * j + 2 * quad + i % 2 < N);
        sums[j][i] += products[j][i];
      }
    __syncthreads();  // these tiles have been read and may be written over
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (rows[r] >= N) continue;
#pragma unroll
    for (int j = 0; j < TILE / 8; j++)
      for (int i = 0; i < 2; i++) {
        const int column = from + 8 * j + 2 * quad + i;
        if (column < N) y[((blockIdx.y * H + head) * (long long)N + rows[r]) * bias_step + column] = sums[j][2 * r + i];
      }
  }
}
