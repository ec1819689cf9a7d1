// Runs CUDA C++ on a CPU, for tests on machines without a GPU: a block's threads are fibers of one thread, which switch where threads wait
// for each other. Only what the kernels in src/expertstream/cuda use. Slow, and exact.
#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>

#define EXPERTSTREAM_EMULATED 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define DYNAMIC_SHARED(name) uint8_t* const name = emulator::shared

namespace emulator {

struct Index {
  unsigned x, y, z;
};
constexpr int kLanes = 32;
constexpr int kMostThreads = 1024;

struct Fiber {
  void* stack;  // where it was left
  Index index;
  bool done;
};

inline Fiber fibers[kMostThreads];
inline int current, total, alive;
inline int warp_alive[kMostThreads / kLanes];
inline Index block_index, block_size, grid_size;
inline uint8_t* shared;
inline void* scheduler;
inline void (*body)();
// Threads that have arrived at a barrier, and how often it has opened.
inline int block_arrived, warp_arrived[kMostThreads / kLanes];
inline unsigned block_turn, warp_turn[kMostThreads / kLanes];
inline uint32_t exchange[kMostThreads][8];
inline long idle;  // switches since something happened

extern "C" void emulator_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.weak emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  retq
)");
#else
#error "the emulator runs on x86-64 only"
#endif

inline void next_fiber() {
  const int from = current;
  if (++idle > 64L * kMostThreads) {
    std::fprintf(stderr, "emulator: the threads of a block wait for each other\n");
    std::abort();
  }
  do current = current + 1 == total ? 0 : current + 1;
  while (fibers[current].done);
  if (current != from) emulator_switch(&fibers[from].stack, fibers[current].stack);
}

inline void open_barriers(int warp) {
  if (alive > 0 && block_arrived == alive) {
    block_arrived = 0;
    ++block_turn;
    idle = 0;
  }
  if (warp_alive[warp] > 0 && warp_arrived[warp] == warp_alive[warp]) {
    warp_arrived[warp] = 0;
    ++warp_turn[warp];
    idle = 0;
  }
}
inline void wait_for_block() {
  const unsigned turn = block_turn;
  ++block_arrived;
  open_barriers(current / kLanes);
  while (block_turn == turn) next_fiber();
}
inline void wait_for_warp() {
  const int warp = current / kLanes;
  const unsigned turn = warp_turn[warp];
  ++warp_arrived[warp];
  open_barriers(warp);
  while (warp_turn[warp] == turn) next_fiber();
}

inline void enter() {
  body();
  const int warp = current / kLanes;
  fibers[current].done = true;
  --alive;
  --warp_alive[warp];
  idle = 0;
  open_barriers(warp);
  void* nowhere;
  if (alive == 0) {
    emulator_switch(&nowhere, scheduler);
  } else {
    do current = current + 1 == total ? 0 : current + 1;
    while (fibers[current].done);
    emulator_switch(&nowhere, fibers[current].stack);
  }
}

constexpr size_t kStack = 64 << 10;

inline void run_block(Index block) {
  static uint8_t* stacks = static_cast<uint8_t*>(std::aligned_alloc(64, kStack * kMostThreads));
  block_index = block;
  total = alive = static_cast<int>(block_size.x);
  block_arrived = 0;
  idle = 0;
  for (int w = 0; w < kMostThreads / kLanes; ++w) warp_alive[w] = warp_arrived[w] = 0;
  for (int t = 0; t < total; ++t) {
    ++warp_alive[t / kLanes];
    void** top = reinterpret_cast<void**>(stacks + kStack * static_cast<size_t>(t + 1)) - 2;
    *top = reinterpret_cast<void*>(&enter);
    fibers[t] = {top - 6, {static_cast<unsigned>(t), 0, 0}, false};
  }
  current = 0;
  emulator_switch(&scheduler, fibers[0].stack);
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** parameters, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(parameters[I])...);
}

inline void** given;

template <auto kernel>
struct Invoke;
template <class... A, void (*kernel)(A...)>
struct Invoke<kernel> {
  static void run() { call(kernel, given, std::index_sequence_for<A...>{}); }
};

inline void launch(void (*run)(), const unsigned* grid, unsigned threads, size_t shared_bytes, void** parameters) {
  static uint8_t* memory = static_cast<uint8_t*>(std::aligned_alloc(64, 256 << 10));
  shared = memory;
  std::memset(memory, 0xa5, shared_bytes);  // nothing may rely on what it finds
  given = parameters;
  body = run;
  block_size = {threads, 1, 1};
  grid_size = {grid[0], grid[1], grid[2]};
  for (unsigned z = 0; z < grid[2]; ++z)
    for (unsigned y = 0; y < grid[1]; ++y)
      for (unsigned x = 0; x < grid[0]; ++x) run_block({x, y, z});
}

}  // namespace emulator

#define threadIdx (emulator::fibers[emulator::current].index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline void let_next_start() {}
inline void wait_for_previous() {}
inline void __syncthreads() { emulator::wait_for_block(); }
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline bool wait_for_host(const long long* word, long long value, long long patience) {
  const auto begin = std::chrono::steady_clock::now();
  while (*static_cast<const volatile long long*>(word) < value) {
    if ((std::chrono::steady_clock::now() - begin).count() > patience) return false;
    sched_yield();
  }
  __threadfence_system();
  return true;
}
inline void __syncwarp() { emulator::wait_for_warp(); }

template <class T>
T __shfl_xor_sync(uint32_t, T v, int mask) {
  static_assert(sizeof(T) == 4);
  std::memcpy(emulator::exchange[emulator::current], &v, 4);
  emulator::wait_for_warp();
  T got;
  std::memcpy(&got, emulator::exchange[emulator::current ^ mask], 4);
  emulator::wait_for_warp();
  return got;
}
inline int __all_sync(uint32_t, bool v) {
  int all = v;
  for (int step = 16; step; step /= 2) all &= __shfl_xor_sync(0, all, step);
  return all;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline float __int_as_float(int i) { return __uint_as_float(static_cast<uint32_t>(i)); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return r;
}

inline int dot4(uint32_t w, int x, int acc) {
  for (int i = 0; i < 4; ++i) acc += static_cast<int>(w >> (8 * i) & 255) * static_cast<int8_t>(static_cast<uint32_t>(x) >> (8 * i));
  return acc;
}
inline uint4 load_once(const uint8_t* p) { return *reinterpret_cast<const uint4*>(p); }

// m16n8k32 as the PTX manual spreads it over a warp: a[0], a[2] are row lane/4 at columns 4·(lane%4) and 16 more, a[1], a[3] eight rows on;
// b[0], b[1] are column lane/4; c[0], c[1] are row lane/4 at columns 2·(lane%4) and one more, c[2], c[3] eight rows on.
inline void mma_u8_s8(int* c, const uint32_t* a, const uint32_t* b) {
  uint32_t* own = emulator::exchange[emulator::current];
  std::memcpy(own, a, 16);
  std::memcpy(own + 4, b, 8);
  emulator::wait_for_warp();
  const int lane = emulator::current % 32, first = emulator::current - lane;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i >= 2 ? 8 : 0), col = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 32; ++k) {
      const int q = k % 16 / 4, high = k / 16;
      const uint32_t aw = emulator::exchange[first + row % 8 * 4 + q][(row >= 8 ? 1 : 0) + 2 * high];
      const uint32_t bw = emulator::exchange[first + col * 4 + q][4 + high];
      c[i] += static_cast<int>(aw >> (8 * (k % 4)) & 255) * static_cast<int8_t>(bw >> (8 * (k % 4)));
    }
  }
  emulator::wait_for_warp();
}

