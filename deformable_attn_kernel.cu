// Multi-scale deformable attention on the GPU. Read deformable_attn_kernel.cpp first: it computes
// the same in plain loops.
//
// For image b, query q and head m:
//
//   output[d] = sum over the L K sampling points of  A * bilinear(value, x, y)[d]
//
// Layouts: value (B, S, M, D), points (B, Nq, M, L, K, 2), weights (B, Nq, M, L, K), reference
// (B, Nq, L, 2 or 4), output (B, Nq, M, D), all contiguous and 16-byte aligned. T is the type of
// the values (double, float, half, bfloat16), C the type of every sum (double beside double, else
// float). Plain form (reference_size 0): points are locations and weights are weights, in C. Fused
// form: points are offsets and weights are logits, in T; softmax and locations are computed here.
// Gradients of the weights or logits are in C.
//
// Work per thread: a row (b, q, m) belongs to a group of G neighboring lanes, and G sampling points
// at a time are processed in two alternating jobs:
//   1. lane j computes what point j reads: four tokens and four weights, into shared memory;
//   2. all lanes go through the G points together, each lane reading 16 bytes of channels of each
//      corner.
// So a point is prepared once, not once per channel, and a group reads 128 bytes (float) or 64
// bytes (half) in one piece.
//
// The ladder: what each idea changes, and how that is known. "Counted" is read off the machine code
// for sm_90 or the access pattern; loops in instructions a round. "Simulated" comes from a cache
// model, or from a cycle-level simulator of a V100 (times the multiprocessors). "Measured" is for a
// GPU, and empty: `python -m tools.bench gpu` will tell. A row has 16 points of 32 channels; the
// case is the encoder of DINO at 800 x 1333.
//
//   idea                                      measured counted                  simulated
//   one thread a channel: the authors' kernel -        1,566 instructions a row 412 cycles a row
//   16 bytes of channels a lane, a point      -        231 instructions a row   208 cycles a row,
//     prepared once a group                                                     with the next line
//   a block works on one head and a tile of   -                                 L2 to L1: 610 ->
//     queries 8 wide, whose points overlap                                      205 MB an image
//   softmax and locations inside (fused)      -        276 instructions a row,
//                                                      two tensors less
//   shared arrays padded against bank         -                                 208 -> 203 cycles,
//     conflicts                                                                 stalls 83 k -> 9 k
//   bf16 unpacked by shift and mask           -        loop: 582 -> 500
//   backward: sums over channels by reduce-   -        4,608 -> 554
//     scatter instead of one thread's loop             instructions a row
//   sm_90, CUDA 12.1: four channels in one    -        a quarter of additions
//     addition (RED.128)
//   elsewhere: a channel a lane, neighboring  -        16 -> 4 sectors a value  2,231 -> 836 cycles
//     lanes on neighboring channels                    row
//   loads of a point before its additions,    -        loop: 615 -> 508 (bf16:  836 -> 817 cycles
//     one branch a point, no check of D = 32           932 -> 590), spill 0
//
// Registers for sm_90 and D = 32: forward 64, backward 128. One (forward fp32) and four (backward
// bf16) more are kept in local memory, outside the loop over channels and points.
//
// Forward, the limit is L1 and shared memory, not the issue of instructions: at fp32 90 to 106
// passes of 128 bytes a row (143 to 168 us for two images) against 92 us of issue, where the
// authors' kernel is bound by issue (601 us). Simulated forward: 2.0 times as fast as theirs at
// fp32, about equal to DCNv4 in half precision. Backward, the limit is the number of additions a
// second that L2 completes, which only hardware can tell: predicted 1.8, 3.4 or 5.6 times the
// authors' speed at 20, 43 or 80 billion rows of 128 bytes a second.
//
// The mapping of rows to blocks is only an order of work: any other gives the same result. Level
// shapes are kernel arguments: no device memory is read for them, and the host never waits.
//
// Backward: see the derivation above `backward`. Rows of grad_value are shared by all queries that
// read them, so they are summed by atomic additions in whatever order the hardware executes them.
// This is the only source of nondeterminism. In the deterministic form `backward` stores each
// point's cell and corner weights instead, the caller sorts the points by cell, and `sum_by_cell`
// sums every row in sorted order, one group a row, without atomics.
//
// NaN: a NaN sampling location makes only its own output row NaN and adds nothing to grad_value. A
// value that is not finite does not reach points that lie outside the map.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cstdint>
#include <type_traits>

struct Problem {                            // the same struct stands in the .cpp file and in Python
  const void *value, *points, *weights, *reference, *grad_output;
  void *output, *grad_value, *grad_points, *grad_weights, *grad_locations;  // the last: or null
  void *cells, *corner_weights;             // deterministic backward: each point's cell (else null)
  const void *rows, *first;                 // and weights; its row by cell, where each cell begins
  int64_t B, S, Nq;
  int M, D, L, K, reference_size, threads, H[32], W[32], start[32];         // start: first token
};

#define DEVICE __device__ __forceinline__

// The addition of four floats in one instruction came with sm_90 and CUDA 12.1 (PTX 8.1).
#if __CUDA_ARCH__ >= 900 && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201
#define VECTOR_ADDITION 1
#else
#define VECTOR_ADDITION 0
#endif

// ---- Helpers ------------------------------------------------------------------------------------

template <typename T> struct Sum { using type = float; };
template <> struct Sum<double> { using type = double; };

constexpr int THREADS = 256;
constexpr int TILE_WIDTH = 8;
constexpr unsigned ALL_LANES = 0xffffffff;

// V: channels of one 16-byte load. G: lanes of a group, 32 channels a step (double: 16).
template <typename T> constexpr int V = 16 / sizeof(T);
template <typename T> constexpr int G = sizeof(T) == 2 ? 4 : 8;

// What a kernel may assume about D: nothing, that it is a multiple of V, or that it is a multiple
// of the G V channels of a step (32, for double 16). The last needs no checks in the loops.
enum Width { ANY, VECTORS, STEPS };

// Places in a map are counted in units of so many channels: 32 bits then suffice for 64 GB.
template <typename T, Width W> constexpr int UNIT = W == ANY ? 1 : V<T>;

// Channels that a lane adds at once.
template <typename C> constexpr int ADDED = VECTOR_ADDITION && sizeof(C) == 4 ? 4 : 1;

DEVICE double up(double x) { return x; }
DEVICE float up(float x) { return x; }
DEVICE float up(__half x) { return __half2float(x); }
DEVICE float up(__nv_bfloat16 x) { return __bfloat162float(x); }
DEVICE void put(double& to, double x) { to = x; }
DEVICE void put(float& to, float x) { to = x; }
DEVICE void put(__half& to, float x) { to = __float2half_rn(x); }
DEVICE void put(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// Where entry i of a shared array lies. One empty entry follows every eight, so that the groups of
// a warp read from different banks.
constexpr int PADDED = THREADS + THREADS / 8;
DEVICE int padded(int i) { return i + i / 8; }

// The address `place` units on: a 32-bit multiplication and a 64-bit addition in one instruction.
template <int UNIT, typename T> DEVICE T* advance(T* base, unsigned place) {
  return reinterpret_cast<T(*)[UNIT]>(base)[place];
}

// N channels from `from`. ANY: only `left` of them exist, and the others read as zero.
template <int N, Width W, typename T, typename C>
DEVICE void load(const T* from, int left, C (&to)[N]) {
  constexpr int BYTES = N * sizeof(T);
  if constexpr (W != ANY && (BYTES == 16 || BYTES == 8)) {
    using Raw = typename std::conditional<BYTES == 16, uint4, uint2>::type;
    const Raw raw = __ldg(reinterpret_cast<const Raw*>(from));
#pragma unroll
    for (int i = 0; i < N; i++) {
      if constexpr (std::is_same<T, __nv_bfloat16>::value) {
        // bfloat16 is the upper half of a float.
        const unsigned pair = reinterpret_cast<const unsigned*>(&raw)[i / 2];
        to[i] = __uint_as_float(i % 2 ? pair & 0xffff0000 : pair << 16);
      } else {
        to[i] = up(reinterpret_cast<const T*>(&raw)[i]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = W != ANY || i < left ? up(from[i]) : C(0);
  }
}

template <int N, Width W, typename T, typename C>
DEVICE void store(T* to, int left, const C (&from)[N]) {
  if constexpr (W != ANY && N * sizeof(T) == 16) {
    uint4 raw;
#pragma unroll
    for (int i = 0; i < N; i++) put(reinterpret_cast<T*>(&raw)[i], from[i]);
    if (W == STEPS || left > 0) *reinterpret_cast<uint4*>(to) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i < left) put(to[i], from[i]);
  }
}

// to[i] += x[i] for those of the N channels that exist.
template <int N, Width W, typename C> DEVICE void add(C* to, int left, const C (&x)[N]) {
  if (W != STEPS && left <= 0) return;
  if constexpr (W != ANY && N == 4) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                 ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
  } else {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (W != ANY || i < left) atomicAdd(to + i, x[i]);
  }
}

template <typename C> DEVICE C sum_over_group(C x, int lanes) {
  for (int step = lanes / 2; step; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}

// The row that this group works on. Blocks run over tiles of queries, then heads, then images.
struct Row {
  int b, q, m;
  bool valid;                               // false beyond the map's edge: it reads query 0
  int64_t index;
};

template <int LANES> DEVICE Row find_row(const Problem& p, int tiles) {
  const int groups = blockDim.x / LANES;
  const int group = threadIdx.x / LANES;
  const int bm = blockIdx.x / tiles;
  int tile = blockIdx.x % tiles;
  int q = tile * groups + group;
  bool valid = q < p.Nq;
  if (p.Nq == p.S) {
    // The queries are the tokens: two-dimensional tiles, level by level.
    const int height = groups / TILE_WIDTH;
    int l = 0;
    int columns = (p.W[0] + TILE_WIDTH - 1) / TILE_WIDTH;
    int rows = (p.H[0] + height - 1) / height;
    while (tile >= columns * rows) {
      tile -= columns * rows;
      l++;
      columns = (p.W[l] + TILE_WIDTH - 1) / TILE_WIDTH;
      rows = (p.H[l] + height - 1) / height;
    }
    const int y = tile / columns * height + group / TILE_WIDTH;
    const int x = tile % columns * TILE_WIDTH + group % TILE_WIDTH;
    valid = y < p.H[l] && x < p.W[l];
    q = p.start[l] + y * p.W[l] + x;
  }
  Row row{bm / p.M, valid ? q : 0, bm % p.M, valid, 0};
  row.index = (row.b * p.Nq + row.q) * p.M + row.m;
  return row;
}

// One number for each corner: top left, top right, bottom left, bottom right.
template <typename C> struct alignas(16) Four { C at[4]; };

template <typename C> DEVICE Four<C> operator*(C factor, const Four<C>& x) {
  return {factor * x.at[0], factor * x.at[1], factor * x.at[2], factor * x.at[3]};
}

template <typename C> DEVICE bool any(const Four<C>& x) {
  return x.at[0] != 0 || x.at[1] != 0 || x.at[2] != 0 || x.at[3] != 0;
}

template <int N, typename C> DEVICE bool any_nan(const C (&x)[N]) {
  bool found = false;
#pragma unroll
  for (int i = 0; i < N; i++) found |= x[i] != x[i];
  return found;
}

// Bit j: the condition of lane j of this group.
DEVICE unsigned ballot_of_group(bool condition, int lane) {
  return __ballot_sync(ALL_LANES, condition) >> (threadIdx.x % 32 - lane);
}

template <typename C> struct Sample {
  Four<unsigned> place;                     // where the corner's values begin, inside the map
  Four<C> area;                             // bilinear weight, 0 where the corner lies outside
  C A, fx, fy, sx, sy;                      // pixel = center + scale * point - 1/2
  int H, W, x0, y0;
  bool inside;                              // false: all four corners lie outside
};

// The softmax over a row's logits is exp(logit - top) * inverse.
template <typename C> struct Softmax { C top, inverse; };

template <typename T, typename C = typename Sum<T>::type>
DEVICE Softmax<C> softmax(const Problem& p, const Row& row, int lane) {
  const int LK = p.L * p.K;
  const T* logit = static_cast<const T*>(p.weights) + row.index * LK;
  C top = up(logit[0]);
  C sum = 0;
  for (int i = lane; i < LK; i += G<T>) top = up(logit[i]) > top ? up(logit[i]) : top;
  for (int step = G<T> / 2; step; step /= 2) {
    const C other = __shfl_xor_sync(ALL_LANES, top, step);
    top = other > top ? other : top;
  }
  for (int i = lane; i < LK; i += G<T>) sum += exp(up(logit[i]) - top);
  return {top, 1 / sum_over_group(sum, G<T>)};
}

// Sampling point i of a row.
template <typename T, Width WIDTH, typename C>
DEVICE Sample<C> prepare(const Problem& p, const Row& row, Softmax<C> soft, int i) {
  Sample<C> s;
  const int64_t n = row.index * p.L * p.K + i;
  const int R = p.reference_size;
  const int l = p.K == 4 ? i >> 2 : i / p.K;
  const int H = p.H[l];
  const int W = p.W[l];
  C cx = 0, cy = 0, px, py;
  if (R) {
    // Fused: the softmax, and `sampling_locations` of the Python file.
    const C* ref = static_cast<const C*>(p.reference) + ((row.b * p.Nq + row.q) * p.L + l) * R;
    const T* offset = static_cast<const T*>(p.points) + 2 * n;
    px = up(offset[0]);
    py = up(offset[1]);
    s.A = exp(up(static_cast<const T*>(p.weights)[n]) - soft.top) * soft.inverse;
    s.sx = R == 2 ? 1 : ref[2] * W / (2 * p.K);
    s.sy = R == 2 ? 1 : ref[3] * H / (2 * p.K);
    cx = ref[0] * W;
    cy = ref[1] * H;
  } else {
    const C* location = static_cast<const C*>(p.points) + 2 * n;
    px = location[0];
    py = location[1];
    s.A = static_cast<const C*>(p.weights)[n];
    s.sx = W;
    s.sy = H;
  }
  C x = cx + s.sx * px - C(0.5);
  C y = cy + s.sy * py - C(0.5);
  if (x != x || y != y) s.A = x + y;        // NaN
  s.inside = x > -1 && y > -1 && x < W && y < H;
  if (!s.inside) x = y = 0;
  const int x0 = static_cast<int>(floor(x));
  const int y0 = static_cast<int>(floor(y));
  const int x1 = x0 + 1;
  const int y1 = y0 + 1;
  s.H = H;
  s.W = W;
  s.x0 = x0;
  s.y0 = y0;
  s.fx = x - x0;
  s.fy = y - y0;
  const C left = s.inside && x0 >= 0 ? 1 - s.fx : 0;
  const C right = s.inside && x1 < W ? s.fx : 0;
  const C above = y0 >= 0 ? 1 - s.fy : 0;
  const C below = y1 < H ? s.fy : 0;
  s.area = {above * left, above * right, below * left, below * right};
  // A corner outside reads the nearest one inside.
  const unsigned stride = p.M * p.D / UNIT<T, WIDTH>;
  const unsigned from_left = max(x0, 0) * stride;
  const unsigned from_right = min(x1, W - 1) * stride;
  const unsigned from_above = (p.start[l] + max(y0, 0) * W) * stride;
  const unsigned from_below = (p.start[l] + min(y1, H - 1) * W) * stride;
  s.place = {from_above + from_left, from_above + from_right,
             from_below + from_left, from_below + from_right};
  return s;
}

// Every level has (H + 1) (W + 1) cells: the squares between pixel centers, and half of one around
// the map. `level` = p.L gives the number of cells.
DEVICE int first_cell(const Problem& p, int64_t b, int m, int level) {
  int before = 0;
  int cells = 0;
  for (int l = 0; l < p.L; l++) {
    if (l == level) before = cells;
    cells += (p.H[l] + 1) * (p.W[l] + 1);
  }
  return (b * p.M + m) * cells + before;
}

// ---- Forward ------------------------------------------------------------------------------------

template <typename T, Width WIDTH>
__global__ void __launch_bounds__(THREADS, 4)
forward(const __grid_constant__ Problem p, int tiles) {
  using C = typename Sum<T>::type;
  __shared__ Four<unsigned> places[PADDED];
  __shared__ Four<C> weights[PADDED];
  const int lane = threadIdx.x % G<T>;
  const int group = padded(threadIdx.x) - lane;
  const int LK = p.L * p.K;
  const Row row = find_row<G<T>>(p, tiles);
  const T* value = static_cast<const T*>(p.value) + (row.b * p.S * p.M + row.m) * p.D;
  Softmax<C> soft{};
  if (p.reference_size) soft = softmax<T>(p, row, lane);
  for (int step = 0; step < p.D; step += G<T> * V<T>) {
    const int d = step + lane * V<T>;
    const int read = WIDTH == VECTORS ? min(d, p.D - V<T>) : d;   // beyond D: read, do not write
    C sum[V<T>] = {};
    for (int first = 0; first < LK; first += G<T>) {
      // A last round of fewer than G points repeats one with weight 0.
      const Sample<C> s = prepare<T, WIDTH>(p, row, soft, min(first + lane, LK - 1));
      const Four<C> product = (first + lane < LK ? s.A : 0) * s.area;
      __syncwarp();                         // the previous round has been read
      places[group + lane] = s.place;
      weights[group + lane] = product;
      __syncwarp();
#pragma unroll
      for (int j = 0; j < G<T>; j++) {
        const Four<unsigned> place = places[group + j];
        const Four<C> weight = weights[group + j];
#pragma unroll
        for (int c = 0; c < 4; c++) {
          C v[V<T>];
          load<V<T>, WIDTH>(advance<UNIT<T, WIDTH>>(value + read, place.at[c]), p.D - d, v);
#pragma unroll
          for (int e = 0; e < V<T>; e++) sum[e] += weight.at[c] * v[e];
        }
      }
    }
    // 0 times infinity is NaN: sum again, without the points that lie outside the map.
    if (any_nan(sum)) {
      for (int e = 0; e < V<T>; e++) sum[e] = 0;
      for (int i = 0; i < LK; i++) {
        const Sample<C> s = prepare<T, WIDTH>(p, row, soft, i);
        const Four<C> product = s.A * s.area;
        for (int c = 0; c < 4 && any(product); c++) {
          C v[V<T>];
          load<V<T>, WIDTH>(advance<UNIT<T, WIDTH>>(value + read, s.place.at[c]), p.D - d, v);
          for (int e = 0; e < V<T>; e++) sum[e] += product.at[c] * v[e];
        }
      }
    }
    T* output = static_cast<T*>(p.output) + row.index * p.D;
    if (row.valid) store<V<T>, WIDTH>(output + d, p.D - d, sum);
  }
}

// ---- Backward -----------------------------------------------------------------------------------
//
// One sampling point, its corner values v0 v1 / v2 v3 (0 outside), fractions fx, fy, and
// g = d loss / d output:
//
//   bilinear = (1 - fy) ((1 - fx) v0 + fx v1) + fy ((1 - fx) v2 + fx v3)
//   output = sum over points of  A bilinear
//
//   1. output is linear in the values: d loss / d v_c = A area_c g, summed over all points that
//      read this token.
//   2. output is linear in A: d loss / d A = g . bilinear = sum over c of  area_c (g . v_c).
//   3. d bilinear / d x = d bilinear / d fx = (1 - fy) (v1 - v0) + fy (v3 - v2), so
//      d loss / d x = A ((1 - fy) (g . v1 - g . v0) + fy (g . v3 - g . v2)), y alike.
//      x = center + scale * point - 1/2, so the point's gradient is scale times that.
//
// Fused, with A = softmax(logits): d loss / d logit = A (d loss / d A - mean), where
// mean = sum over i of  A_i d loss / d A_i. (It equals g . output, but the stored output is rounded
// and where maps are smooth the rounding error outweighs the difference.)
//
// So four dot products over channels, g . v_c, are all that a point needs; each lane has a part of
// each.

// Sum dot[j] over the lanes of a group, and leave the total of point j in dot[0] of lane j, who
// prepared it. Each step sends away the half of the points that belongs to the other half of the
// lanes: G - 1 exchanges instead of G log2 G.
template <int HALF, int N, typename C> DEVICE void reduce_scatter(C (&dot)[N][4], int lane) {
#pragma unroll
  for (int j = 0; j < HALF; j++)
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const C keep = lane & HALF ? dot[j + HALF][c] : dot[j][c];
      const C send = lane & HALF ? dot[j][c] : dot[j + HALF][c];
      dot[j][c] = keep + __shfl_xor_sync(ALL_LANES, send, HALF);
    }
  if constexpr (HALF > 1) reduce_scatter<HALF / 2>(dot, lane);
}

template <typename T, Width WIDTH>
__global__ void __launch_bounds__(THREADS, 2)
backward(const __grid_constant__ Problem p, int tiles) {
  using C = typename Sum<T>::type;
  constexpr int N = ADDED<C>;
  __shared__ Four<unsigned> places[PADDED];
  __shared__ Four<C> weights[PADDED];
  const int lane = threadIdx.x % G<T>;
  const int group = padded(threadIdx.x) - lane;
  const int LK = p.L * p.K;
  const int R = p.reference_size;
  const Row row = find_row<G<T>>(p, tiles);
  const int64_t image_and_head = (row.b * p.S * p.M + row.m) * p.D;
  const T* value = static_cast<const T*>(p.value) + image_and_head;
  const T* grad_output = static_cast<const T*>(p.grad_output) + row.index * p.D;
  C* grad_value = static_cast<C*>(p.grad_value) + image_and_head;
  Softmax<C> soft{};
  if (R) soft = softmax<T>(p, row, lane);
  for (int first = 0; first < LK; first += G<T>) {
    const int i = min(first + lane, LK - 1);
    const Sample<C> s = prepare<T, WIDTH>(p, row, soft, i);
    const bool mine = row.valid && first + lane < LK;
    const Four<C> product = (mine && s.inside ? s.A : 0) * s.area;
    // The deterministic form adds nothing here.
    const unsigned added = ballot_of_group(!p.cells && any(product), lane);
    __syncwarp();
    places[group + lane] = s.place;
    weights[group + lane] = product;
    __syncwarp();
    C dot[G<T>][4] = {};
    for (int step = 0; step < p.D; step += G<T> * V<T>) {
      // grad_output twice: the channels that this lane reads, and those that it adds to, where a
      // group's additions lie side by side, N channels a lane.
      const int d = step + lane * V<T>;
      const int read = WIDTH == VECTORS ? min(d, p.D - V<T>) : d;
      C g[V<T>];
      C share[V<T> / N][N];
      load<V<T>, WIDTH>(grad_output + read, p.D - d, g);
#pragma unroll
      for (int e = 0; e < V<T>; e++) g[e] = WIDTH == STEPS || d < p.D ? g[e] : C(0);
#pragma unroll
      for (int n = 0; n < V<T> / N; n++) {
        const int e = step + (n * G<T> + lane) * N;
        load<N, WIDTH>(grad_output + (WIDTH == VECTORS ? min(e, p.D - N) : e), p.D - e, share[n]);
      }
#pragma unroll
      for (int j = 0; j < G<T>; j++) {
        const Four<unsigned> place = places[group + j];
        C v[4][V<T>];
#pragma unroll
        for (int c = 0; c < 4; c++)
          load<V<T>, WIDTH>(advance<UNIT<T, WIDTH>>(value + read, place.at[c]), p.D - d, v[c]);
#pragma unroll
        for (int c = 0; c < 4; c++)
#pragma unroll
          for (int e = 0; e < V<T>; e++) dot[j][c] += g[e] * v[c][e];
        if (!(added >> j & 1)) continue;
        const Four<C> weight = weights[group + j];
#pragma unroll
        for (int c = 0; c < 4; c++)
#pragma unroll
          for (int n = 0; n < V<T> / N; n++) {
            const int e = step + (n * G<T> + lane) * N;
            C* to = advance<UNIT<T, WIDTH>>(grad_value + e, place.at[c]);
            C x[N];
#pragma unroll
            for (int k = 0; k < N; k++) x[k] = weight.at[c] * share[n][k];
            add<N, WIDTH>(to, p.D - e, x);
          }
      }
    }
    reduce_scatter<G<T> / 2>(dot, lane);
    if (!mine) continue;
    // g . v_c, 0 outside
    const bool left = s.inside && s.x0 >= 0;
    const bool right = s.inside && s.x0 + 1 < s.W;
    const bool above = s.y0 >= 0;
    const bool below = s.y0 + 1 < s.H;
    const C v0 = left && above ? dot[0][0] : 0;
    const C v1 = right && above ? dot[0][1] : 0;
    const C v2 = left && below ? dot[0][2] : 0;
    const C v3 = right && below ? dot[0][3] : 0;
    const C upper = (1 - s.fx) * v0 + s.fx * v1;
    const C lower = (1 - s.fx) * v2 + s.fx * v3;
    const C grad_A = (1 - s.fy) * upper + s.fy * lower;
    const C grad_x = s.A * ((1 - s.fy) * (v1 - v0) + s.fy * (v3 - v2));
    const C grad_y = s.A * ((1 - s.fx) * (v2 - v0) + s.fx * (v3 - v1));
    const int64_t n = row.index * LK + i;
    static_cast<C*>(p.grad_weights)[n] = grad_A;
    if (R) {
      T* grad_offset = static_cast<T*>(p.grad_points) + 2 * n;
      put(grad_offset[0], s.sx * grad_x);
      put(grad_offset[1], s.sy * grad_y);
    } else {
      C* grad_point = static_cast<C*>(p.grad_points) + 2 * n;
      grad_point[0] = s.sx * grad_x;
      grad_point[1] = s.sy * grad_y;
    }
    if (C* grad_location = static_cast<C*>(p.grad_locations)) {
      grad_location[2 * n] = s.W * grad_x;
      grad_location[2 * n + 1] = s.H * grad_y;
    }
    if (p.cells) {
      const int m = row.index % p.M;
      const int64_t b = row.index / p.M / p.Nq;
      const int cell = (s.y0 + 1) * (s.W + 1) + s.x0 + 1;
      const int nowhere = first_cell(p, p.B, 0, 0);
      static_cast<int*>(p.cells)[n] =
          s.inside ? first_cell(p, b, m, i / p.K) + cell : nowhere;
      static_cast<Four<C>*>(p.corner_weights)[n] = weights[group + lane];
    }
  }
  if (!R) return;
  // Through the softmax: every lane reads again what it wrote.
  const T* logit = static_cast<const T*>(p.weights) + row.index * LK;
  C* grad_logit = static_cast<C*>(p.grad_weights) + row.index * LK;
  C mean = 0;
  for (int i = lane; i < LK && row.valid; i += G<T>)
    mean += exp(up(logit[i]) - soft.top) * soft.inverse * grad_logit[i];
  mean = sum_over_group(mean, G<T>);
  for (int i = lane; i < LK && row.valid; i += G<T>)
    grad_logit[i] = exp(up(logit[i]) - soft.top) * soft.inverse * (grad_logit[i] - mean);
}

// The deterministic value gradient: a group owns one token and head, and sums the points of the
// four cells around it in the order in which they were sorted. The token is the bottom right corner
// of the first cell, the top left corner of the last.
template <typename T, Width WIDTH>
__global__ void __launch_bounds__(THREADS) sum_by_cell(const __grid_constant__ Problem p) {
  using C = typename Sum<T>::type;
  const int lane = threadIdx.x % G<T>;
  const int64_t n = int64_t(blockIdx.x) * (THREADS / G<T>) + threadIdx.x / G<T>;
  if (n >= p.B * p.S * p.M) return;
  const int m = n % p.M;
  const int b = n / p.M / p.S;
  int token = n / p.M % p.S;
  int l = 0;
  for (; token >= p.H[l] * p.W[l]; l++) token -= p.H[l] * p.W[l];
  const int y = token / p.W[l];
  const int x = token % p.W[l];
  const int cell = first_cell(p, b, m, l) + y * (p.W[l] + 1) + x;
  const int64_t* first = static_cast<const int64_t*>(p.first);
  const int64_t* rows = static_cast<const int64_t*>(p.rows);
  for (int d = lane * V<T>; d < p.D; d += G<T> * V<T>) {
    C sum[V<T>] = {};
    for (int c = 3; c >= 0; c--) {
      const int k = cell + (c < 2) * (p.W[l] + 1) + (c % 2 == 0);
      for (int64_t i = first[k]; i < first[k + 1]; i++) {
        C g[V<T>];
        const T* grad_output = static_cast<const T*>(p.grad_output) + rows[i] * p.D;
        load<V<T>, WIDTH>(grad_output + d, p.D - d, g);
        const C weight = static_cast<const Four<C>*>(p.corner_weights)[i].at[c];
#pragma unroll
        for (int e = 0; e < V<T>; e++) sum[e] += weight * g[e];
      }
    }
    store<V<T>, ANY>(static_cast<C*>(p.grad_value) + n * p.D + d, p.D - d, sum);
  }
}

// ---- Host: C functions that return the launch's error code, on which Python raises --------------

template <typename T> static int64_t count_tiles(const Problem& p, int threads) {
  const int groups = threads / G<T>;
  const int height = groups / TILE_WIDTH;
  if (p.Nq != p.S) return (p.Nq + groups - 1) / groups;
  int64_t tiles = 0;
  for (int l = 0; l < p.L; l++) {
    const int columns = (p.W[l] + TILE_WIDTH - 1) / TILE_WIDTH;
    const int rows = (p.H[l] + height - 1) / height;
    tiles += int64_t(columns) * rows;
  }
  return tiles;
}

// A grid has at most 2^31 - 1 blocks, and a larger number would be cut to its lower 32 bits. The
// first cudaGetLastError forgets an error that somebody else's call has left.
#define LAUNCH(kernel, blocks, threads, ...)                                              \
  if (blocks == 0) return 0;                                                              \
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;                          \
  (void)cudaGetLastError();                                                               \
  if (p.D % (G<T> * V<T>) == 0)                                                           \
    kernel<T, STEPS><<<blocks, threads, 0, stream>>>(__VA_ARGS__);                        \
  else if (p.D % V<T> == 0)                                                               \
    kernel<T, VECTORS><<<blocks, threads, 0, stream>>>(__VA_ARGS__);                      \
  else                                                                                    \
    kernel<T, ANY><<<blocks, threads, 0, stream>>>(__VA_ARGS__);                          \
  return cudaGetLastError();

template <typename T> static int launch_forward(const Problem& p, cudaStream_t stream) {
  const int threads = p.Nq == p.S ? THREADS : THREADS / 2;  // few queries: more, smaller blocks
  const int64_t tiles = count_tiles<T>(p, threads);
  const int64_t blocks = p.B * p.M * tiles;
  LAUNCH(forward, blocks, threads, p, tiles)
}

template <typename T> static int launch_backward(const Problem& p, cudaStream_t stream) {
  const int threads = p.Nq == p.S ? THREADS : THREADS / 2;
  const int64_t tiles = count_tiles<T>(p, threads);
  const int64_t blocks = p.B * p.M * tiles;
  LAUNCH(backward, blocks, threads, p, tiles)
}

template <typename T> static int launch_sum_by_cell(const Problem& p, cudaStream_t stream) {
  const int64_t groups = THREADS / G<T>;
  const int64_t blocks = (p.B * p.S * p.M + groups - 1) / groups;
  LAUNCH(sum_by_cell, blocks, THREADS, p)
}

#define ENTRY(name, T)                                                                \
  extern "C" int forward_##name(const Problem* p, cudaStream_t stream) {              \
    return launch_forward<T>(*p, stream);                                             \
  }                                                                                   \
  extern "C" int backward_##name(const Problem* p, cudaStream_t stream) {             \
    return launch_backward<T>(*p, stream);                                            \
  }                                                                                   \
  extern "C" int sum_by_cell_##name(const Problem* p, cudaStream_t stream) {          \
    return launch_sum_by_cell<T>(*p, stream);                                         \
  }
ENTRY(float64, double)
ENTRY(float32, float)
ENTRY(float16, __half)
ENTRY(bfloat16, __nv_bfloat16)
extern "C" const char* error_text(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
