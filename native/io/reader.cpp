#include "reader.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <mutex>
#include <utility>

namespace expertstream {

namespace {

std::atomic<bool> faults_armed{false};
std::mutex faults_mutex;
int64_t fault_after = 0, fault_count = 0;
int fault_value = 0;

int64_t apply_fault(int64_t result) {
  if (!faults_armed.load(std::memory_order_relaxed)) return result;
  std::lock_guard lock(faults_mutex);
  if (fault_after > 0) {
    --fault_after;
    return result;
  }
  if (fault_count <= 0 || result <= 0) return result;
  --fault_count;
  if (fault_value == -1) return std::max<int64_t>(result / 2 / 4096 * 4096, std::min<int64_t>(result, 4096));
  return -fault_value;
}

}  // namespace

void set_fault(int64_t after, int64_t count, int value) {
  std::lock_guard lock(faults_mutex);
  fault_after = after;
  fault_count = count;
  fault_value = value;
  faults_armed = true;
}

void clear_faults() { faults_armed = false; }

void Reader::submit(const ReadRequest* requests, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const ReadRequest& r = requests[i];
    Pending& pending = pending_[r.tag];
    pending.completion.tag = r.tag;
    for (int64_t at = 0; at < r.length; at += split_bytes_) {
      const int64_t length = std::min(split_bytes_, r.length - at);
      queue_.push_back({r.tag, r.fd, r.direct, !r.direct, r.offset + at, length,
                        std::clamp<int64_t>(r.needed - at, 0, length), r.dest + at});
      ++pending.pieces;
    }
  }
  pump();
}

void Reader::pump() {
  while (!queue_.empty() && in_flight_ < queue_depth_) {
    start(queue_.front());
    queue_.pop_front();
    ++in_flight_;
    ++stats_.reads;
    peak_ = std::max(peak_, in_flight_);
  }
  flush();
}

std::vector<Completion> Reader::wait(size_t at_least) {
  at_least = std::min(at_least, done_.size() + pending_.size());
  while (done_.size() < at_least) {
    finished_.clear();
    collect(finished_);
    in_flight_ -= static_cast<int64_t>(finished_.size());
    for (const Finished& f : finished_) settle(f);
    pump();
  }
  return std::exchange(done_, {});
}

void Reader::settle(Finished f) {
  Piece& piece = f.piece;
  Pending& pending = pending_.at(piece.tag);
  Completion& completion = pending.completion;
  const int64_t result = apply_fault(f.result);
  const bool refused = piece.nowait && (result == -EAGAIN || result == -EOPNOTSUPP || result == -EINVAL);
  bool again = refused || result == -EINTR || result == -EAGAIN;
  if (result > 0) {
    completion.bytes += result;
    if (piece.nowait) completion.cached_bytes += result;
    piece.offset += result;
    piece.length -= result;
    piece.needed -= result;
    piece.dest += result;
    again = piece.needed > 0;
    // O_DIRECT stops inside a block only at the end of the file.
    if (again && piece.direct && result % 512 != 0) {
      again = false;
      completion.error = kShortRead;
    }
  } else if (result == 0) {
    if (piece.needed > 0) completion.error = kShortRead;
  } else if (!again && completion.error == 0) {
    completion.error = static_cast<int>(-result);
  }
  if (again && completion.error == 0) {
    piece.nowait = false;
    queue_.push_front(piece);
    return;
  }
  if (--pending.pieces == 0) {
    done_.push_back(completion);
    pending_.erase(piece.tag);
  }
}

}  // namespace expertstream
