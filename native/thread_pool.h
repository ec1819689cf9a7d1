// A pool of threads that share one loop at a time. Which thread runs which part never changes a value.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace expertstream {

// Tells the processor that this thread only waits.
inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class ThreadPool {
 public:
  explicit ThreadPool(
      int threads);  // the calling thread counts as one; throws std::system_error if they cannot be started
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_->threads.size()) + 1; }
  // Runs body(begin, end, thread) over [0, count) in pieces of at most `grain`; returns when all is done. The body's
  // first exception is rethrown here after the other pieces are done. Not re-entrant: one caller at a time.
  void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t, int)>& body);

 private:
  void work(int thread);
  void take(int thread);
  void stop();

  struct Workers {
    std::vector<std::thread> threads;
    std::mutex mutex;
    std::condition_variable wake;
  };
  std::unique_ptr<Workers> workers_ = std::make_unique<Workers>();
  const pid_t process_;  // the owner of the threads; a forked child has none of them
  std::atomic<uint64_t> generation_{0};
  std::atomic<bool> open_{false};  // the loop's variables are set and its work is not all taken
  std::atomic<int> inside_{0};     // workers that may be looking at them
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> next_{0};
  int64_t count_ = 0, grain_ = 1;
  const std::function<void(int64_t, int64_t, int)>* body_ = nullptr;
  std::exception_ptr error_;  // written under the mutex, read when all workers have left the loop
};

}  // namespace expertstream
