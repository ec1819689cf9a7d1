// Page-aligned anonymous memory for slots: O_DIRECT requires the alignment, huge pages benefit from it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace expertstream {

class Arena {
 public:
  explicit Arena(size_t bytes);  // zeroed lazily by the kernel; throws std::bad_alloc
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  // Releases the memory of whole pages; it reads as zeros when it is touched again.
  void release(size_t offset, size_t bytes);
  bool huge_pages() const { return huge_; }  // requested and not refused

 private:
  uint8_t* data_;
  size_t size_, mapped_;
  bool huge_;
};

}  // namespace expertstream
