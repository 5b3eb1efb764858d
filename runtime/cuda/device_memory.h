// Device memory, events and streams with an owner, for the command line, tests and benchmarks: the
// library itself never allocates. Needs a current context. Throws Error(kCudaError); not
// thread-safe. Destructors ignore errors and a driver that is gone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "runtime/cuda/driver.h"

namespace treeattn {

/// Device memory. 0 bytes is a null pointer.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(std::size_t bytes);
  ~DeviceBuffer();
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : address_(std::exchange(other.address_, 0)), bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(address_, other.address_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  /// A buffer that holds a copy of `values`.
  template <typename T>
  static DeviceBuffer copy_of(std::span<const T> values, CUstream stream = nullptr) {
    DeviceBuffer buffer(values.size_bytes());
    buffer.upload(values, 0, stream);
    return buffer;
  }
  template <typename T>
  static DeviceBuffer copy_of(const std::vector<T>& values, CUstream stream = nullptr) {
    return copy_of(std::span<const T>(values), stream);
  }

  CUdeviceptr address() const { return address_; }
  std::size_t bytes() const { return bytes_; }
  template <typename T = void>
  T* as() const {
    return reinterpret_cast<T*>(address_);
  }

  /// Copies `values` to `offset_bytes`; complete when the call returns.
  template <typename T>
  void upload(std::span<const T> values, std::size_t offset_bytes = 0, CUstream stream = nullptr) {
    static_assert(std::is_trivially_copyable_v<T>);
    upload_bytes(values.data(), values.size_bytes(), offset_bytes, stream);
  }
  /// Waits for the stream and copies `count` elements from `offset_bytes`.
  template <typename T>
  std::vector<T> download(std::size_t count, std::size_t offset_bytes = 0,
                          CUstream stream = nullptr) const {
    static_assert(std::is_trivially_copyable_v<T>);
    std::vector<T> values(count);
    download_bytes(values.data(), count * sizeof(T), offset_bytes, stream);
    return values;
  }
  /// Everything that fits.
  template <typename T>
  std::vector<T> download_all(CUstream stream = nullptr) const {
    return download<T>(bytes_ / sizeof(T), 0, stream);
  }
  /// Sets every byte; asynchronous.
  void fill(std::uint8_t value, CUstream stream = nullptr);
  /// Sets every whole 32-bit word; asynchronous.
  void fill_words(std::uint32_t value, CUstream stream = nullptr);

 private:
  void upload_bytes(const void* from, std::size_t bytes, std::size_t offset, CUstream stream);
  void download_bytes(void* to, std::size_t bytes, std::size_t offset, CUstream stream) const;
  void check_range(std::size_t bytes, std::size_t offset) const;

  CUdeviceptr address_ = 0;
  std::size_t bytes_ = 0;
};

class Event {
 public:
  Event();
  ~Event();
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  CUevent get() const { return event_; }
  void record(CUstream stream = nullptr);
  void synchronize() const;
  /// Milliseconds from `start` to this event, both of which have happened.
  float ms_since(const Event& start) const;

 private:
  CUevent event_ = nullptr;
};

/// A stream that does not wait for the default stream.
class StreamOwner {
 public:
  StreamOwner();
  ~StreamOwner();
  StreamOwner(StreamOwner&& other) noexcept : stream_(std::exchange(other.stream_, nullptr)) {}
  StreamOwner& operator=(StreamOwner&& other) noexcept {
    std::swap(stream_, other.stream_);
    return *this;
  }
  StreamOwner(const StreamOwner&) = delete;
  StreamOwner& operator=(const StreamOwner&) = delete;

  CUstream get() const { return stream_; }
  void synchronize() const;

 private:
  CUstream stream_ = nullptr;
};

}  // namespace treeattn
