// Multi-scale deformable attention on the GPU. deformable_attn_kernel.cpp is the same thing as plain loops: read it first.
//
// What it computes: for image b, query q and head m, output[d] = sum over the L K looks of A * bilinear(value, x, y)[d].
//
// Layouts: value (B, S, M, D), points (B, Nq, M, L, K, 2), weights (B, Nq, M, L, K), reference (B, Nq, L, 2 or 4), output
// (B, Nq, M, D), all contiguous and 16-byte aligned. T is the type of the values (double, float, half, bfloat16), C the type
// of every sum (double for double, else float). Plain form (reference_size 0): points are locations and weights are weights,
// in C. Fused form: points are offsets and weights logits, in T; softmax and locations are worked out here.
//
// Who owns what: a row (b, q, m) belongs to a group of G neighbouring lanes. Two jobs alternate, G looks at a time:
//   1. lane j finds out where look j of this round goes: four tokens and four weights, left in shared memory;
//   2. all lanes walk over the G looks together, each lane reading 16 bytes of channels of each corner.
// So a look is worked out once, not once per channel, and a group reads 128 (float) or 64 bytes (half) in one piece.
//
// Why it is fast: the obvious kernel (one thread per channel) is bound by the number of instructions it issues; here one
// lane carries 4 to 8 channels, which divides them by about six. Second comes the traffic from L2 to L1: a block works on one
// head only, and in the encoder (where the queries are the tokens) on a two-dimensional tile of 8 columns of queries, whose
// looks overlap. The mapping is only an order of work: any other would give the same result. Level shapes travel as kernel
// arguments: no device memory is read for them and the host never waits.
//
// Backward: see the derivation above `backward`. grad_value rows are shared by all queries that look there, so they are
// added to with atomics, in whatever order the hardware takes them: this is the only source of nondeterminism. In the
// deterministic form `backward` writes down each look's cell and corner weights instead, the caller sorts the looks by cell,
// and `sum_by_cell` adds every row up in sorted order, each row by one group, without atomics.
//
// Numbers that are not: a NaN location makes its own row NaN and adds nothing to grad_value.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cstdint>
#include <type_traits>

struct Problem {                                             // the same struct stands in the .cpp file and in Python
  const void *value, *points, *weights, *reference, *grad_output;
  void *output, *grad_value, *grad_points, *grad_weights, *grad_locations;    // grad_locations: only where wanted
  void *cells, *corner_weights;                              // deterministic backward: each look's cell (null: atomics) and
  const void *rows, *first;                                  // weights; sorted by cell, its row and where each cell begins
  int64_t B, S, Nq;
  int M, D, L, K, reference_size, threads, H[32], W[32], start[32];        // start: a level's first token
};

#define DEVICE __device__ __forceinline__

// ---- Helpers --------------------------------------------------------------------------------------------------------

template <typename T> struct Sum { using type = float; };
template <> struct Sum<double> { using type = double; };

template <typename T> constexpr int V = 16 / sizeof(T);                     // channels of one 16-byte load
template <typename T> constexpr int G = sizeof(T) == 2 ? 4 : 8;             // lanes of a group: 32 channels a step (double: 16)
template <typename T, bool VECTOR> constexpr int UNIT = VECTOR ? V<T> : 1;  // places in a map are counted in units of so many
constexpr int THREADS = 256, TILE_WIDTH = 8;                                // channels: 32 bits then suffice for 64 GB
constexpr unsigned ALL_LANES = 0xffffffff;

DEVICE double up(double x) { return x; }
DEVICE float up(float x) { return x; }
DEVICE float up(__half x) { return __half2float(x); }
DEVICE float up(__nv_bfloat16 x) { return __bfloat162float(x); }
DEVICE void put(double& to, double x) { to = x; }
DEVICE void put(float& to, float x) { to = x; }
DEVICE void put(__half& to, float x) { to = __float2half_rn(x); }
DEVICE void put(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// The address `place` units on: a 32-bit multiplication and a 64-bit addition in one instruction.
template <int UNIT, typename T> DEVICE T* advance(T* base, unsigned place) {
  return reinterpret_cast<T(*)[UNIT]>(base)[place];
}

// N channels from `from`. VECTOR: D is a multiple of V and all N exist. Otherwise `left` of them do, the rest read as zero.
template <int N, bool VECTOR, typename T, typename C> DEVICE void load(const T* from, int left, C (&to)[N]) {
  constexpr int BYTES = N * sizeof(T);
  if constexpr (VECTOR && (BYTES == 16 || BYTES == 8)) {
    using Raw = typename std::conditional<BYTES == 16, uint4, uint2>::type;
    const Raw raw = __ldg(reinterpret_cast<const Raw*>(from));
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = up(reinterpret_cast<const T*>(&raw)[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = i < left ? up(from[i]) : C(0);
  }
}

template <int N, bool VECTOR, typename T, typename C> DEVICE void store(T* to, int left, const C (&from)[N]) {
  if constexpr (VECTOR && N * sizeof(T) == 16) {
    uint4 raw;
#pragma unroll
    for (int i = 0; i < N; i++) put(reinterpret_cast<T*>(&raw)[i], from[i]);
    if (left > 0) *reinterpret_cast<uint4*>(to) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i < left) put(to[i], from[i]);
  }
}

// On Hopper and later four additions are one instruction, which the memory executes as one access.
DEVICE void add4(float* to, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900 && __CUDACC_VER_MAJOR__ >= 12
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
#else
  for (int i = 0; i < 4; i++) atomicAdd(to + i, x[i]);
#endif
}

template <int N, bool VECTOR, typename C> DEVICE void add(C* to, int left, const C (&x)[N]) {
  if constexpr (VECTOR && N == 4) {
    if (left > 0) add4(to, x);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i < left) atomicAdd(to + i, x[i]);
  }
}

template <typename C> DEVICE C sum_over_group(C x, int lanes) {
  for (int step = lanes / 2; step; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}

// Which row this group works on. Blocks run over tiles of queries, then heads, then images.
struct Row { int b, q, m; bool valid; int64_t index; };      // not valid: beyond the edge of a map; such a group reads query 0
template <int LANES> DEVICE Row find_row(const Problem& p, int tiles) {
  const int groups = blockDim.x / LANES, group = threadIdx.x / LANES, bm = blockIdx.x / tiles;
  int tile = blockIdx.x % tiles, q = tile * groups + group;
  bool valid = q < p.Nq;
  if (p.Nq == p.S) {                                         // queries are tokens: 2-D tiles, level by level
    const int height = groups / TILE_WIDTH;
    int l = 0, columns = (p.W[0] + TILE_WIDTH - 1) / TILE_WIDTH, rows = (p.H[0] + height - 1) / height;
    while (tile >= columns * rows) {
      tile -= columns * rows, l++;
      columns = (p.W[l] + TILE_WIDTH - 1) / TILE_WIDTH, rows = (p.H[l] + height - 1) / height;
    }
    const int y = tile / columns * height + group / TILE_WIDTH, x = tile % columns * TILE_WIDTH + group % TILE_WIDTH;
    valid = y < p.H[l] && x < p.W[l];
    q = p.start[l] + y * p.W[l] + x;
  }
  Row row{bm / p.M, valid ? q : 0, bm % p.M, valid, 0};
  row.index = (row.b * p.Nq + row.q) * p.M + row.m;
  return row;
}

template <typename C> struct alignas(16) Four { C at[4]; };  // corners: top left, top right, bottom left, bottom right
template <typename C> struct Look {
  Four<unsigned> place;                                      // where the corner's values begin, in units; clamped into the map
  Four<C> area;                                              // bilinear weight, 0 where the corner lies outside
  C A, fx, fy, sx, sy;                                       // pixel = center + scale * point - 1/2
  int H, W, x0, y0;
  bool seen;                                                 // false: all four corners lie outside
};

// The softmax over a row's logits is exp(logit - top) / sum.
template <typename C> struct Softmax { C top, sum; };
template <typename T, typename C = typename Sum<T>::type>
DEVICE Softmax<C> softmax(const Problem& p, const Row& row, int lane) {
  const int LK = p.L * p.K;
  const T* logit = static_cast<const T*>(p.weights) + row.index * LK;
  C top = up(logit[0]), sum = 0;
  for (int i = lane; i < LK; i += G<T>) top = up(logit[i]) > top ? up(logit[i]) : top;
  for (int step = G<T> / 2; step; step /= 2) {
    const C other = __shfl_xor_sync(ALL_LANES, top, step);
    top = other > top ? other : top;
  }
  for (int i = lane; i < LK; i += G<T>) sum += exp(up(logit[i]) - top);
  return {top, sum_over_group(sum, G<T>)};
}

template <typename T, bool VECTOR, typename C>
DEVICE Look<C> prepare(const Problem& p, const Row& row, Softmax<C> soft, int i) {
  Look<C> look;
  const int64_t n = row.index * p.L * p.K + i;
  const int R = p.reference_size, l = p.K == 4 ? i >> 2 : i / p.K, H = p.H[l], W = p.W[l];
  C cx = 0, cy = 0, px, py;
  if (R) {                                                   // fused: softmax, and `sampling_locations` of the Python file
    const C* ref = static_cast<const C*>(p.reference) + ((row.b * p.Nq + row.q) * p.L + l) * R;
    const T* offset = static_cast<const T*>(p.points) + 2 * n;
    px = up(offset[0]), py = up(offset[1]);
    look.A = exp(up(static_cast<const T*>(p.weights)[n]) - soft.top) / soft.sum;
    look.sx = R == 2 ? 1 : ref[2] * W / (2 * p.K), look.sy = R == 2 ? 1 : ref[3] * H / (2 * p.K);
    cx = ref[0] * W, cy = ref[1] * H;
  } else {
    const C* location = static_cast<const C*>(p.points) + 2 * n;
    px = location[0], py = location[1];
    look.A = static_cast<const C*>(p.weights)[n];
    look.sx = W, look.sy = H;
  }
  C x = cx + look.sx * px - C(0.5), y = cy + look.sy * py - C(0.5);
  if (x != x || y != y) look.A = x + y;                      // NaN
  look.seen = x > -1 && y > -1 && x < W && y < H;
  if (!look.seen) x = y = 0;
  const int x0 = static_cast<int>(floor(x)), y0 = static_cast<int>(floor(y)), x1 = x0 + 1, y1 = y0 + 1;
  look.H = H, look.W = W, look.x0 = x0, look.y0 = y0, look.fx = x - x0, look.fy = y - y0;
  const C left = look.seen && x0 >= 0 ? 1 - look.fx : 0, right = look.seen && x1 < W ? look.fx : 0;
  const C above = y0 >= 0 ? 1 - look.fy : 0, below = y1 < H ? look.fy : 0;
  look.area = {above * left, above * right, below * left, below * right};
  const unsigned stride = p.M * p.D / UNIT<T, VECTOR>;
  const unsigned from_left = max(x0, 0) * stride, from_above = (p.start[l] + max(y0, 0) * W) * stride;
  const unsigned from_right = min(x1, W - 1) * stride, from_below = (p.start[l] + min(y1, H - 1) * W) * stride;
  look.place = {from_above + from_left, from_above + from_right, from_below + from_left, from_below + from_right};
  return look;
}

// Every level has (H + 1) (W + 1) cells: the squares between pixel centres, and half of one around the map.
DEVICE int first_cell(const Problem& p, int64_t b, int m, int level) {
  int before = 0, cells = 0;
  for (int l = 0; l < p.L; l++) {
    if (l == level) before = cells;
    cells += (p.H[l] + 1) * (p.W[l] + 1);
  }
  return (b * p.M + m) * cells + before;
}

// ---- Forward --------------------------------------------------------------------------------------------------------

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(THREADS, 4) forward(const __grid_constant__ Problem p, int tiles) {
  using C = typename Sum<T>::type;
  __shared__ Four<unsigned> places[THREADS];
  __shared__ Four<C> weights[THREADS];
  const int lane = threadIdx.x % G<T>, group = threadIdx.x - lane, LK = p.L * p.K;
  const Row row = find_row<G<T>>(p, tiles);
  const T* value = static_cast<const T*>(p.value) + (row.b * p.S * p.M + row.m) * p.D;
  Softmax<C> soft{};
  if (p.reference_size) soft = softmax<T>(p, row, lane);
  for (int step = 0; step < p.D; step += G<T> * V<T>) {
    const int d = step + lane * V<T>, read = VECTOR ? min(d, p.D - V<T>) : d;       // beyond D: read something, write nothing
    C sum[V<T>] = {};
    for (int first = 0; first < LK; first += G<T>) {
      const Look<C> look = prepare<T, VECTOR>(p, row, soft, min(first + lane, LK - 1));
      const C A = first + lane < LK ? look.A : 0;            // a last round of fewer than G looks repeats one with weight 0
      __syncwarp();                                          // the previous round has been read
      places[threadIdx.x] = look.place;
      weights[threadIdx.x] = {A * look.area.at[0], A * look.area.at[1], A * look.area.at[2], A * look.area.at[3]};
      __syncwarp();
#pragma unroll
      for (int j = 0; j < G<T>; j++) {
        const Four<unsigned> place = places[group + j];
        const Four<C> weight = weights[group + j];
#pragma unroll
        for (int c = 0; c < 4; c++) {
          C v[V<T>];
          load<V<T>, VECTOR>(advance<UNIT<T, VECTOR>>(value + read, place.at[c]), p.D - d, v);
#pragma unroll
          for (int e = 0; e < V<T>; e++) sum[e] += weight.at[c] * v[e];
        }
      }
    }
    if (row.valid) store<V<T>, VECTOR>(static_cast<T*>(p.output) + row.index * p.D + d, p.D - d, sum);
  }
}

// ---- Backward -------------------------------------------------------------------------------------------------------
//
// One look, its corner values v0 v1 / v2 v3 (0 outside), fractions fx, fy, and g = d loss / d output:
//   bilinear = (1 - fy) ((1 - fx) v0 + fx v1) + fy ((1 - fx) v2 + fx v3),    output = sum over looks of A bilinear.
//   1. output is linear in the values:    d loss / d v_c = A area_c g                     added up over all looks at that token
//   2. output is linear in A:             d loss / d A   = g . bilinear = sum_c area_c (g . v_c)
//   3. d bilinear / d x = d bilinear / d fx = (1 - fy) (v1 - v0) + fy (v3 - v2), so
//                                         d loss / d x   = A ((1 - fy) (g . v1 - g . v0) + fy (g . v3 - g . v2)), y alike;
//      x = center + scale * point - 1/2, so the point's gradient is scale times that.
// Fused: with A = softmax(logits), d loss / d logit = A (d loss / d A - sum_i A_i d loss / d A_i), and the sum is g . output.
// So four dot products over channels, g . v_c, are all that a look needs; each lane has a part of each.

// Adds dot[j] up over the lanes of a group and leaves the total of look j in dot[0] of lane j, who prepared look j. Each
// step sends away the half of the looks that belongs to the other half of the lanes: G - 1 exchanges instead of G log2 G.
template <int HALF, int N, typename C> DEVICE void reduce_scatter(C (&dot)[N][4], int lane) {
#pragma unroll
  for (int j = 0; j < HALF; j++)
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const C keep = lane & HALF ? dot[j + HALF][c] : dot[j][c], send = lane & HALF ? dot[j][c] : dot[j + HALF][c];
      dot[j][c] = keep + __shfl_xor_sync(ALL_LANES, send, HALF);
    }
  if constexpr (HALF > 1) reduce_scatter<HALF / 2>(dot, lane);
}

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(THREADS, 2) backward(const __grid_constant__ Problem p, int tiles) {
  using C = typename Sum<T>::type;
  constexpr int N = 16 / sizeof(C);                          // channels of one 16-byte addition
  __shared__ Four<unsigned> places[THREADS];
  __shared__ Four<C> weights[THREADS];
  const int lane = threadIdx.x % G<T>, group = threadIdx.x - lane, LK = p.L * p.K, R = p.reference_size;
  const Row row = find_row<G<T>>(p, tiles);
  const int64_t image_and_head = (row.b * p.S * p.M + row.m) * p.D;
  const T* value = static_cast<const T*>(p.value) + image_and_head;
  const T* grad_output = static_cast<const T*>(p.grad_output) + row.index * p.D;
  C* grad_value = static_cast<C*>(p.grad_value) + image_and_head;
  Softmax<C> soft{};
  C mean = 0;
  if (R) {
    soft = softmax<T>(p, row, lane);
    const T* output = static_cast<const T*>(p.output) + row.index * p.D;
    for (int d = lane; d < p.D; d += G<T>) mean += up(grad_output[d]) * up(output[d]);
    mean = sum_over_group(mean, G<T>);
  }
  for (int first = 0; first < LK; first += G<T>) {
    const int i = min(first + lane, LK - 1);
    const Look<C> look = prepare<T, VECTOR>(p, row, soft, i);
    const bool mine = row.valid && first + lane < LK;
    const C A = mine && look.seen ? look.A : 0;
    const Four<C> weight = {A * look.area.at[0], A * look.area.at[1], A * look.area.at[2], A * look.area.at[3]};
    __syncwarp();
    places[threadIdx.x] = look.place;
    weights[threadIdx.x] = weight;
    __syncwarp();
    C dot[G<T>][4] = {};
    for (int step = 0; step < p.D; step += G<T> * V<T>) {
      const int d = step + lane * V<T>, read = VECTOR ? min(d, p.D - V<T>) : d;
      C g[V<T>], share[V<T> / N][N];                         // grad_output: the channels this lane reads, and those it adds to:
      load<V<T>, VECTOR>(grad_output + read, p.D - d, g);    // a group's additions lie side by side, N channels a lane
#pragma unroll
      for (int e = 0; e < V<T>; e++) g[e] = d < p.D ? g[e] : C(0);
#pragma unroll
      for (int n = 0; n < V<T> / N; n++) {
        const int e = step + (n * G<T> + lane) * N;
        load<N, VECTOR>(grad_output + (VECTOR ? min(e, p.D - N) : e), p.D - e, share[n]);
      }
#pragma unroll
      for (int j = 0; j < G<T>; j++) {
        const Four<unsigned> place = places[group + j];
        const Four<C> weight = weights[group + j];
#pragma unroll
        for (int c = 0; c < 4; c++) {
          C v[V<T>];
          load<V<T>, VECTOR>(advance<UNIT<T, VECTOR>>(value + read, place.at[c]), p.D - d, v);
#pragma unroll
          for (int e = 0; e < V<T>; e++) dot[j][c] += g[e] * v[e];
          if (p.cells || weight.at[c] == 0) continue;
#pragma unroll
          for (int n = 0; n < V<T> / N; n++) {
            const int e = step + (n * G<T> + lane) * N;
            C x[N];
#pragma unroll
            for (int k = 0; k < N; k++) x[k] = weight.at[c] * share[n][k];
            add<N, VECTOR>(advance<UNIT<T, VECTOR>>(grad_value + e, place.at[c]), p.D - e, x);
          }
        }
      }
    }
    reduce_scatter<G<T> / 2>(dot, lane);
    if (!mine) continue;
    const int64_t n = row.index * LK + i;
    const bool left = look.seen && look.x0 >= 0, right = look.seen && look.x0 + 1 < look.W;
    const bool above = look.y0 >= 0, below = look.y0 + 1 < look.H;
    const C v0 = left && above ? dot[0][0] : 0, v1 = right && above ? dot[0][1] : 0;             // g . v_c, 0 outside
    const C v2 = left && below ? dot[0][2] : 0, v3 = right && below ? dot[0][3] : 0;
    const C grad_A = look.area.at[0] * v0 + look.area.at[1] * v1 + look.area.at[2] * v2 + look.area.at[3] * v3;
    const C grad_x = look.A * ((1 - look.fy) * (v1 - v0) + look.fy * (v3 - v2));
    const C grad_y = look.A * ((1 - look.fx) * (v2 - v0) + look.fx * (v3 - v1));
    if (R) {
      T* grad_offset = static_cast<T*>(p.grad_points) + 2 * n;
      put(grad_offset[0], look.sx * grad_x), put(grad_offset[1], look.sy * grad_y);
      put(static_cast<T*>(p.grad_weights)[n], look.A * (grad_A - mean));
    } else {
      static_cast<C*>(p.grad_points)[2 * n] = look.sx * grad_x, static_cast<C*>(p.grad_points)[2 * n + 1] = look.sy * grad_y;
      static_cast<C*>(p.grad_weights)[n] = grad_A;
    }
    if (C* grad_location = static_cast<C*>(p.grad_locations))
      grad_location[2 * n] = look.W * grad_x, grad_location[2 * n + 1] = look.H * grad_y;
    if (p.cells) {
      const int in_map = (look.y0 + 1) * (look.W + 1) + look.x0 + 1, nowhere = first_cell(p, p.B, 0, 0);
      static_cast<int*>(p.cells)[n] = look.seen ? first_cell(p, row.b, row.m, i / p.K) + in_map : nowhere;
      static_cast<Four<C>*>(p.corner_weights)[n] = weight;
    }
  }
}

// The deterministic value gradient: a group owns one token and head, and adds up the looks of the four cells around it in
// the order in which they were sorted. The token is the bottom right corner of the first cell, the top left of the last.
template <typename T, bool VECTOR>
__global__ void __launch_bounds__(THREADS) sum_by_cell(const __grid_constant__ Problem p) {
  using C = typename Sum<T>::type;
  const int lane = threadIdx.x % G<T>;
  const int64_t n = int64_t(blockIdx.x) * (THREADS / G<T>) + threadIdx.x / G<T>;
  if (n >= p.B * p.S * p.M) return;
  const int m = n % p.M, b = n / p.M / p.S;
  int token = n / p.M % p.S, l = 0;
  for (; token >= p.H[l] * p.W[l]; l++) token -= p.H[l] * p.W[l];
  const int y = token / p.W[l], x = token % p.W[l], cell = first_cell(p, b, m, l) + y * (p.W[l] + 1) + x;
  const int64_t *first = static_cast<const int64_t*>(p.first), *rows = static_cast<const int64_t*>(p.rows);
  for (int d = lane * V<T>; d < p.D; d += G<T> * V<T>) {
    C sum[V<T>] = {};
    for (int c = 3; c >= 0; c--) {
      const int k = cell + (c < 2) * (p.W[l] + 1) + (c % 2 == 0);
      for (int64_t i = first[k]; i < first[k + 1]; i++) {
        C g[V<T>];
        load<V<T>, VECTOR>(static_cast<const T*>(p.grad_output) + rows[i] * p.D + d, p.D - d, g);
        const C weight = static_cast<const Four<C>*>(p.corner_weights)[i].at[c];
#pragma unroll
        for (int e = 0; e < V<T>; e++) sum[e] += weight * g[e];
      }
    }
    store<V<T>, false>(static_cast<C*>(p.grad_value) + n * p.D + d, p.D - d, sum);
  }
}

// ---- Host: plain C functions that return the launch's error code, on which deformable_attn.py raises ----------------

template <typename T> static int64_t count_tiles(const Problem& p, int threads) {
  const int groups = threads / G<T>, height = groups / TILE_WIDTH;
  if (p.Nq != p.S) return (p.Nq + groups - 1) / groups;
  int64_t tiles = 0;
  for (int l = 0; l < p.L; l++)
    tiles += int64_t((p.W[l] + TILE_WIDTH - 1) / TILE_WIDTH) * ((p.H[l] + height - 1) / height);
  return tiles;
}

#define LAUNCH(kernel, blocks, threads, ...)                                              \
  if (p.D % V<T> == 0) kernel<T, true><<<blocks, threads, 0, stream>>>(__VA_ARGS__);      \
  else kernel<T, false><<<blocks, threads, 0, stream>>>(__VA_ARGS__);                     \
  return cudaGetLastError();

template <typename T> static int launch_forward(const Problem& p, cudaStream_t stream) {
  const int threads = p.Nq == p.S ? THREADS : THREADS / 2;               // few queries: more, smaller blocks
  const int64_t tiles = count_tiles<T>(p, threads), blocks = p.B * p.M * tiles;
  if (blocks == 0) return 0;
  LAUNCH(forward, blocks, threads, p, tiles)
}

template <typename T> static int launch_backward(const Problem& p, cudaStream_t stream) {
  const int threads = p.Nq == p.S ? THREADS : THREADS / 2;
  const int64_t tiles = count_tiles<T>(p, threads), blocks = p.B * p.M * tiles;
  if (blocks == 0) return 0;
  LAUNCH(backward, blocks, threads, p, tiles)
}

template <typename T> static int launch_sum_by_cell(const Problem& p, cudaStream_t stream) {
  const int64_t groups = THREADS / G<T>, blocks = (p.B * p.S * p.M + groups - 1) / groups;
  if (blocks == 0) return 0;
  LAUNCH(sum_by_cell, blocks, THREADS, p)
}

#define ENTRY(name, T)                                                                                                      \
  extern "C" int forward_##name(const Problem* p, cudaStream_t stream) { return launch_forward<T>(*p, stream); }            \
  extern "C" int backward_##name(const Problem* p, cudaStream_t stream) { return launch_backward<T>(*p, stream); }          \
  extern "C" int sum_by_cell_##name(const Problem* p, cudaStream_t stream) { return launch_sum_by_cell<T>(*p, stream); }
ENTRY(float64, double)
ENTRY(float32, float)
ENTRY(float16, __half)
ENTRY(bfloat16, __nv_bfloat16)
extern "C" const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
