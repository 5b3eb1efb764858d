// Problems for emulated kernels: small ones, and the kernels by pass.
#pragma once

#include <gtest/gtest.h>

#include <cctype>
#include <cstdint>
#include <cstring>
#include <ostream>
#include <span>
#include <string>
#include <vector>

#include "generator/kernel_spec.h"
#include "runtime/attention/plan_cpu.h"
#include "runtime/cuda/tensor_map.h"
#include "tests/emulator/device.h"
#include "tests/support/random_case.h"

namespace emulator {

inline void PrintTo(const Kernel& kernel, std::ostream* os) {
  *os << kernel.spec;
}

}  // namespace emulator

namespace treeattn::testing {

inline std::vector<emulator::Kernel> emulated_kernels(Pass pass) {
  std::vector<emulator::Kernel> found;
  for (const emulator::Kernel& kernel : emulator::kernels()) {
    if (parse_kernel_spec(kernel.spec).problem.pass == pass) found.push_back(kernel);
  }
  return found;
}

/// Random cases that a kernel's problem fits and the emulator is through with in a second.
inline RandomCaseOptions emulated_cases(const Problem& problem) {
  RandomCaseOptions options;
  options.dtype = problem.dtype == KernelDType::kF16 ? DType::kF16 : DType::kBF16;
  options.head_dim = problem.head_dim;
  options.head_dim_v = problem.head_dim_v;
  options.softcap = problem.softcap;
  options.long_share = 0;
  options.most_short_tokens = 300;
  return options;
}

inline std::string emulated_name(const ::testing::TestParamInfo<emulator::Kernel>& info) {
  std::string name = info.param.spec;
  for (char& c : name) {
    if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
  }
  return name;
}

inline emulator::Tensor emulated_tensor(const TensorMapRequest& map) {
  return {static_cast<const std::uint16_t*>(map.data),
          map.dims,
          map.head_step() == 0 ? 1 : map.heads,
          map.tokens,
          map.token_stride,
          map.head_stride,
          map.box_heads,
          map.rows};
}

/// A map of a tensor that has to outlive it.
inline TensorMap emulated_map(const emulator::Tensor& tensor) {
  const emulator::Tensor* pointer = &tensor;
  TensorMap map{};
  std::memcpy(&map, &pointer, sizeof pointer);
  return map;
}

/// A case's plan in host memory.
struct EmulatedPlan {
  PlanShape shape;
  Plan header;
  std::vector<int> buffer;

  EmulatedPlan(const RandomCase& problem, std::span<const PlanView> views)
      : shape(problem.plan_shape(views)),
        header(to_plan(shape)),
        buffer(static_cast<std::size_t>(plan_offsets(shape).total_ints), -1) {
    build_plan_cpu(shape, problem.plan_inputs(), buffer.data());
  }
};

/// How many of `count` random cases there is time for: AddressSanitizer takes ten times as long.
constexpr std::uint64_t emulated_count(std::uint64_t count) {
#if defined(__SANITIZE_ADDRESS__)
  return (count + 3) / 4;
#else
  return count;
#endif
}

/// Multiprocessors of the emulated device: few, so that each gets much to do.
inline constexpr int kEmulatedMultiprocessors = 3;
inline constexpr std::int64_t kEmulatedL2Bytes = std::int64_t{1} << 20;

}  // namespace treeattn::testing
