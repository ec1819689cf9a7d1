// The portable reader: queue_depth threads that each do one pread at a time.
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "reader.h"

namespace expertstream {

namespace {

class PreadReader final : public Reader {
 public:
  PreadReader(int queue_depth, int64_t split_bytes) : Reader(queue_depth, split_bytes), process_(getpid()) {
    try {
      for (int i = 0; i < queue_depth; ++i) shared_->threads.emplace_back([this] { work(); });
    } catch (...) {
      stop();
      throw;
    }
  }

  ~PreadReader() override {
    if (getpid() != process_) {  // a forked child has none of the threads, and their locks may never be released
      static_cast<void>(shared_.release());
      return;
    }
    while (pending() != 0) wait(pending());
    stop();
  }

 protected:
  void start(const Piece& piece) override {
    {
      std::lock_guard lock(shared_->mutex);
      shared_->queue.push_back(piece);
    }
    shared_->work_ready.notify_one();
  }

  void collect(std::vector<Finished>& out) override {
    std::unique_lock lock(shared_->mutex);
    shared_->results_ready.wait(lock, [&] { return !shared_->results.empty(); });
    out.swap(shared_->results);
  }

 private:
  void stop() {
    {
      std::lock_guard lock(shared_->mutex);
      shared_->stop = true;
    }
    shared_->work_ready.notify_all();
    for (auto& thread : shared_->threads) thread.join();
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
        std::unique_lock lock(shared_->mutex);
        shared_->work_ready.wait(lock, [&] { return shared_->stop || !shared_->queue.empty(); });
        if (shared_->stop) return;
        piece = shared_->queue.front();
        shared_->queue.pop_front();
      }
      const int64_t result = read(piece);
      {
        std::lock_guard lock(shared_->mutex);
        shared_->results.push_back({piece, result});
      }
      shared_->results_ready.notify_one();
    }
  }

  struct Shared {
    std::vector<std::thread> threads;
    std::mutex mutex;
    std::condition_variable work_ready, results_ready;
    std::deque<Piece> queue;
    std::vector<Finished> results;
    bool stop = false;
  };
  std::unique_ptr<Shared> shared_ = std::make_unique<Shared>();
  const pid_t process_;
};

}  // namespace

std::unique_ptr<Reader> make_pread_reader(int queue_depth, int64_t split_bytes) {
  return std::make_unique<PreadReader>(queue_depth, split_bytes);
}

}  // namespace expertstream
