#include "aligned.h"

#include <sys/mman.h>

#include <new>

namespace expertstream {

namespace {
constexpr size_t kHuge = size_t{2} << 20;
}

Arena::Arena(size_t bytes) : size_(bytes), mapped_((bytes + kHuge - 1) / kHuge * kHuge + kHuge) {
  void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  // Trim to a 2 MiB boundary at the front, so that every huge page lies inside.
  const uintptr_t base = reinterpret_cast<uintptr_t>(p), start = (base + kHuge - 1) / kHuge * kHuge;
  if (start != base) munmap(p, start - base);
  mapped_ -= start - base;
  data_ = reinterpret_cast<uint8_t*>(start);
#if defined(MADV_DONTFORK)
  // Reads go to pinned pages: after a fork, a write would give this process a copy, and reads would continue into the
  // original.
  madvise(data_, mapped_, MADV_DONTFORK);
#endif
  huge_ = bytes >= kHuge && madvise(data_, bytes / kHuge * kHuge, MADV_HUGEPAGE) == 0;
}

void Arena::release(size_t offset, size_t bytes) { madvise(data_ + offset, bytes, MADV_DONTNEED); }

Arena::~Arena() { munmap(data_, mapped_); }

}  // namespace expertstream
