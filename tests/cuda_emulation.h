// Runs CUDA source on the CPU: enough of the language for deformable_attn_kernel.cu, for tests on
// machines without a GPU.
//
// The test reads the real source, drops its CUDA #include lines, and makes three changes:
//   kernel<<<blocks, threads, 0, stream>>>(args)
//     becomes emulation::launch(blocks, threads, [&] { kernel(args); })
//   the vector addition in assembly becomes add_four
//   the system's c++ compiles it after this header
//
// Every CUDA thread is a context of its own (ucontext); a barrier gives the processor to the next
// one. Blocks run one after another. Threads run forwards in even blocks and backwards in odd ones,
// so that a missing barrier shows in one of the two orders. Wrong arithmetic, wrong indices and
// missing warp barriers are found here; races between blocks are not.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
using std::exp, std::floor, std::max, std::min;

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 { unsigned x, y, z, w; };
template <typename T> T __ldg(const T* from) { return *from; }
template <typename To, typename From> To reinterpret(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
inline float __uint_as_float(unsigned u) { return reinterpret<float>(u); }

// Half types: round to nearest even, as the GPU does.
struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };
inline float __half2float(__half h) { return reinterpret<_Float16>(h.bits); }
inline __half __float2half_rn(float x) {
  return {reinterpret<uint16_t>(static_cast<_Float16>(x))};
}
inline float __bfloat162float(__nv_bfloat16 b) {
  return reinterpret<float>(uint32_t(b.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fc0};
  const uint32_t u = reinterpret<uint32_t>(x);
  return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

using cudaStream_t = void*;
using cudaError_t = int;
namespace emulation { inline int launch_error = 0; }
constexpr int cudaErrorInvalidConfiguration = 9;
inline int cudaGetLastError() { return std::exchange(emulation::launch_error, 0); }
extern "C" inline __attribute__((used)) void leave_error(int code) {
  emulation::launch_error = code;
}
inline const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "no error";
}

namespace emulation {
struct Index { unsigned x; };
inline Index block, block_size;
inline int current;

struct Thread { ucontext_t context; std::vector<char> stack; bool done; };
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::vector<int> arrived, generation;                 // per warp
inline std::vector<uint64_t> mailbox;                        // per thread, for shuffles

inline void run_body() {
  body();
  threads[current].done = true;
  swapcontext(&threads[current].context, &scheduler);
}

// Threads that have returned no longer count.
inline void warp_barrier() {
  const int warp = current / 32;
  const int seen = generation[warp];
  const int end = std::min<int>(warp * 32 + 32, block_size.x);
  arrived[warp]++;
  while (generation[warp] == seen) {
    int waiting_for = 0;
    for (int t = warp * 32; t < end; t++) waiting_for += !threads[t].done;
    if (arrived[warp] == waiting_for) {
      arrived[warp] = 0;
      generation[warp]++;
    } else {
      swapcontext(&threads[current].context, &scheduler);
    }
  }
}

template <typename T> T shuffle_xor(T x, int mask) {
  memcpy(&mailbox[current], &x, sizeof(T));
  warp_barrier();
  memcpy(&x, &mailbox[current ^ mask], sizeof(T));
  warp_barrier();
  return x;
}

inline unsigned ballot(bool condition) {
  mailbox[current] = condition;
  warp_barrier();
  unsigned bits = 0;
  for (int t = 0; t < 32; t++) bits |= unsigned(mailbox[current / 32 * 32 + t] & 1) << t;
  warp_barrier();
  return bits;
}

// Counts how many 32-byte sectors the additions of each warp touch, instruction by instruction: the
// n-th addition of every thread of a warp is one instruction.
inline std::vector<int> additions;                           // per thread
inline std::set<std::tuple<unsigned, int, int, uintptr_t>> sectors;
inline bool counting = false;
inline void count_addition(const void* to) {
  const uintptr_t sector = reinterpret_cast<uintptr_t>(to) / 32;
  if (counting) sectors.insert({block.x, current / 32, additions[current]++, sector});
}
}  // namespace emulation

template <typename T> T atomicAdd(T* to, T x) {
  T before = *to;
  *to += x;
  emulation::count_addition(to);
  return before;
}

inline void add_four(float* to, float a, float b, float c, float d) {
  const float x[4] = {a, b, c, d};
  for (int i = 0; i < 4; i++) to[i] += x[i];
  emulation::count_addition(to);
}

// Starts or ends counting -> sectors counted so far.
extern "C" inline __attribute__((used)) int count_sectors(int counting) {
  const int count = emulation::sectors.size();
  emulation::sectors.clear();
  emulation::counting = counting;
  return count;
}

namespace emulation {
template <typename Kernel> void launch(int64_t blocks, int size, Kernel kernel) {
  if (blocks <= 0 || blocks > 0x7fffffff || size > 1024) {
    launch_error = cudaErrorInvalidConfiguration;
    return;
  }
  body = kernel;
  block_size = {unsigned(size)};
  threads.resize(std::max<size_t>(threads.size(), size));
  for (unsigned b = 0; b < blocks; b++) {
    block = {b};
    arrived.assign(size / 32 + 1, 0);
    generation.assign(size / 32 + 1, 0);
    mailbox.assign(size + 32, 0);
    additions.assign(size, 0);
    for (int t = 0; t < size; t++) {
      Thread& thread = threads[t];
      thread.done = false;
      thread.stack.resize(1 << 16);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      makecontext(&thread.context, run_body, 0);
    }
    for (int left = size, rounds = 0; left; rounds++) {
      if (rounds > 1000000) {
        fprintf(stderr, "emulation: these threads wait for each other forever\n");
        abort();
      }
      left = 0;
      for (int i = 0; i < size; i++) {
        current = b % 2 ? size - 1 - i : i;
        if (threads[current].done) continue;
        swapcontext(&scheduler, &threads[current].context);
        left += !threads[current].done;
      }
    }
  }
}
}  // namespace emulation

#define threadIdx (emulation::Index{unsigned(emulation::current)})
#define blockIdx emulation::block
#define blockDim emulation::block_size
#define __syncwarp() emulation::warp_barrier()
#define __ballot_sync(lanes, condition) emulation::ballot(condition)
#define __shfl_xor_sync(lanes, x, mask) emulation::shuffle_xor(x, mask)
