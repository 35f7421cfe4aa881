// Multi-scale deformable attention as plain loops: the CPU's fast path, and the page to read before the .cu file.
//
// For image b, query q and head m:   output[d] = sum over its L K looks of  A * bilinear(value, x, y)[d]
// A look at pixel (x, y) of level l reads the four values around it, each weighted by the area of the opposite corner;
// outside the map everything is zero. deformable_attn.py names and checks the tensors; here they are bare pointers.
//
// Two forms, told apart by reference_size:
//   0     plain: points = locations in [0, 1], weights = A
//   2, 4  fused: points = offsets, weights = logits, A = softmax(logits), beside reference points (2) or boxes (4)
//
// Who owns what: forward, one thread per (b, q); backward, one thread per (b, m), because all queries of a head add into
// the same rows of grad_value. No two threads write to one address, and every sum has one fixed order.
//
// Where the time goes: finding out where to look costs more than looking. `prepare` therefore does it for all looks of a
// row at once, one column per quantity, in branch-free loops that become vector code (1.6x over both passes). A corner
// outside the map reads a row of zeros and sends its gradient to a row that nobody reads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

struct Problem {                                             // the same struct stands in the .cu file and in Python
  const void *value, *points, *weights, *reference, *grad_output;
  void *output, *grad_value, *grad_points, *grad_weights, *grad_locations;    // grad_locations: only where wanted
  void *cells, *corner_weights;                              // these four: only in the .cu file
  const void *rows, *first;
  int64_t B, S, Nq;
  int M, D, L, K, reference_size, threads, H[32], W[32], start[32];        // start: a level's first token
};

template <typename T> struct Looks {                         // the L K looks of one row (b, q, m)
  int LK;
  std::vector<int> l, H, W, start, row[4];                     // corners: top left, top right, bottom left, bottom right;
  std::vector<T> area[4], fx, fy, A, cx, cy, sx, sy;         // row: their token, -1 outside. pixel = c + s * point - 1/2
  Looks(const Problem& p) : LK(p.L * p.K) {
    for (auto* column : {&l, &H, &W, &start, &row[0], &row[1], &row[2], &row[3]}) column->resize(LK);
    for (auto* column : {&area[0], &area[1], &area[2], &area[3], &fx, &fy, &A, &cx, &cy, &sx, &sy}) column->resize(LK);
    for (int i = 0; i < LK; i++) {
      l[i] = i / p.K, H[i] = p.H[l[i]], W[i] = p.W[l[i]], start[i] = p.start[l[i]];
      sx[i] = p.reference_size ? 1 : W[i], sy[i] = p.reference_size ? 1 : H[i];
    }
  }
};

template <typename T> void prepare(const Problem& p, int64_t bq, int64_t m, Looks<T>& s) {
  const int LK = s.LK, R = p.reference_size;
  const T *point = (const T*)p.points + 2 * (bq * p.M + m) * LK, *weight = (const T*)p.weights + (bq * p.M + m) * LK;
  const T *reference = (const T*)p.reference + bq * p.L * R, top = *std::max_element(weight, weight + LK);
  if (R) {                                                   // fused: softmax, and `sampling_locations` of the Python file
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < LK; i++) sum += s.A[i] = std::exp(weight[i] - top);
    for (int i = 0; i < LK; i++) {
      const T* r = reference + s.l[i] * R;
      s.A[i] /= sum, s.cx[i] = r[0] * s.W[i], s.cy[i] = r[1] * s.H[i];
      if (R == 4) s.sx[i] = r[2] * s.W[i] / (2 * p.K), s.sy[i] = r[3] * s.H[i] / (2 * p.K);
    }
  } else {
    std::copy(weight, weight + LK, s.A.begin());
  }
#pragma omp simd simdlen(8)
  for (int i = 0; i < LK; i++) {
    const int H = s.H[i], W = s.W[i];
    T x = s.cx[i] + s.sx[i] * point[2 * i] - T(0.5), y = s.cy[i] + s.sy[i] * point[2 * i + 1] - T(0.5);
    s.A[i] = (x != x) | (y != y) ? std::numeric_limits<T>::quiet_NaN() : s.A[i];       // NaN: this row, and only this one
    x = x > -2 ? x : -2, y = y > -2 ? y : -2;                // far outside is as good as just outside
    x = x < W + 1 ? x : W + 1, y = y < H + 1 ? y : H + 1;
    const T left = std::floor(x), above = std::floor(y), fx = x - left, fy = y - above;
    const int x0 = (int)left, y0 = (int)above, x1 = x0 + 1, y1 = y0 + 1, token = s.start[i] + y0 * W + x0;
    const int x0_in = (x0 >= 0) & (x0 < W), x1_in = (x1 >= 0) & (x1 < W);
    const int y0_in = (y0 >= 0) & (y0 < H), y1_in = (y1 >= 0) & (y1 < H);
    s.row[0][i] = y0_in & x0_in ? token : -1, s.row[1][i] = y0_in & x1_in ? token + 1 : -1;
    s.row[2][i] = y1_in & x0_in ? token + W : -1, s.row[3][i] = y1_in & x1_in ? token + W + 1 : -1;
    s.area[0][i] = (1 - fy) * (1 - fx), s.area[1][i] = (1 - fy) * fx, s.area[2][i] = fy * (1 - fx), s.area[3][i] = fy * fx;
    s.fx[i] = fx, s.fy[i] = fy;
  }
}

template <typename T, int WIDTH> void forward(const Problem& p) {      // WIDTH: D where the compiler should know it, else 0
  const int D = WIDTH ? WIDTH : p.D;
#pragma omp parallel num_threads(p.threads)
  {
    Looks<T> s(p);
    const std::vector<T> zero(D);
#pragma omp for schedule(dynamic, 16)
    for (int64_t bq = 0; bq < p.B * p.Nq; bq++)
      for (int64_t m = 0; m < p.M; m++) {
        const T *value = (const T*)p.value + (bq / p.Nq * p.S * p.M + m) * D, *v[4];
        T *out = (T*)p.output + (bq * p.M + m) * D, a[4];
        prepare(p, bq, m, s);
        std::fill(out, out + D, T(0));
        for (int i = 0; i < s.LK; i++) {
          for (int c = 0; c < 4; c++) {
            v[c] = s.row[c][i] < 0 ? zero.data() : value + int64_t(s.row[c][i]) * p.M * D;
            a[c] = s.A[i] * s.area[c][i];
          }
#pragma omp simd
          for (int d = 0; d < D; d++) out[d] += a[0] * v[0][d] + a[1] * v[1][d] + a[2] * v[2][d] + a[3] * v[3][d];
        }
      }
  }
}

// With g = grad_output and v[c] the four corner values,   grad_value[c] += A area[c] g     grad_A = sum_c area[c] (g . v[c])
// grad_x = A ((1 - fy) (g . v[1] - g . v[0]) + fy (g . v[3] - g . v[2])),   grad_y alike: four dot products hold it all.
template <typename T, int WIDTH> void backward(const Problem& p) {
  const int D = WIDTH ? WIDTH : p.D;
#pragma omp parallel num_threads(p.threads)
  {
    Looks<T> s(p);
    const std::vector<T> zero(D);
    std::vector<T> sink(D);
#pragma omp for schedule(dynamic)
    for (int64_t bm = 0; bm < p.B * p.M; bm++)
      for (int64_t q = 0; q < p.Nq; q++) {
        const int64_t b = bm / p.M, m = bm % p.M, bq = b * p.Nq + q, first = (bq * p.M + m) * s.LK;
        const T *value = (const T*)p.value + (b * p.S * p.M + m) * D, *g = (const T*)p.grad_output + (bq * p.M + m) * D, *v[4];
        T *grad_value = (T*)p.grad_value + (b * p.S * p.M + m) * D, *gv[4], a[4], mean = 0;      // grad_value: zero on entry
        T *grad_point = (T*)p.grad_points + 2 * first, *grad_weight = (T*)p.grad_weights + first;
        prepare(p, bq, m, s);
        for (int i = 0; i < s.LK; i++) {
          for (int c = 0; c < 4; c++) {
            const int64_t row = int64_t(s.row[c][i]) * p.M * D;
            v[c] = row < 0 ? zero.data() : value + row, gv[c] = row < 0 ? sink.data() : grad_value + row;
            a[c] = s.A[i] * s.area[c][i];
          }
          T v0 = 0, v1 = 0, v2 = 0, v3 = 0;
#pragma omp simd reduction(+ : v0, v1, v2, v3)
          for (int d = 0; d < D; d++) {
            v0 += g[d] * v[0][d], v1 += g[d] * v[1][d], v2 += g[d] * v[2][d], v3 += g[d] * v[3][d];
            gv[0][d] += a[0] * g[d], gv[1][d] += a[1] * g[d], gv[2][d] += a[2] * g[d], gv[3][d] += a[3] * g[d];
          }
          const T grad_x = s.A[i] * ((1 - s.fy[i]) * (v1 - v0) + s.fy[i] * (v3 - v2));
          const T grad_y = s.A[i] * ((1 - s.fx[i]) * (v2 - v0) + s.fx[i] * (v3 - v1));
          grad_weight[i] = s.area[0][i] * v0 + s.area[1][i] * v1 + s.area[2][i] * v2 + s.area[3][i] * v3;
          grad_point[2 * i] = s.sx[i] * grad_x, grad_point[2 * i + 1] = s.sy[i] * grad_y;
          mean += s.A[i] * grad_weight[i];
          if (T* grad_location = (T*)p.grad_locations)
            grad_location[2 * (first + i)] = s.W[i] * grad_x, grad_location[2 * (first + i) + 1] = s.H[i] * grad_y;
        }
        for (int i = 0; i < s.LK && p.reference_size; i++) grad_weight[i] = s.A[i] * (grad_weight[i] - mean);    // softmax
      }
  }
}

#define ENTRY(name, pass, T) \
  extern "C" int name(const Problem* p, void*) { p->D == 32 ? pass<T, 32>(*p) : pass<T, 0>(*p); return 0; }
ENTRY(forward_float32, forward, float)
ENTRY(forward_float64, forward, double)
ENTRY(backward_float32, backward, float)
ENTRY(backward_float64, backward, double)
