#include "cli/session.h"

#include <fmt/format.h>

#include "cli/arguments.h"
#include "generator/arch.h"
#include "runtime/cuda/driver.h"
#include "treeattn/error.h"

namespace treeattn::cli {

DeviceChoice parse_device(std::string_view option, std::string_view text) {
  using Kind = DeviceChoice::Kind;
  if (text == "auto") return {Kind::kAuto, 0};
  if (text == "cpu") return {Kind::kCpu, 0};
  if (text == "gpu") return {Kind::kGpu, 0};
  constexpr std::string_view kNumbered = "gpu:";
  if (text.starts_with(kNumbered)) {
    std::string number(text.substr(kNumbered.size()));
    if (whole_number(0, 255)(number).empty()) return {Kind::kGpu, std::stoi(number)};
  }
  throw UsageError(fmt::format("{}: '{}' is not auto, cpu, gpu or gpu:N", option, text));
}

std::string refuse_gpu(int ordinal) {
  std::string why;
  const DriverTable* table = try_driver(&why);
  if (table == nullptr) return why;
  int count = 0;
  if (const CUresult result = table->cuDeviceGetCount(&count); result != CUDA_SUCCESS) {
    return fmt::format("the driver cannot count GPUs: {}", describe(result));
  }
  if (ordinal >= count) return fmt::format("GPU {} was asked for, there are {}", ordinal, count);
  try {
    kernel_target(device_info(ordinal));
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

Session::Session(const DeviceChoice& choice, int threads) {
  using Kind = DeviceChoice::Kind;
  bool gpu = false;
  if (choice.kind != Kind::kCpu) {
    const std::string why = refuse_gpu(choice.ordinal);
    gpu = why.empty();
    if (!gpu && choice.kind == Kind::kGpu) {
      throw Error(ErrorCode::kNotFound, "no GPU can be used: " + why,
                  "'treeattn doctor' says what was found; '--device cpu' runs the CPU executor");
    }
  }
  if (gpu) context_.emplace(choice.ordinal);
  engine_.emplace(
      EngineOptions{.kind = gpu ? EngineKind::kCuda : EngineKind::kCpu, .threads = threads});
}

Json Session::json() const {
  Json json;
  json["description"] = description();
  if (!gpu()) {
    json["kind"] = "cpu";
    return json;
  }
  const DeviceInfo& info = device();
  json["kind"] = "gpu";
  json["name"] = info.name;
  json["compute_capability"] = fmt::format("{}.{}", info.major, info.minor);
  json["sm_count"] = info.sm_count;
  json["clock_khz"] = info.clock_khz;
  int version = 0;
  if (driver().cuDriverGetVersion(&version) == CUDA_SUCCESS) {
    json["driver_cuda"] = cuda_version_text(version);
  }
  return json;
}

}  // namespace treeattn::cli
