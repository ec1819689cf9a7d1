#include "thread_pool.h"

#include <unistd.h>

#include <utility>

namespace expertstream {

namespace {
// The loops of one token follow each other within microseconds; a worker that sleeps between them costs more than one
// that spins this long. After that it sleeps, so that an idle engine uses no CPU.
constexpr int kSpins = 4000;
}  // namespace

ThreadPool::ThreadPool(int threads) : process_(getpid()) {
  try {
    for (int i = 1; i < threads; ++i) workers_->threads.emplace_back([this, i] { work(i); });
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  // A forked child has no threads to join, and a mutex or condition variable that was in use would never be released.
  if (getpid() != process_)
    static_cast<void>(workers_.release());
  else
    stop();
}

void ThreadPool::stop() {
  {
    std::lock_guard lock(workers_->mutex);
    stop_ = true;
  }
  workers_->wake.notify_all();
  for (auto& worker : workers_->threads) worker.join();
  workers_->threads.clear();
}

void ThreadPool::take(int thread) {
  for (;;) {
    const int64_t begin = next_.fetch_add(grain_);
    if (begin >= count_) return;
    try {
      (*body_)(begin, begin + grain_ < count_ ? begin + grain_ : count_, thread);
    } catch (...) {  // most likely out of memory; a thread left unjoined would terminate the process
      std::lock_guard lock(workers_->mutex);
      if (!error_) error_ = std::current_exception();
    }
  }
}

void ThreadPool::parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t, int)>& body) {
  if (count <= 0) return;
  if (grain < 1) grain = 1;
  if (workers_->threads.empty() || count <= grain) {
    for (int64_t begin = 0; begin < count; begin += grain)
      body(begin, begin + grain < count ? begin + grain : count, 0);
    return;
  }
  body_ = &body;
  count_ = count;
  grain_ = grain;
  next_ = 0;
  open_ = true;
  {
    std::lock_guard lock(workers_->mutex);
    generation_.fetch_add(1);
  }
  workers_->wake.notify_all();
  take(0);
  // All work is taken. Workers that are inside may still be doing theirs; one that wakes up only now finds the loop
  // closed and stays out, so the caller never waits for a thread that has no CPU to run on.
  open_ = false;
  for (int spins = 0; inside_.load() != 0; ++spins) {
    if (spins < kSpins)
      relax();
    else
      std::this_thread::yield();
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::work(int thread) {
  uint64_t seen = 0;
  for (;;) {
    for (int spins = 0; spins < kSpins && generation_.load() == seen && !stop_; ++spins) relax();
    if (generation_.load() == seen && !stop_) {
      std::unique_lock lock(workers_->mutex);
      workers_->wake.wait(lock, [&] { return generation_.load() != seen || stop_; });
    }
    if (stop_) return;
    seen = generation_.load();
    // Either this sees the loop closed, or parallel_for sees this worker inside: both are sequentially consistent.
    inside_.fetch_add(1);
    if (open_.load()) take(thread);
    inside_.fetch_sub(1);
  }
}

}  // namespace expertstream
