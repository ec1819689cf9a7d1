// The io_uring reader, on raw system calls: it needs only two shared rings and three calls.
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "reader.h"

#ifndef RWF_NOWAIT
#define RWF_NOWAIT 0x00000008
#endif

namespace expertstream {

namespace {

int io_uring_setup(unsigned entries, io_uring_params* params) {
  return static_cast<int>(syscall(__NR_io_uring_setup, entries, params));
}
int io_uring_enter(int fd, unsigned submit, unsigned wait, unsigned flags) {
  return static_cast<int>(syscall(__NR_io_uring_enter, fd, submit, wait, flags, nullptr, 0));
}
int io_uring_register(int fd, unsigned opcode, const void* arg, unsigned count) {
  return static_cast<int>(syscall(__NR_io_uring_register, fd, opcode, arg, count));
}
unsigned load_acquire(unsigned* p) { return std::atomic_ref<unsigned>(*p).load(std::memory_order_acquire); }
void store_release(unsigned* p, unsigned v) { std::atomic_ref<unsigned>(*p).store(v, std::memory_order_release); }

class Mapping {
 public:
  void map(int fd, size_t bytes, uint64_t offset) {
    bytes_ = bytes;
    p_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, static_cast<off_t>(offset));
    if (p_ == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "io_uring: mmap");
  }
  ~Mapping() {
    if (p_ != MAP_FAILED) munmap(p_, bytes_);
  }
  template <class T>
  T* at(size_t offset) {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(p_) + offset);
  }

 private:
  void* p_ = MAP_FAILED;
  size_t bytes_ = 0;
};

class UringReader final : public Reader {
 public:
  UringReader(int queue_depth, int64_t split_bytes)
      : Reader(queue_depth, split_bytes), pieces_(static_cast<size_t>(queue_depth)), process_(getpid()) {
    io_uring_params params{};
    fd_ = io_uring_setup(static_cast<unsigned>(queue_depth), &params);
    if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "io_uring_setup");
    try {
      sq_.map(fd_, params.sq_off.array + params.sq_entries * sizeof(unsigned), IORING_OFF_SQ_RING);
      cq_.map(fd_, params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe), IORING_OFF_CQ_RING);
      entries_.map(fd_, params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
    } catch (...) {
      close(fd_);
      throw;
    }
    sq_tail_ = sq_.at<unsigned>(params.sq_off.tail);
    sq_mask_ = *sq_.at<unsigned>(params.sq_off.ring_mask);
    sq_array_ = sq_.at<unsigned>(params.sq_off.array);
    cq_head_ = cq_.at<unsigned>(params.cq_off.head);
    cq_tail_ = cq_.at<unsigned>(params.cq_off.tail);
    cq_mask_ = *cq_.at<unsigned>(params.cq_off.ring_mask);
    cqes_ = cq_.at<io_uring_cqe>(params.cq_off.cqes);
    for (int i = queue_depth; i-- > 0;) free_.push_back(i);
  }

  ~UringReader() override {
    // The kernel may still write into slots: nothing may be freed before it has finished. In a forked child, the ring
    // belongs to the parent.
    while (getpid() == process_ && pending() != 0) wait(pending());
    close(fd_);
  }

  void register_memory(uint8_t* data, size_t bytes) override {
    // A registered buffer is at most 1 GiB; a read that spans two of them is done unregistered.
    buffers_.clear();
    for (size_t at = 0; at < bytes; at += kRegion) buffers_.push_back({data + at, std::min(kRegion, bytes - at)});
    if (stats_.registered_buffers) io_uring_register(fd_, IORING_UNREGISTER_BUFFERS, nullptr, 0);
    // Refused under a small locked-memory limit: reads then pin their pages one by one, and stats() reports it.
    stats_.registered_buffers =
        io_uring_register(fd_, IORING_REGISTER_BUFFERS, buffers_.data(), static_cast<unsigned>(buffers_.size())) == 0;
  }

  void unregister_memory() override {
    if (stats_.registered_buffers) io_uring_register(fd_, IORING_UNREGISTER_BUFFERS, nullptr, 0);
    stats_.registered_buffers = false;
    buffers_.clear();
  }

 protected:
  void start(const Piece& piece) override {
    const int slot = free_.back();
    free_.pop_back();
    pieces_[static_cast<size_t>(slot)] = piece;
    const unsigned tail = *sq_tail_, index = tail & sq_mask_;
    io_uring_sqe& sqe = entries_.at<io_uring_sqe>(0)[index];
    std::memset(&sqe, 0, sizeof sqe);
    sqe.opcode = IORING_OP_READ;
    sqe.fd = piece.fd;
    sqe.off = static_cast<uint64_t>(piece.offset);
    sqe.addr = reinterpret_cast<uint64_t>(piece.dest);
    sqe.len = static_cast<unsigned>(piece.length);
    sqe.user_data = static_cast<uint64_t>(slot);
    if (piece.nowait) sqe.rw_flags = RWF_NOWAIT;
    if (stats_.registered_buffers)
      for (size_t b = 0; b < buffers_.size(); ++b) {
        const uint8_t* base = static_cast<uint8_t*>(buffers_[b].iov_base);
        if (piece.dest >= base && piece.dest + piece.length <= base + buffers_[b].iov_len) {
          sqe.opcode = IORING_OP_READ_FIXED;
          sqe.buf_index = static_cast<uint16_t>(b);
          break;
        }
      }
    sq_array_[index] = index;
    store_release(sq_tail_, tail + 1);
    ++unsubmitted_;
  }

  void flush() override {
    while (unsubmitted_ != 0) {
      const int n = io_uring_enter(fd_, unsubmitted_, 0, 0);
      if (n >= 0)
        unsubmitted_ -= static_cast<unsigned>(n);
      else if (errno != EINTR && errno != EAGAIN && errno != EBUSY)
        throw std::system_error(errno, std::generic_category(), "io_uring_enter");
    }
  }

  void collect(std::vector<Finished>& out) override {
    while (load_acquire(cq_tail_) == *cq_head_)
      if (io_uring_enter(fd_, 0, 1, IORING_ENTER_GETEVENTS) < 0 && errno != EINTR && errno != EAGAIN && errno != EBUSY)
        throw std::system_error(errno, std::generic_category(), "io_uring_enter");
    unsigned head = *cq_head_;
    for (const unsigned tail = load_acquire(cq_tail_); head != tail; ++head) {
      const io_uring_cqe& cqe = cqes_[head & cq_mask_];
      const int slot = static_cast<int>(cqe.user_data);
      out.push_back({pieces_[static_cast<size_t>(slot)], cqe.res});
      free_.push_back(slot);
    }
    store_release(cq_head_, head);
  }

 private:
  static constexpr size_t kRegion = size_t{1} << 30;
  int fd_;
  Mapping sq_, cq_, entries_;
  unsigned *sq_tail_, *sq_array_, *cq_head_, *cq_tail_;
  unsigned sq_mask_, cq_mask_, unsubmitted_ = 0;
  io_uring_cqe* cqes_;
  std::vector<Piece> pieces_;  // by user_data
  const pid_t process_;
  std::vector<int> free_;
  std::vector<iovec> buffers_;
};

}  // namespace

std::unique_ptr<Reader> make_uring_reader(int queue_depth, int64_t split_bytes) {
  return std::make_unique<UringReader>(queue_depth, split_bytes);
}

}  // namespace expertstream
