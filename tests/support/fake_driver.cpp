#include "tests/support/fake_driver.h"

#include <cstdlib>
#include <cstring>

#include "tests/support/fake_nvrtc.h"

namespace treeattn::test {

namespace {

FakeDriver* active = nullptr;

struct ThreadState {
  std::vector<CUcontext> stack;
  CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
};
ThreadState& thread_state() {
  thread_local ThreadState state;
  return state;
}

}  // namespace

struct FakeDriverCalls {
  static FakeDriver& fake() { return *active; }
  static int device_of(CUcontext context) {
    for (std::size_t i = 0; i < fake().contexts_.size(); ++i) {
      if (fake().context(static_cast<int>(i)) == context) return static_cast<int>(i);
    }
    return -1;
  }
  static bool known(CUdevice device) {
    return device >= 0 && device < static_cast<int>(fake().devices.size());
  }
  /// What the real driver answers to unsafe calls while anything is captured.
  static bool forbidden_by_capture() {
    const std::lock_guard lock(fake().mutex_);
    if (fake().capturing_.empty()) return false;
    if (thread_state().capture_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return false;
    fake().capture_broken_ = true;
    return true;
  }

  static CUresult init(unsigned) { return CUDA_SUCCESS; }
  static CUresult driver_version(int* version) {
    *version = fake().cuda_version;
    return CUDA_SUCCESS;
  }
  static CUresult error_name(CUresult error, const char** name) {
    *name = error == CUDA_ERROR_INVALID_IMAGE   ? "CUDA_ERROR_INVALID_IMAGE"
            : error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
                                                : "CUDA_ERROR_FAKE";
    return CUDA_SUCCESS;
  }
  static CUresult error_string(CUresult error, const char** text) {
    *text = error == CUDA_ERROR_INVALID_IMAGE ? "device kernel image is invalid" : "as told";
    return CUDA_SUCCESS;
  }
  static CUresult device_get(CUdevice* device, int ordinal) {
    if (!known(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
  }
  static CUresult device_count(int* count) {
    *count = static_cast<int>(fake().devices.size());
    return CUDA_SUCCESS;
  }
  static CUresult device_name(char* name, int bytes, CUdevice device) {
    if (!known(device)) return CUDA_ERROR_INVALID_DEVICE;
    std::strncpy(name, fake().devices[static_cast<std::size_t>(device)].name.c_str(),
                 static_cast<std::size_t>(bytes));
    return CUDA_SUCCESS;
  }
  static CUresult device_attribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    if (!known(device)) return CUDA_ERROR_INVALID_DEVICE;
    const auto& info = fake().devices[static_cast<std::size_t>(device)];
    switch (attribute) {
      case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
        *value = info.major;
        return CUDA_SUCCESS;
      case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
        *value = info.minor;
        return CUDA_SUCCESS;
      case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
        *value = info.sm_count;
        return CUDA_SUCCESS;
      case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
        *value = info.smem_optin_bytes;
        return CUDA_SUCCESS;
      case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        *value = info.max_threads;
        return CUDA_SUCCESS;
      case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
        *value = info.registers;
        return CUDA_SUCCESS;
      case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
        *value = info.l2_bytes;
        return CUDA_SUCCESS;
      case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
        *value = 1'980'000;
        return CUDA_SUCCESS;
      default:
        return CUDA_ERROR_INVALID_VALUE;
    }
  }
  static CUresult total_memory(std::size_t* bytes, CUdevice) {
    *bytes = std::size_t{80} << 30;
    return CUDA_SUCCESS;
  }
  static CUresult primary_retain(CUcontext* context, CUdevice device) {
    if (!known(device)) return CUDA_ERROR_INVALID_DEVICE;
    *context = fake().context(device);
    return CUDA_SUCCESS;
  }
  static CUresult primary_release(CUdevice) { return CUDA_SUCCESS; }
  static CUresult get_current(CUcontext* context) {
    *context = fake().current();
    return CUDA_SUCCESS;
  }
  static CUresult get_device(CUdevice* device) {
    const CUcontext current = fake().current();
    if (current == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    *device = device_of(current);
    return CUDA_SUCCESS;
  }
  static CUresult push(CUcontext context) {
    thread_state().stack.push_back(context);
    return CUDA_SUCCESS;
  }
  static CUresult pop(CUcontext* context) {
    auto& stack = thread_state().stack;
    if (stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    *context = stack.back();
    stack.pop_back();
    return CUDA_SUCCESS;
  }
  static CUresult synchronize() { return CUDA_SUCCESS; }

  static CUresult load(CUlibrary* library, const void* image, CUjit_option*, void**, unsigned,
                       CUlibraryOption*, void**, unsigned) {
    if (forbidden_by_capture()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    const std::string text(fake_image_text(image));
    if (fake().on_load) {
      if (const CUresult result = fake().on_load(text); result != CUDA_SUCCESS) return result;
    }
    const std::lock_guard lock(fake().mutex_);
    fake().libraries_.push_back(std::make_unique<FakeDriver::Library>());
    fake().libraries_.back()->image = text;
    ++fake().loads_;
    *library = reinterpret_cast<CUlibrary>(fake().libraries_.back().get());
    return CUDA_SUCCESS;
  }
  static CUresult unload(CUlibrary library) {
    if (forbidden_by_capture()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    const std::lock_guard lock(fake().mutex_);
    auto& own = *reinterpret_cast<FakeDriver::Library*>(library);
    if (!own.loaded) return CUDA_ERROR_INVALID_HANDLE;
    own.loaded = false;
    ++fake().unloads_;
    return fake().unload_result;
  }
  static CUresult get_kernel(CUkernel* kernel, CUlibrary library, const char* name) {
    const std::lock_guard lock(fake().mutex_);
    const auto& own = *reinterpret_cast<FakeDriver::Library*>(library);
    const std::string entry = name;
    if (own.image.find("=" + entry + ",") == std::string::npos &&
        own.image.find("," + entry + ",") == std::string::npos) {
      return CUDA_ERROR_NOT_FOUND;
    }
    fake().kernels_.push_back(std::make_unique<FakeDriver::Kernel>());
    fake().kernels_.back()->entry = entry;
    *kernel = reinterpret_cast<CUkernel>(fake().kernels_.back().get());
    return CUDA_SUCCESS;
  }
  static CUresult get_function(CUfunction* function, CUkernel kernel) {
    if (forbidden_by_capture()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (fake().current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    const std::string& entry = reinterpret_cast<FakeDriver::Kernel*>(kernel)->entry;
    if (fake().on_get_function) {
      if (const CUresult result = fake().on_get_function(entry); result != CUDA_SUCCESS) {
        return result;
      }
    }
    *function = reinterpret_cast<CUfunction>(kernel);
    return CUDA_SUCCESS;
  }
  static CUresult func_load(CUfunction) {
    const std::lock_guard lock(fake().mutex_);
    ++fake().functions_loaded_[fake().current()];
    return CUDA_SUCCESS;
  }
  static CUresult set_attribute(CUfunction_attribute attribute, int value, CUkernel kernel,
                                CUdevice device) {
    if (!known(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
      return CUDA_ERROR_INVALID_VALUE;
    const std::lock_guard lock(fake().mutex_);
    ++fake().attribute_calls_;
    fake().smem_limits_[{reinterpret_cast<FakeDriver::Kernel*>(kernel)->entry, device}] = value;
    return CUDA_SUCCESS;
  }
  static CUresult get_attribute(int* value, CUfunction_attribute, CUkernel, CUdevice) {
    *value = 0;
    return CUDA_SUCCESS;
  }
  static CUresult launch(const CUlaunchConfig* config, CUfunction function, void** params, void**) {
    if (fake().current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    if (fake().launch_result != CUDA_SUCCESS) return fake().launch_result;
    FakeDriver::Launch launch;
    launch.entry = reinterpret_cast<FakeDriver::Kernel*>(function)->entry;
    launch.config = *config;
    launch.context = fake().current();
    const auto* bytes = static_cast<const std::byte*>(params[0]);
    if (fake().launch_params_bytes > 0) {
      launch.params.assign(bytes, bytes + fake().launch_params_bytes);
    }
    const std::lock_guard lock(fake().mutex_);
    fake().launches_.push_back(std::move(launch));
    return CUDA_SUCCESS;
  }

  static CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                    void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                                    const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                                    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                    CUtensorMapFloatOOBfill) {
    if (fake().tensor_map_result != CUDA_SUCCESS) return fake().tensor_map_result;
    const std::lock_guard lock(fake().mutex_);
    fake().tensor_maps_.push_back({type,
                                   data,
                                   {sizes, sizes + rank},
                                   {strides, strides + rank - 1},
                                   {box, box + rank},
                                   swizzle});
    std::memset(map, static_cast<int>(fake().tensor_maps_.size()), sizeof(*map));
    return CUDA_SUCCESS;
  }

  static CUresult is_capturing(CUstream stream, CUstreamCaptureStatus* status) {
    const std::lock_guard lock(fake().mutex_);
    const bool captured = fake().capturing_.count(stream) > 0;
    if (stream == nullptr && !captured && !fake().capturing_.empty()) {
      return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
    *status = captured ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
  }
  static CUresult exchange_mode(CUstreamCaptureMode* mode) {
    std::swap(*mode, thread_state().capture_mode);
    return CUDA_SUCCESS;
  }
  static CUresult stream_create(CUstream* stream, unsigned) {
    *stream = reinterpret_cast<CUstream>(new char);
    const std::lock_guard lock(fake().mutex_);
    fake().allocations_.insert(*stream);
    return CUDA_SUCCESS;
  }
  static CUresult stream_destroy(CUstream stream) {
    const std::lock_guard lock(fake().mutex_);
    if (fake().allocations_.erase(stream) == 0) return CUDA_ERROR_INVALID_HANDLE;
    delete reinterpret_cast<char*>(stream);
    return CUDA_SUCCESS;
  }
  static CUresult stream_synchronize(CUstream) { return CUDA_SUCCESS; }
  static CUresult event_create(CUevent* event, unsigned) {
    *event = reinterpret_cast<CUevent>(new char);
    const std::lock_guard lock(fake().mutex_);
    fake().allocations_.insert(*event);
    return CUDA_SUCCESS;
  }
  static CUresult event_destroy(CUevent event) {
    const std::lock_guard lock(fake().mutex_);
    if (fake().allocations_.erase(event) == 0) return CUDA_ERROR_INVALID_HANDLE;
    delete reinterpret_cast<char*>(event);
    return CUDA_SUCCESS;
  }
  static CUresult event_record(CUevent, CUstream) { return CUDA_SUCCESS; }
  static CUresult event_synchronize(CUevent) { return CUDA_SUCCESS; }
  static CUresult event_elapsed(float* ms, CUevent, CUevent) {
    *ms = 1.5F;
    return CUDA_SUCCESS;
  }

  static void* host(CUdeviceptr address) { return reinterpret_cast<void*>(address); }
  static CUresult alloc(CUdeviceptr* address, std::size_t bytes) {
    if (fake().alloc_result != CUDA_SUCCESS) return fake().alloc_result;
    void* memory = std::malloc(bytes);
    const std::lock_guard lock(fake().mutex_);
    fake().allocations_.insert(memory);
    *address = reinterpret_cast<CUdeviceptr>(memory);
    return CUDA_SUCCESS;
  }
  static CUresult free_memory(CUdeviceptr address) {
    const std::lock_guard lock(fake().mutex_);
    if (fake().allocations_.erase(host(address)) == 0) return CUDA_ERROR_INVALID_VALUE;
    std::free(host(address));
    return CUDA_SUCCESS;
  }
  static CUresult copy_to(CUdeviceptr to, const void* from, std::size_t bytes, CUstream) {
    std::memcpy(host(to), from, bytes);
    return CUDA_SUCCESS;
  }
  static CUresult copy_from(void* to, CUdeviceptr from, std::size_t bytes, CUstream) {
    std::memcpy(to, host(from), bytes);
    return CUDA_SUCCESS;
  }
  static CUresult copy_within(CUdeviceptr to, CUdeviceptr from, std::size_t bytes, CUstream) {
    std::memmove(host(to), host(from), bytes);
    return CUDA_SUCCESS;
  }
  static CUresult set_words(CUdeviceptr to, unsigned value, std::size_t count, CUstream) {
    for (std::size_t i = 0; i < count; ++i) static_cast<unsigned*>(host(to))[i] = value;
    return CUDA_SUCCESS;
  }
  static CUresult set_bytes(CUdeviceptr to, unsigned char value, std::size_t count, CUstream) {
    std::memset(host(to), value, count);
    return CUDA_SUCCESS;
  }

  static void fill(DriverTable& table) {
    table.cuInit = init;
    table.cuDriverGetVersion = driver_version;
    table.cuGetErrorName = error_name;
    table.cuGetErrorString = error_string;
    table.cuDeviceGet = device_get;
    table.cuDeviceGetCount = device_count;
    table.cuDeviceGetName = device_name;
    table.cuDeviceGetAttribute = device_attribute;
    table.cuDeviceTotalMem = total_memory;
    table.cuDevicePrimaryCtxRetain = primary_retain;
    table.cuDevicePrimaryCtxRelease = primary_release;
    table.cuCtxGetCurrent = get_current;
    table.cuCtxGetDevice = get_device;
    table.cuCtxPushCurrent = push;
    table.cuCtxPopCurrent = pop;
    table.cuCtxSynchronize = synchronize;
    table.cuLibraryLoadData = load;
    table.cuLibraryUnload = unload;
    table.cuLibraryGetKernel = get_kernel;
    table.cuKernelGetFunction = get_function;
    table.cuFuncLoad = func_load;
    table.cuKernelSetAttribute = set_attribute;
    table.cuKernelGetAttribute = get_attribute;
    table.cuLaunchKernelEx = launch;
    table.cuTensorMapEncodeTiled = encode_tensor_map;
    table.cuStreamIsCapturing = is_capturing;
    table.cuThreadExchangeStreamCaptureMode = exchange_mode;
    table.cuStreamCreate = stream_create;
    table.cuStreamDestroy = stream_destroy;
    table.cuStreamSynchronize = stream_synchronize;
    table.cuEventCreate = event_create;
    table.cuEventDestroy = event_destroy;
    table.cuEventRecord = event_record;
    table.cuEventSynchronize = event_synchronize;
    table.cuEventElapsedTime = event_elapsed;
    table.cuMemAlloc = alloc;
    table.cuMemFree = free_memory;
    table.cuMemcpyHtoDAsync = copy_to;
    table.cuMemcpyDtoHAsync = copy_from;
    table.cuMemcpyDtoDAsync = copy_within;
    table.cuMemsetD32Async = set_words;
    table.cuMemsetD8Async = set_bytes;
  }
};

FakeDriver::FakeDriver(int device_count) : devices(static_cast<std::size_t>(device_count)) {
  for (int i = 0; i < device_count; ++i) contexts_.push_back(std::make_unique<int>(i));
  FakeDriverCalls::fill(table);
  active = this;
  thread_state() = {};
  make_current(context(0));
  set_driver_for_testing(&table);
}

FakeDriver::~FakeDriver() {
  set_driver_for_testing(nullptr);
  thread_state() = {};
  active = nullptr;
}

CUcontext FakeDriver::context(int device) const {
  return reinterpret_cast<CUcontext>(contexts_[static_cast<std::size_t>(device)].get());
}

void FakeDriver::make_current(CUcontext context) {
  thread_state().stack.clear();
  if (context != nullptr) thread_state().stack.push_back(context);
}

CUcontext FakeDriver::current() const {
  const auto& stack = thread_state().stack;
  return stack.empty() ? nullptr : stack.back();
}

void FakeDriver::set_capturing(CUstream stream, bool capturing) {
  const std::lock_guard lock(mutex_);
  if (capturing) {
    capturing_.insert(stream);
  } else {
    capturing_.erase(stream);
  }
}

std::vector<FakeDriver::Launch> FakeDriver::launches() const {
  const std::lock_guard lock(mutex_);
  return launches_;
}

std::vector<FakeDriver::TensorMapCall> FakeDriver::tensor_maps() const {
  const std::lock_guard lock(mutex_);
  return tensor_maps_;
}

int FakeDriver::smem_limit(const std::string& entry, int device) const {
  const std::lock_guard lock(mutex_);
  const auto found = smem_limits_.find({entry, device});
  return found != smem_limits_.end() ? found->second : -1;
}

int FakeDriver::functions_loaded(CUcontext context) const {
  const std::lock_guard lock(mutex_);
  const auto found = functions_loaded_.find(context);
  return found != functions_loaded_.end() ? found->second : 0;
}

std::size_t FakeDriver::live_allocations() const {
  const std::lock_guard lock(mutex_);
  return allocations_.size();
}

std::size_t FakeDriver::context_depth() const {
  return thread_state().stack.size();
}

}  // namespace treeattn::test
