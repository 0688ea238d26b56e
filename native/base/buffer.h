#pragma once
// A 64-byte aligned block that grows and is reused from step to step; growing loses the contents.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace nomoat {

constexpr size_t kHugePage = size_t(2) << 20;  // of x86-64, and of Arm with pages of 4 KB

class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() { std::free(data_); }

  // At least `count` elements; new memory is zero. As much as a huge page has these pages, where the system gives them.
  template <class T>
  T* get(size_t count) {
    const size_t wanted = (count * sizeof(T) + 63) / 64 * 64, align = wanted < kHugePage ? 64 : kHugePage;
    if (wanted > bytes_) {
      std::free(std::exchange(data_, nullptr));
      bytes_ = 0;
      if (posix_memalign(&data_, align, wanted)) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      if (align == kHugePage) madvise(data_, wanted, MADV_HUGEPAGE);
#endif
      bytes_ = wanted;
      std::memset(data_, 0, wanted);
    }
    return static_cast<T*>(data_);
  }

  template <class T>
  T* data() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace nomoat
