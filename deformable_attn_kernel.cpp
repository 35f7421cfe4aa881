// Multi-scale deformable attention on the CPU. Read this before the .cu file.
//
// For image b, query q and head m:
//
//   output[d] = sum over its L K sampling points of  A * bilinear(value, x, y)[d]
//
// A sampling point at pixel (x, y) of level l reads the four values around it, each weighted by the
// area of the rectangle between the point and the opposite corner. Outside the map everything is
// zero. deformable_attn.py names and checks the tensors; here they are bare pointers.
//
// There are two forms, told apart by reference_size:
//   0     plain: points = locations in [0, 1], weights = A
//   2, 4  fused: points = offsets, weights = logits, A = softmax(logits), with reference points (2)
//         or boxes (4)
//
// The file has two parts. `forward_literal_float64` is the forward pass of the plain form written
// out: nothing in it is fast, the tests compare everything else with it. The rest is the kernel.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

struct Problem {                            // the same struct stands in the .cu file and in Python
  const void *value, *points, *weights, *reference, *grad_output;
  void *output, *grad_value, *grad_points, *grad_weights, *grad_locations;  // the last: or null
  void *cells, *corner_weights;             // these four: only in the .cu file
  const void *rows, *first;
  int64_t B, S, Nq;
  int M, D, L, K, reference_size, threads, H[32], W[32], start[32];         // start: first token
};

// ---- The literal loop ---------------------------------------------------------------------------

extern "C" int forward_literal_float64(const Problem* p, void*) {
  const double* value = static_cast<const double*>(p->value);               // (B, S, M, D)
  const double* location = static_cast<const double*>(p->points);           // (B, Nq, M, L, K, 2)
  const double* weight = static_cast<const double*>(p->weights);            // (B, Nq, M, L, K)
  double* output = static_cast<double*>(p->output);                         // (B, Nq, M, D)
  for (int64_t b = 0; b < p->B; b++)
    for (int64_t q = 0; q < p->Nq; q++)
      for (int m = 0; m < p->M; m++)
        for (int d = 0; d < p->D; d++) {
          double sum = 0;
          for (int l = 0; l < p->L; l++)
            for (int k = 0; k < p->K; k++) {
              const int64_t n = (((b * p->Nq + q) * p->M + m) * p->L + l) * p->K + k;
              const double x = location[2 * n] * p->W[l] - 0.5;
              const double y = location[2 * n + 1] * p->H[l] - 0.5;
              double bilinear = 0;
              for (int row = 0; row < p->H[l]; row++)
                for (int column = 0; column < p->W[l]; column++) {
                  if (std::fabs(x - column) >= 1 || std::fabs(y - row) >= 1) continue;
                  const double area = (1 - std::fabs(x - column)) * (1 - std::fabs(y - row));
                  const int64_t token = p->start[l] + row * p->W[l] + column;
                  bilinear += area * value[((b * p->S + token) * p->M + m) * p->D + d];
                }
              sum += weight[n] * bilinear;
            }
          output[((b * p->Nq + q) * p->M + m) * p->D + d] = sum;
        }
  return 0;
}

// ---- The kernel ---------------------------------------------------------------------------------
//
// Work per thread: forward, one (b, q); backward, one (b, m), because all queries of a head add to
// the same rows of grad_value. No two threads write to one address, and every sum has one order.
//
// Most of the time goes into working out which values a point reads, not into reading them.
// `prepare` does that for all points of a row (b, q, m) at once, one array per quantity, in loops
// without branches that become vector code (1.6 times as fast over both passes, measured). A corner
// outside the map reads a row of zeros and adds its gradient to a row that nobody reads.

template <typename T> struct Samples {      // the L K sampling points of one row (b, q, m)
  int LK;
  std::vector<int> l, H, W, start;
  std::vector<int> row[4];                  // corners top left, top right, bottom left, bottom
  std::vector<T> area[4];                   // right: their token, -1 outside, and their area
  std::vector<T> fx, fy, A;
  std::vector<T> cx, cy, sx, sy;            // pixel = c + s * point - 1/2

  Samples(const Problem& p) : LK(p.L * p.K) {
    for (auto* column : {&l, &H, &W, &start, &row[0], &row[1], &row[2], &row[3]})
      column->resize(LK);
    for (auto* column : {&area[0], &area[1], &area[2], &area[3], &fx, &fy, &A, &cx, &cy, &sx, &sy})
      column->resize(LK);
    for (int i = 0; i < LK; i++) {
      l[i] = i / p.K;
      H[i] = p.H[l[i]];
      W[i] = p.W[l[i]];
      start[i] = p.start[l[i]];
      sx[i] = p.reference_size ? 1 : W[i];
      sy[i] = p.reference_size ? 1 : H[i];
    }
  }
};

template <typename T>
void prepare(const Problem& p, int64_t bq, int64_t m, Samples<T>& s) {
  const int LK = s.LK;
  const int R = p.reference_size;
  const int64_t row = bq * p.M + m;
  const T* point = (const T*)p.points + 2 * row * LK;
  const T* weight = (const T*)p.weights + row * LK;
  if (R) {
    // Fused: the softmax, and `sampling_locations` of the Python file.
    const T* reference = (const T*)p.reference + bq * p.L * R;
    const T top = *std::max_element(weight, weight + LK);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < LK; i++) {
      s.A[i] = std::exp(weight[i] - top);
      sum += s.A[i];
    }
    for (int i = 0; i < LK; i++) {
      const T* r = reference + s.l[i] * R;
      s.A[i] /= sum;
      s.cx[i] = r[0] * s.W[i];
      s.cy[i] = r[1] * s.H[i];
      if (R == 4) {
        s.sx[i] = r[2] * s.W[i] / (2 * p.K);
        s.sy[i] = r[3] * s.H[i] / (2 * p.K);
      }
    }
  } else {
    std::copy(weight, weight + LK, s.A.begin());
  }
#pragma omp simd simdlen(8)
  for (int i = 0; i < LK; i++) {
    const int H = s.H[i];
    const int W = s.W[i];
    T x = s.cx[i] + s.sx[i] * point[2 * i] - T(0.5);
    T y = s.cy[i] + s.sy[i] * point[2 * i + 1] - T(0.5);
    // A NaN location makes this row NaN, and only this one.
    s.A[i] = (x != x) | (y != y) ? std::numeric_limits<T>::quiet_NaN() : s.A[i];
    // Far outside gives the same as just outside.
    x = x > -2 ? x : -2;
    y = y > -2 ? y : -2;
    x = x < W + 1 ? x : W + 1;
    y = y < H + 1 ? y : H + 1;
    const T left = std::floor(x);
    const T above = std::floor(y);
    const T fx = x - left;
    const T fy = y - above;
    const int x0 = (int)left;
    const int y0 = (int)above;
    const int x1 = x0 + 1;
    const int y1 = y0 + 1;
    const int token = s.start[i] + y0 * W + x0;
    const int x0_inside = (x0 >= 0) & (x0 < W);
    const int x1_inside = (x1 >= 0) & (x1 < W);
    const int y0_inside = (y0 >= 0) & (y0 < H);
    const int y1_inside = (y1 >= 0) & (y1 < H);
    s.row[0][i] = y0_inside & x0_inside ? token : -1;
    s.row[1][i] = y0_inside & x1_inside ? token + 1 : -1;
    s.row[2][i] = y1_inside & x0_inside ? token + W : -1;
    s.row[3][i] = y1_inside & x1_inside ? token + W + 1 : -1;
    s.area[0][i] = (1 - fy) * (1 - fx);
    s.area[1][i] = (1 - fy) * fx;
    s.area[2][i] = fy * (1 - fx);
    s.area[3][i] = fy * fx;
    s.fx[i] = fx;
    s.fy[i] = fy;
  }
}

// WIDTH: D where the compiler should know it, else 0.
template <typename T, int WIDTH> void forward(const Problem& p) {
  const int D = WIDTH ? WIDTH : p.D;
#pragma omp parallel num_threads(p.threads)
  {
    Samples<T> s(p);
    const std::vector<T> zero(D);
#pragma omp for schedule(dynamic, 16)
    for (int64_t bq = 0; bq < p.B * p.Nq; bq++)
      for (int64_t m = 0; m < p.M; m++) {
        const T* value = (const T*)p.value + (bq / p.Nq * p.S * p.M + m) * D;
        T* out = (T*)p.output + (bq * p.M + m) * D;
        prepare(p, bq, m, s);
        std::fill(out, out + D, T(0));
        for (int i = 0; i < s.LK; i++) {
          const T* v[4];
          T a[4];
          for (int c = 0; c < 4; c++) {
            const int64_t row = int64_t(s.row[c][i]) * p.M * D;
            v[c] = row < 0 ? zero.data() : value + row;
            a[c] = s.A[i] * s.area[c][i];
          }
#pragma omp simd
          for (int d = 0; d < D; d++)
            out[d] += a[0] * v[0][d] + a[1] * v[1][d] + a[2] * v[2][d] + a[3] * v[3][d];
        }
      }
  }
}

// With g = grad_output and v[c] the values at the four corners:
//   grad_value[c] += A area[c] g
//   grad_A = sum over c of  area[c] (g . v[c])
//   grad_x = A ((1 - fy) (g . v[1] - g . v[0]) + fy (g . v[3] - g . v[2])), grad_y alike
// So four dot products are all that a sampling point needs.
template <typename T, int WIDTH> void backward(const Problem& p) {
  const int D = WIDTH ? WIDTH : p.D;
#pragma omp parallel num_threads(p.threads)
  {
    Samples<T> s(p);
    const std::vector<T> zero(D);
    std::vector<T> unread(D);
#pragma omp for schedule(dynamic)
    for (int64_t bm = 0; bm < p.B * p.M; bm++)
      for (int64_t q = 0; q < p.Nq; q++) {
        const int64_t b = bm / p.M;
        const int64_t m = bm % p.M;
        const int64_t bq = b * p.Nq + q;
        const int64_t first = (bq * p.M + m) * s.LK;
        const int64_t image_and_head = (b * p.S * p.M + m) * D;
        const T* value = (const T*)p.value + image_and_head;
        T* grad_value = (T*)p.grad_value + image_and_head;                  // zero on entry
        const T* g = (const T*)p.grad_output + (bq * p.M + m) * D;
        T* grad_point = (T*)p.grad_points + 2 * first;
        T* grad_weight = (T*)p.grad_weights + first;
        T* grad_location = p.grad_locations ? (T*)p.grad_locations + 2 * first : nullptr;
        T mean = 0;
        prepare(p, bq, m, s);
        for (int i = 0; i < s.LK; i++) {
          const T* v[4];
          T* gv[4];
          T a[4];
          for (int c = 0; c < 4; c++) {
            const int64_t row = int64_t(s.row[c][i]) * p.M * D;
            v[c] = row < 0 ? zero.data() : value + row;
            gv[c] = row < 0 ? unread.data() : grad_value + row;
            a[c] = s.A[i] * s.area[c][i];
          }
          T v0 = 0, v1 = 0, v2 = 0, v3 = 0;                                 // g . v[c]
#pragma omp simd reduction(+ : v0, v1, v2, v3)
          for (int d = 0; d < D; d++) {
            v0 += g[d] * v[0][d];
            v1 += g[d] * v[1][d];
            v2 += g[d] * v[2][d];
            v3 += g[d] * v[3][d];
            gv[0][d] += a[0] * g[d];
            gv[1][d] += a[1] * g[d];
            gv[2][d] += a[2] * g[d];
            gv[3][d] += a[3] * g[d];
          }
          const T grad_x = s.A[i] * ((1 - s.fy[i]) * (v1 - v0) + s.fy[i] * (v3 - v2));
          const T grad_y = s.A[i] * ((1 - s.fx[i]) * (v2 - v0) + s.fx[i] * (v3 - v1));
          const T upper = s.area[0][i] * v0 + s.area[1][i] * v1;
          const T lower = s.area[2][i] * v2 + s.area[3][i] * v3;
          grad_weight[i] = upper + lower;
          grad_point[2 * i] = s.sx[i] * grad_x;
          grad_point[2 * i + 1] = s.sy[i] * grad_y;
          mean += s.A[i] * grad_weight[i];
          if (grad_location) {
            grad_location[2 * i] = s.W[i] * grad_x;
            grad_location[2 * i + 1] = s.H[i] * grad_y;
          }
        }
        // Fused: through the softmax.
        for (int i = 0; i < s.LK && p.reference_size; i++)
          grad_weight[i] = s.A[i] * (grad_weight[i] - mean);
      }
  }
}

#define ENTRY(name, pass, T)                                \
  extern "C" int name(const Problem* p, void*) {            \
    p->D == 32 ? pass<T, 32>(*p) : pass<T, 0>(*p);          \
    return 0;                                               \
  }
ENTRY(forward_float32, forward, float)
ENTRY(forward_float64, forward, double)
ENTRY(backward_float32, backward, float)
ENTRY(backward_float64, backward, double)
