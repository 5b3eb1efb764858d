#include "runtime/cuda/device_memory.h"

#include <fmt/format.h>

#include "treeattn/error.h"

namespace treeattn {

DeviceBuffer::DeviceBuffer(std::size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  const CUresult result = driver().cuMemAlloc(&address_, bytes);
  if (result != CUDA_SUCCESS) {
    throw_cuda_error(result, fmt::format("allocating {} bytes of device memory", bytes));
  }
}

DeviceBuffer::~DeviceBuffer() {
  const DriverTable* const d = driver_if_in_use();
  if (address_ != 0 && d != nullptr) d->cuMemFree(address_);
}

void DeviceBuffer::check_range(std::size_t bytes, std::size_t offset) const {
  if (offset <= bytes_ && bytes <= bytes_ - offset) return;
  throw Error(ErrorCode::kInvalidArgument,
              fmt::format("copying {} bytes at offset {} of a device buffer of {} bytes", bytes,
                          offset, bytes_));
}

void DeviceBuffer::upload_bytes(const void* from, std::size_t bytes, std::size_t offset,
                                CUstream stream) {
  check_range(bytes, offset);
  if (bytes == 0) return;
  const DriverTable& d = driver();
  check(d.cuMemcpyHtoDAsync(address_ + offset, from, bytes, stream), "copying to the device");
  check(d.cuStreamSynchronize(stream), "copying to the device");
}

void DeviceBuffer::download_bytes(void* to, std::size_t bytes, std::size_t offset,
                                  CUstream stream) const {
  check_range(bytes, offset);
  if (bytes == 0) return;
  const DriverTable& d = driver();
  check(d.cuMemcpyDtoHAsync(to, address_ + offset, bytes, stream), "copying from the device");
  check(d.cuStreamSynchronize(stream), "copying from the device");
}

void DeviceBuffer::fill(std::uint8_t value, CUstream stream) {
  if (bytes_ == 0) return;
  check(driver().cuMemsetD8Async(address_, value, bytes_, stream), "filling device memory");
}

void DeviceBuffer::fill_words(std::uint32_t value, CUstream stream) {
  if (bytes_ < sizeof value) return;
  check(driver().cuMemsetD32Async(address_, value, bytes_ / sizeof value, stream),
        "filling device memory");
}

Event::Event() {
  check(driver().cuEventCreate(&event_, CU_EVENT_DEFAULT), "cuEventCreate");
}

Event::~Event() {
  const DriverTable* const d = driver_if_in_use();
  if (event_ != nullptr && d != nullptr) d->cuEventDestroy(event_);
}

void Event::record(CUstream stream) {
  check(driver().cuEventRecord(event_, stream), "cuEventRecord");
}

void Event::synchronize() const {
  check(driver().cuEventSynchronize(event_), "cuEventSynchronize");
}

float Event::ms_since(const Event& start) const {
  float ms = 0;
  check(driver().cuEventElapsedTime(&ms, start.event_, event_), "cuEventElapsedTime");
  return ms;
}

StreamOwner::StreamOwner() {
  check(driver().cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
}

StreamOwner::~StreamOwner() {
  const DriverTable* const d = driver_if_in_use();
  if (stream_ != nullptr && d != nullptr) d->cuStreamDestroy(stream_);
}

void StreamOwner::synchronize() const {
  check(driver().cuStreamSynchronize(stream_), "cuStreamSynchronize");
}

}  // namespace treeattn
