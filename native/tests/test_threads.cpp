// Tests the thread pool and the pool of reading threads under ThreadSanitizer: few values, many starts and ends.
//
// 1. Loops of all sizes, one after another and after pauses in which workers fall asleep; pools destroyed at once.
// 2. Several readers at the same time: used, interrupted by faults, and destroyed in the middle of their reads.
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>
#include <thread>

#include "check.h"
#include "io/aligned.h"
#include "io/reader.h"
#include "thread_pool.h"

using namespace expertstream;

namespace {

void test_pool() {
  for (int threads : {1, 2, 4, 7}) {
    ThreadPool pool(threads);
    std::vector<int64_t> values(1000);
    int64_t expected = 0;
    for (int round = 0; round < 300; ++round) {
      const int64_t count = static_cast<int64_t>(rng() % 1000), grain = 1 + static_cast<int64_t>(rng() % 64);
      pool.parallel_for(count, grain, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) values[static_cast<size_t>(i)] += i + 1;
      });
      expected += count * (count + 1) / 2;
      if (round % 50 == 49) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    int64_t sum = 0;
    for (int64_t v : values) sum += v;
    check(sum == expected, "loops with " + std::to_string(threads) + " threads");
    for (int round = 0; round < 50; ++round) {
      bool thrown = false;
      try {
        pool.parallel_for(100, 1, [&](int64_t begin, int64_t, int) {
          if (begin % 7 == round % 7) throw std::bad_alloc();
        });
      } catch (const std::bad_alloc&) {
        thrown = true;
      }
      std::atomic<int64_t> done = 0;
      pool.parallel_for(100, 3, [&](int64_t begin, int64_t end, int) { done += end - begin; });
      check(thrown && done == 100, "what a body throws reaches the caller, and the pool goes on");
    }
  }
  for (int round = 0; round < 100; ++round) ThreadPool(4);
  check(true, "pools that end at once");
}

// One owner's use of one reader: whole reads, reads continued after partial ones, and destruction with reads in flight.
void use_reader(const char* path, const std::vector<uint8_t>& content, bool* right) {
  const int fd = open(path, O_RDONLY);
  const auto size = static_cast<int64_t>(content.size());
  *right = true;
  for (int round = 0; round < 20; ++round) {
    Arena arena(1 << 20);
    auto reader = make_pread_reader(4, 16384);
    const ReadRequest requests[] = {{1, fd, false, 0, size, size, arena.data()},
                                    {2, fd, false, 8192, 40960, 40960, arena.data() + 524288}};
    for (int again = 0; again < 3; ++again) {
      reader->submit(requests, 2);
      for (size_t done = 0; done < 2;)
        for (const Completion& c : reader->wait(1)) {
          *right = *right && c.error == 0;
          ++done;
        }
      *right = *right && std::memcmp(arena.data(), content.data(), content.size()) == 0;
      *right = *right && std::memcmp(arena.data() + 524288, content.data() + 8192, 40960) == 0;
    }
    reader->submit(requests, 2);
    reader.reset();  // before the arena: reads in flight still write to it
  }
  close(fd);
}

void test_reader_pool() {
  const RandomFile file(300000);
  bool right[3] = {};
  std::vector<std::thread> owners;
  for (bool& result : right) owners.emplace_back(use_reader, file.path, std::cref(file.content), &result);
  for (int i = 0; i < 50; ++i) {
    set_fault(static_cast<int64_t>(i % 7), 3, -1);  // while they read: partial results
    std::this_thread::sleep_for(std::chrono::microseconds(500));
  }
  clear_faults();
  for (auto& owner : owners) owner.join();
  for (bool result : right) check(result, "a pool of reading threads");
}

}  // namespace

int main() {
  test_pool();
  test_reader_pool();
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures == 0 ? 0 : 1;
}
