// The portable reader: queue_depth threads that each do one pread at a time.
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "reader.h"

namespace expertstream {

namespace {

class PreadReader final : public Reader {
 public:
  PreadReader(int queue_depth, int64_t split_bytes) : Reader(queue_depth, split_bytes) {
    try {
      for (int i = 0; i < queue_depth; ++i) threads_.emplace_back([this] { work(); });
    } catch (...) {
      stop();
      throw;
    }
  }

  ~PreadReader() override {
    while (pending() != 0) wait(pending());
    stop();
  }

 protected:
  void start(const Piece& piece) override {
    {
      std::lock_guard lock(mutex_);
      queue_.push_back(piece);
    }
    work_ready_.notify_one();
  }

  void collect(std::vector<Finished>& out) override {
    std::unique_lock lock(mutex_);
    results_ready_.wait(lock, [&] { return !results_.empty(); });
    out.swap(results_);
  }

 private:
  void stop() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    work_ready_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  static int64_t read(const Piece& piece) {
    const iovec target{piece.dest, static_cast<size_t>(piece.length)};
    ssize_t n;
#if defined(RWF_NOWAIT)
    n = piece.nowait ? preadv2(piece.fd, &target, 1, piece.offset, RWF_NOWAIT)
                     : preadv(piece.fd, &target, 1, piece.offset);
#else
    n = preadv(piece.fd, &target, 1, piece.offset);
#endif
    return n >= 0 ? n : -errno;
  }

  void work() {
    for (;;) {
      Piece piece;
      {
        std::unique_lock lock(mutex_);
        work_ready_.wait(lock, [&] { return stop_ || !queue_.empty(); });
        if (stop_) return;
        piece = queue_.front();
        queue_.pop_front();
      }
      const int64_t result = read(piece);
      {
        std::lock_guard lock(mutex_);
        results_.push_back({piece, result});
      }
      results_ready_.notify_one();
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable work_ready_, results_ready_;
  std::deque<Piece> queue_;
  std::vector<Finished> results_;
  bool stop_ = false;
};

}  // namespace

std::unique_ptr<Reader> make_pread_reader(int queue_depth, int64_t split_bytes) {
  return std::make_unique<PreadReader>(queue_depth, split_bytes);
}

}  // namespace expertstream
