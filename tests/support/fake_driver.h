// A CUDA driver without a GPU: records what it is asked for, can refuse code, and minds stream
// capture as the real one does. It replaces the driver from construction to destruction. One at a
// time; its functions are thread-safe, and each thread has its own current context.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "runtime/cuda/driver.h"

namespace treeattn::test {

class FakeDriver {
 public:
  struct Device {
    std::string name = "Fake GPU";
    int major = 9;
    int minor = 0;
    int sm_count = 132;
    int smem_optin_bytes = 232'448;
    int max_threads = 1024;
    int registers = 65'536;
    int l2_bytes = 50 << 20;
  };
  struct Launch {
    std::string entry;
    CUlaunchConfig config{};
    std::vector<std::byte> params;  ///< the first launch_params_bytes of them
    CUcontext context = nullptr;
  };
  /// What cuTensorMapEncodeTiled was asked for; the map it gives holds the call's number.
  struct TensorMapCall {
    CUtensorMapDataType type{};
    const void* data = nullptr;
    std::vector<std::uint64_t> sizes, strides;
    std::vector<std::uint32_t> box;
    CUtensorMapSwizzle swizzle{};
  };
  struct Kernel {
    std::string entry;
    int library = 0;
  };

  /// The first device's context becomes current on this thread.
  explicit FakeDriver(int devices = 1);
  ~FakeDriver();
  FakeDriver(const FakeDriver&) = delete;
  FakeDriver& operator=(const FakeDriver&) = delete;

  DriverTable table;
  std::vector<Device> devices;
  int cuda_version = 13'000;
  std::size_t launch_params_bytes = 0;
  CUresult tensor_map_result = CUDA_SUCCESS;
  CUresult launch_result = CUDA_SUCCESS;
  CUresult alloc_result = CUDA_SUCCESS;
  CUresult unload_result = CUDA_SUCCESS;
  /// What cuLibraryLoadData answers for an image (see fake_image_text).
  std::function<CUresult(std::string_view image)> on_load;
  /// What cuKernelGetFunction answers, where the real driver loads lazily.
  std::function<CUresult(std::string_view entry)> on_get_function;

  CUcontext context(int device) const;
  /// Of this thread; null: none.
  void make_current(CUcontext context);
  CUcontext current() const;
  void set_capturing(CUstream stream, bool capturing);
  /// Whether something that is forbidden during capture was asked for.
  bool capture_broken() const { return capture_broken_; }

  int loads() const { return loads_; }
  int unloads() const { return unloads_; }
  int live_libraries() const { return loads_ - unloads_; }
  std::vector<Launch> launches() const;
  std::vector<TensorMapCall> tensor_maps() const;
  /// Dynamic shared memory allowed for an entry on a device; -1: never set.
  int smem_limit(const std::string& entry, int device) const;
  int attribute_calls() const { return attribute_calls_; }
  int functions_loaded(CUcontext context) const;
  std::size_t live_allocations() const;
  /// Depth of this thread's context stack.
  std::size_t context_depth() const;

 private:
  friend struct FakeDriverCalls;

  struct Library {
    std::string image;
    bool loaded = true;
  };

  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<int>> contexts_;
  std::vector<std::unique_ptr<Library>> libraries_;
  std::vector<std::unique_ptr<Kernel>> kernels_;
  std::map<std::pair<std::string, int>, int> smem_limits_;
  std::map<CUcontext, int> functions_loaded_;
  std::set<CUstream> capturing_;
  std::set<void*> allocations_;
  std::vector<Launch> launches_;
  std::vector<TensorMapCall> tensor_maps_;
  std::atomic<int> loads_{0}, unloads_{0}, attribute_calls_{0};
  std::atomic<bool> capture_broken_{false};
};

}  // namespace treeattn::test
