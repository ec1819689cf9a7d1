// Reads byte ranges of files into memory, many at a time. Deals with bytes only.
//
// submit() returns at once; wait() returns whole requests as they finish, in any order. A request larger than
// split_bytes goes to the kernel in pieces; at most queue_depth pieces are in flight. Interrupted and partial reads
// continue where they stopped; the end of the file before `needed` bytes is an error. Not thread-safe: one owner.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace expertstream {

constexpr int kShortRead = -1;  // Completion::error: the file ended too early

struct ReadRequest {
  uint64_t tag;  // unique among the requests in flight
  int fd;
  bool direct;  // fd is O_DIRECT: offset, length and dest are multiples of 4096
  int64_t offset, length;
  int64_t needed;  // required bytes from offset on; the rest may be past the end of the file
  uint8_t* dest;   // length bytes, valid until the request is returned
};

struct Completion {
  uint64_t tag;
  int error;             // 0, an errno, or kShortRead
  int64_t bytes;         // read
  int64_t cached_bytes;  // of these, supplied by the page cache without waiting (buffered files only)
};

struct ReaderStats {
  int64_t reads = 0;
  bool registered_buffers = false;
};

class Reader {
 public:
  Reader(int queue_depth, int64_t split_bytes) : queue_depth_(queue_depth), split_bytes_(split_bytes) {}
  virtual ~Reader() = default;

  void submit(const ReadRequest* requests, size_t count);
  // Blocks until at least `at_least` requests (or all that are pending) are done; returns all that are.
  std::vector<Completion> wait(size_t at_least);
  size_t pending() const { return pending_.size(); }
  const ReaderStats& stats() const { return stats_; }
  // The most pieces in flight since the last call.
  int64_t take_peak() { return std::exchange(peak_, in_flight_); }
  // Registers memory that requests will read into with the kernel, where that helps.
  virtual void register_memory(uint8_t*, size_t) {}
  // Undoes that: registered memory is pinned and cannot be released. Only while nothing is pending.
  virtual void unregister_memory() {}

 protected:
  struct Piece {
    uint64_t tag;
    int fd;
    bool direct, nowait;  // nowait: first try of a buffered read, served by the page cache or not at all
    int64_t offset, length, needed;
    uint8_t* dest;
  };
  struct Finished {
    Piece piece;
    int64_t result;  // bytes, or −errno
  };
  virtual void start(const Piece& piece) = 0;            // submits one piece to the kernel
  virtual void flush() {}                                // after a series of start() calls
  virtual void collect(std::vector<Finished>& out) = 0;  // blocks until there is at least one

  int queue_depth_;
  int64_t split_bytes_;
  ReaderStats stats_;

 private:
  struct Pending {
    int64_t pieces = 0;
    Completion completion{};
  };
  void pump();
  void settle(Finished finished);

  std::deque<Piece> queue_;
  std::unordered_map<uint64_t, Pending> pending_;
  std::vector<Completion> done_;
  std::vector<Finished> finished_;
  int64_t in_flight_ = 0, peak_ = 0;
};

std::unique_ptr<Reader> make_uring_reader(int queue_depth, int64_t split_bytes);  // throws std::system_error
std::unique_ptr<Reader> make_pread_reader(int queue_depth, int64_t split_bytes);  // queue_depth threads

// Faults for tests, applied to the kernel's results, below the readers' own logic. `after` results pass, then `count`
// results are changed: to −value if positive (an errno), to 0 bytes if 0, to a half-finished read if −1.
void set_fault(int64_t after, int64_t count, int value);
void clear_faults();

}  // namespace expertstream
