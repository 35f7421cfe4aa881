// Multi-scale deformable attention as plain loops: the CPU's fast path, and the page to read before the .cu file.
//
// For image b, query q and head m:   output[d] = sum over the L K looks of  A * bilinear(value, x, y)[d]
// A look at pixel (x, y) of level l reads the four values around it, each weighted by the area of the opposite corner;
// outside the map everything is zero. deformable_attn.py names and checks the tensors; here they are bare pointers.
//
// Two forms share all of it (reference_size says which):
//   0: points = locations in [0, 1], weights = A
//   2, 4: fused. points = offsets, weights = logits; A = softmax(logits); references are points (2) or boxes (4)
//
// Who owns what: forward, one thread per (b, q); backward, one thread per (b, m), because all queries of a head add into
// the same rows of grad_value. No two threads write to one address, and every sum has a fixed order.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

struct Problem {                                             // the same struct stands in the .cu file and in Python
  const void *value, *points, *weights, *reference, *grad_output;
  void *output, *grad_value, *grad_points, *grad_weights, *grad_locations;    // grad_locations: only where wanted
  int64_t B, S, Nq;
  int M, D, L, K, reference_size, threads, H[32], W[32];
};

template <typename T> struct Look {
  bool seen;                // false: farther than a pixel outside, or NaN
  int64_t row[4];           // where the corners' values start (top left, top right, bottom left, bottom right); -1: zero
  T area[4], fx, fy, A;     // bilinear weights, fractions of a pixel, attention weight
  T scale[2];               // pixels per unit of `points`, in x and in y
};

// Fills the looks of one (b, q, m). Returns false where a coordinate or weight is NaN.
template <typename T> bool prepare(const Problem& p, int64_t b, int64_t q, int m, Look<T>* looks) {
  const int LK = p.L * p.K, R = p.reference_size;
  const int64_t first = ((b * p.Nq + q) * p.M + m) * LK;
  const T *point = (const T*)p.points + 2 * first, *weight = (const T*)p.weights + first;
  const T top = R ? *std::max_element(weight, weight + LK) : 0;
  T sum = R ? 0 : 1;
  for (int i = 0; i < LK; i++) R ? sum += looks[i].A = std::exp(weight[i] - top) : looks[i].A = weight[i];
  bool numbers = true;
  int64_t start = b * p.S;
  for (int l = 0, i = 0; l < p.L; start += int64_t(p.H[l]) * p.W[l], l++) {
    const int H = p.H[l], W = p.W[l];
    const T* ref = (const T*)p.reference + ((b * p.Nq + q) * p.L + l) * R;
    const T cx = R ? ref[0] * W : 0, sx = R == 0 ? W : R == 2 ? 1 : ref[2] * W / (2 * p.K);      // see sampling_locations
    const T cy = R ? ref[1] * H : 0, sy = R == 0 ? H : R == 2 ? 1 : ref[3] * H / (2 * p.K);
    for (int k = 0; k < p.K; k++, i++) {
      Look<T>& s = looks[i];
      const T x = cx + sx * point[2 * i] - T(0.5), y = cy + sy * point[2 * i + 1] - T(0.5);
      s.A /= sum, s.scale[0] = sx, s.scale[1] = sy;
      numbers &= x == x && y == y && s.A == s.A;
      s.seen = x > -1 && y > -1 && x < W && y < H;
      if (!s.seen) continue;
      const int x0 = (int)std::floor(x), y0 = (int)std::floor(y);
      s.fx = x - x0, s.fy = y - y0;
      for (int c = 0; c < 4; c++) {
        const int right = c & 1, below = c >> 1, xc = x0 + right, yc = y0 + below;
        const bool inside = xc >= 0 && xc < W && yc >= 0 && yc < H;
        s.area[c] = (right ? s.fx : 1 - s.fx) * (below ? s.fy : 1 - s.fy);
        s.row[c] = inside ? ((start + int64_t(yc) * W + xc) * p.M + m) * p.D : -1;
      }
    }
  }
  return numbers;
}

template <typename T, int WIDTH> void forward(const Problem& p) {         // WIDTH: D when the compiler should know it, or 0
  const int D = WIDTH ? WIDTH : p.D, LK = p.L * p.K;
  const T* value = (const T*)p.value;
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<Look<T>> looks(LK);
    const std::vector<T> zero(D);
#pragma omp for
    for (int64_t bq = 0; bq < p.B * p.Nq; bq++)
      for (int m = 0; m < p.M; m++) {
        T* out = (T*)p.output + (bq * p.M + m) * D;
        const bool numbers = prepare(p, bq / p.Nq, bq % p.Nq, m, looks.data());
        std::fill(out, out + D, numbers ? T(0) : std::numeric_limits<T>::quiet_NaN());
        for (const Look<T>& s : looks) {
          if (!s.seen) continue;
          const T *v[4], a[4] = {s.A * s.area[0], s.A * s.area[1], s.A * s.area[2], s.A * s.area[3]};
          for (int c = 0; c < 4; c++) v[c] = s.row[c] < 0 ? zero.data() : value + s.row[c];
#pragma omp simd
          for (int d = 0; d < D; d++) out[d] += a[0] * v[0][d] + a[1] * v[1][d] + a[2] * v[2][d] + a[3] * v[3][d];
        }
      }
  }
}

// With g = grad_output and v[c] the corner values:  grad_value[c] += A area[c] g,  grad_A = sum_d g bilinear,
// grad_x = A sum_d g ((1 - fy) (v[1] - v[0]) + fy (v[3] - v[2])), grad_y alike: four dot products g . v[c] hold them all.
template <typename T, int WIDTH> void backward(const Problem& p) {
  const int D = WIDTH ? WIDTH : p.D, LK = p.L * p.K;
  const T* value = (const T*)p.value;
  T* grad_value = (T*)p.grad_value;                                       // zero on entry
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<Look<T>> looks(LK);
    const std::vector<T> zero(D);
    std::vector<T> sink(D);                                               // takes the gradient of corners outside
#pragma omp for
    for (int64_t bm = 0; bm < p.B * p.M; bm++)
      for (int64_t q = 0; q < p.Nq; q++) {
        const int64_t b = bm / p.M, m = bm % p.M, row = (b * p.Nq + q) * p.M + m;
        const T* g = (const T*)p.grad_output + row * D;
        T *grad_point = (T*)p.grad_points + 2 * row * LK, *grad_weight = (T*)p.grad_weights + row * LK, mean = 0;
        prepare(p, b, q, (int)m, looks.data());
        for (int i = 0; i < LK; i++) {
          const Look<T>& s = looks[i];
          T dot[4] = {0, 0, 0, 0};
          if (s.seen) {
            const T *v[4], a[4] = {s.A * s.area[0], s.A * s.area[1], s.A * s.area[2], s.A * s.area[3]};
            T *gv[4], d0 = 0, d1 = 0, d2 = 0, d3 = 0;
            for (int c = 0; c < 4; c++) {
              v[c] = s.row[c] < 0 ? zero.data() : value + s.row[c];
              gv[c] = s.row[c] < 0 ? sink.data() : grad_value + s.row[c];
            }
#pragma omp simd reduction(+ : d0, d1, d2, d3)
            for (int d = 0; d < D; d++) {
              d0 += g[d] * v[0][d], d1 += g[d] * v[1][d], d2 += g[d] * v[2][d], d3 += g[d] * v[3][d];
              gv[0][d] += a[0] * g[d], gv[1][d] += a[1] * g[d], gv[2][d] += a[2] * g[d], gv[3][d] += a[3] * g[d];
            }
            dot[0] = d0, dot[1] = d1, dot[2] = d2, dot[3] = d3;
          }
          const T grad_A = s.seen ? s.area[0] * dot[0] + s.area[1] * dot[1] + s.area[2] * dot[2] + s.area[3] * dot[3] : 0;
          const T grad_x = s.seen ? s.A * ((1 - s.fy) * (dot[1] - dot[0]) + s.fy * (dot[3] - dot[2])) : 0;
          const T grad_y = s.seen ? s.A * ((1 - s.fx) * (dot[2] - dot[0]) + s.fx * (dot[3] - dot[1])) : 0;
          grad_point[2 * i] = s.scale[0] * grad_x, grad_point[2 * i + 1] = s.scale[1] * grad_y;
          grad_weight[i] = grad_A;
          mean += s.A * grad_A;
          if (p.grad_locations) {
            T* grad_location = (T*)p.grad_locations + 2 * (row * LK + i);
            grad_location[0] = p.W[i / p.K] * grad_x, grad_location[1] = p.H[i / p.K] * grad_y;
          }
        }
        if (p.reference_size)                                             // through the softmax
          for (int i = 0; i < LK; i++) grad_weight[i] = looks[i].A * (grad_weight[i] - mean);
      }
  }
}

#define ENTRY(name, pass, T) extern "C" void name(const Problem* p) { p->D == 32 ? pass<T, 32>(*p) : pass<T, 0>(*p); }
ENTRY(forward_float32, forward, float)
ENTRY(forward_float64, forward, double)
ENTRY(backward_float32, backward, float)
ENTRY(backward_float64, backward, double)
