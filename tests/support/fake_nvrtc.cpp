#include "tests/support/fake_nvrtc.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <mutex>

#include "tests/support/fake_artifact.h"

namespace treeattn::test {

namespace {

constexpr std::size_t kElfHeaderBytes = 64;

FakeNvrtc* active = nullptr;
std::mutex options_mutex;

struct Program {
  std::string source;
  std::string log;
  std::vector<std::byte> cubin;
};
Program& program_of(nvrtcProgram handle) {
  return *reinterpret_cast<Program*>(handle);
}

std::vector<std::string> entries_of(const std::string& source) {
  constexpr std::string_view kMark = "__global__ void ";
  std::vector<std::string> entries;
  for (std::size_t at = source.find(kMark); at != std::string::npos; at = source.find(kMark, at)) {
    at += kMark.size();
    entries.push_back(source.substr(at, source.find('(', at) - at));
  }
  return entries;
}

std::string ptxas_report(const std::string& entry, int spill_bytes) {
  return fmt::format(
      "ptxas info    : Compiling entry function '{0}' for 'sm_90'\n"
      "ptxas info    : Function properties for {0}\n"
      "ptxas         .     {1} bytes stack frame, {1} bytes spill stores, {1} bytes spill loads\n"
      "ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem\n",
      entry, spill_bytes);
}

}  // namespace

std::vector<std::byte> fake_image(const std::vector<std::string>& entries,
                                  std::string_view source) {
  std::vector<std::byte> image = fake_cubin(1, kElfHeaderBytes);
  std::string text = "entries=";
  for (const std::string& entry : entries) text += entry + ",";
  text += fmt::format(";source={};", std::hash<std::string_view>{}(source));
  const auto bytes = std::as_bytes(std::span(text.c_str(), text.size() + 1));
  image.insert(image.end(), bytes.begin(), bytes.end());
  return image;
}

std::string_view fake_image_text(const void* image) {
  return static_cast<const char*>(image) + kElfHeaderBytes;
}

KernelSpec fake_spec(int head_dim) {
  KernelSpec spec;
  spec.problem.target = Target{90, false};
  spec.problem.head_dim = static_cast<std::uint16_t>(head_dim);
  spec.problem.head_dim_v = static_cast<std::uint16_t>(head_dim);
  spec.tile = {128, 64, 2, 4};
  return spec;
}

GeneratedSource fake_source(const KernelSpec& spec, int entries) {
  GeneratedSource source;
  source.spec = spec;
  source.text = "// " + to_string(spec) + "\n";
  for (int i = 0; i < entries; ++i) {
    const std::string name = fmt::format("kernel_d{}_{}", spec.problem.head_dim, i);
    source.text += fmt::format(
        "extern \"C\" __global__ void {}(float* p) {{ p[threadIdx.x] = {}; }}\n", name, i);
    source.entries.push_back({name, 128, 1000 * (i + 1)});
  }
  return source;
}

struct FakeNvrtcCalls {
  static nvrtcResult version(int* major, int* minor) {
    *major = active->table.major;
    *minor = active->table.minor;
    return NVRTC_SUCCESS;
  }
  static const char* error_string(nvrtcResult result) {
    return result == NVRTC_ERROR_COMPILATION ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR_FAKE";
  }
  static nvrtcResult create(nvrtcProgram* program, const char* source, const char*, int,
                            const char* const*, const char* const*) {
    *program = reinterpret_cast<nvrtcProgram>(new Program{source, {}, {}});
    ++active->live_programs_;
    return NVRTC_SUCCESS;
  }
  static nvrtcResult destroy(nvrtcProgram* program) {
    delete reinterpret_cast<Program*>(*program);
    *program = nullptr;
    --active->live_programs_;
    return NVRTC_SUCCESS;
  }
  static nvrtcResult compile(nvrtcProgram handle, int count, const char* const* options) {
    Program& program = program_of(handle);
    constexpr const char* kProbe = "treeattn-nvrtc-build=";
    if (program.source.find(kProbe) != std::string::npos) {
      program.log = fmt::format("probe.cu(3): error: \"{}{};\"", kProbe, active->build);
      return NVRTC_ERROR_COMPILATION;
    }
    ++active->compiles_;
    std::string all;
    for (int i = 0; i < count; ++i) all += std::string(options[i]) + " ";
    {
      const std::lock_guard lock(options_mutex);
      active->last_options_ = all;
    }
    if (active->on_compile) active->on_compile();
    if (!active->fail_log.empty()) {
      program.log = active->fail_log;
      return NVRTC_ERROR_COMPILATION;
    }
    const std::vector<std::string> entries = entries_of(program.source);
    for (const std::string& entry : entries)
      program.log += ptxas_report(entry, active->spill_bytes);
    program.log += active->extra_log;
    program.cubin = fake_image(
        entries, fmt::format("{}.{} {}", active->table.major, active->build, program.source));
    if (active->garbage) program.cubin.assign(100, std::byte{'x'});
    return NVRTC_SUCCESS;
  }
  static nvrtcResult cubin_size(nvrtcProgram program, std::size_t* bytes) {
    *bytes = program_of(program).cubin.size();
    return NVRTC_SUCCESS;
  }
  static nvrtcResult cubin(nvrtcProgram program, char* to) {
    const auto& bytes = program_of(program).cubin;
    std::memcpy(to, bytes.data(), bytes.size());
    return NVRTC_SUCCESS;
  }
  static nvrtcResult log_size(nvrtcProgram program, std::size_t* bytes) {
    *bytes = program_of(program).log.size() + 1;
    return NVRTC_SUCCESS;
  }
  static nvrtcResult log(nvrtcProgram program, char* to) {
    const std::string& text = program_of(program).log;
    std::memcpy(to, text.c_str(), text.size() + 1);
    return NVRTC_SUCCESS;
  }
  static nvrtcResult arch_count(int* count) {
    *count = static_cast<int>(active->archs.size());
    return NVRTC_SUCCESS;
  }
  static nvrtcResult archs(int* to) {
    std::copy(active->archs.begin(), active->archs.end(), to);
    return NVRTC_SUCCESS;
  }
};

FakeNvrtc::FakeNvrtc(int major, int minor, int build_number) : build(build_number) {
  table.nvrtcVersion = FakeNvrtcCalls::version;
  table.nvrtcGetErrorString = FakeNvrtcCalls::error_string;
  table.nvrtcCreateProgram = FakeNvrtcCalls::create;
  table.nvrtcDestroyProgram = FakeNvrtcCalls::destroy;
  table.nvrtcCompileProgram = FakeNvrtcCalls::compile;
  table.nvrtcGetCUBINSize = FakeNvrtcCalls::cubin_size;
  table.nvrtcGetCUBIN = FakeNvrtcCalls::cubin;
  table.nvrtcGetProgramLogSize = FakeNvrtcCalls::log_size;
  table.nvrtcGetProgramLog = FakeNvrtcCalls::log;
  table.nvrtcGetNumSupportedArchs = FakeNvrtcCalls::arch_count;
  table.nvrtcGetSupportedArchs = FakeNvrtcCalls::archs;
  table.major = major;
  table.minor = minor;
  table.path = fmt::format("/fake/{}/libnvrtc.so.{}", build, major);
  active = this;
  set_nvrtc_for_testing(&table);
}

FakeNvrtc::~FakeNvrtc() {
  set_nvrtc_for_testing(nullptr);
  active = nullptr;
}

std::string FakeNvrtc::last_options() const {
  const std::lock_guard lock(options_mutex);
  return last_options_;
}

}  // namespace treeattn::test
