// Every default spec through the NVRTC of this machine: it compiles, spills nothing in the targets
// that promise it, and stays inside the registers its launch bounds allow.
#include <gtest/gtest.h>

#include <atomic>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "generator/arch.h"
#include "generator/generate.h"
#include "generator/launch_bounds.h"
#include "generator/tile_space.h"
#include "runtime/cuda/nvrtc.h"
#include "runtime/jit/compiler.h"
#include "tests/support/cpu_time.h"
#include "treeattn/error.h"

namespace treeattn {
namespace {

struct Compiled {
  KernelSpec spec;
  CompileResult result;
};

std::vector<Compiled> compile_all(const std::vector<KernelSpec>& specs) {
  std::vector<Compiled> done(specs.size());
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    NvrtcCompiler compiler{""};
    for (std::size_t i = next++; i < specs.size(); i = next++) {
      done[i] = {specs[i], compiler.compile(generate(specs[i]), compile_options(specs[i]))};
    }
  };
  std::vector<std::thread> threads(std::max(1U, std::thread::hardware_concurrency()));
  for (std::thread& thread : threads) thread = std::thread(work);
  for (std::thread& thread : threads) thread.join();
  return done;
}

bool has_nvrtc() {
  return NvrtcCompiler("").info().available;
}

bool knows(Target target) {
  const auto archs = nvrtc_supported_archs(nvrtc());
  return std::find(archs.begin(), archs.end(), target.cc) != archs.end();
}

using PassAndTarget = std::tuple<Pass, const char*>;
class CompileMatrixSlow : public ::testing::TestWithParam<PassAndTarget> {};

TEST_P(CompileMatrixSlow, DefaultSpecsCompileWithoutSpills) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC on this machine";
  const auto& [pass, name] = GetParam();
  const Target target = parse_target(name);
  if (!knows(target)) GTEST_SKIP() << "this NVRTC does not compile for " << to_string(target);
  for (const Compiled& compiled : compile_all(default_specs(pass, target))) {
    const std::string text = to_string(compiled.spec);
    ASSERT_TRUE(compiled.result.artifact) << text << ": " << compiled.result.failure;
    ASSERT_EQ(compiled.result.artifact->entries.size(), pass == Pass::kBackward ? 3U : 1U);
    for (const EntryFacts& facts : compiled.result.artifact->entries) {
      EXPECT_EQ(facts.spill_bytes, 0) << text << " " << facts.name;
      EXPECT_GT(facts.registers, 15) << text << ": ptxas said nothing";
      if (facts.smem_bytes == 0) continue;
      EXPECT_LE(blocks_per_sm(compiled.spec) * facts.threads * facts.registers, 65536) << text;
      EXPECT_EQ(facts.static_smem_bytes, 0) << text;
    }
  }
}

std::string point_name(const ::testing::TestParamInfo<PassAndTarget>& point) {
  static const char* const kNames[] = {"plan", "fwd", "bwd", "bwd_dq"};
  return std::string(kNames[static_cast<int>(std::get<0>(point.param))]) + "_" +
         std::get<1>(point.param);
}

INSTANTIATE_TEST_SUITE_P(Targets, CompileMatrixSlow,
                         ::testing::Combine(::testing::Values(Pass::kForward, Pass::kBackward,
                                                              Pass::kBackwardDq),
                                            ::testing::Values("sm_80", "sm_86", "sm_89", "sm_90")),
                         point_name);
// No spills, and neither serialised wgmma nor an ignored setmaxnreg: those fail the compilation.
INSTANTIATE_TEST_SUITE_P(Sm90Family, CompileMatrixSlow,
                         ::testing::Values(PassAndTarget{Pass::kForward, "sm_90a"}), point_name);

// Every head dim that the family's backward has.
TEST(CompileSlow, Sm90BackwardCompilesWithoutSpills) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC on this machine";
  std::vector<KernelSpec> specs;
  for (const KernelSpec& spec : default_specs(Pass::kBackward, kSm90Target)) {
    if (spec.problem.family == Family::kSm90) specs.push_back(spec);
  }
  ASSERT_GE(specs.size(), 16U);
  for (const Compiled& compiled : compile_all(specs)) {
    const std::string text = to_string(compiled.spec);
    ASSERT_TRUE(compiled.result.artifact) << text << ": " << compiled.result.failure;
    for (const EntryFacts& facts : compiled.result.artifact->entries) {
      EXPECT_EQ(facts.spill_bytes, 0) << text << " " << facts.name;
    }
    // What the warpgroups trade is what the block was started with: with less it waits forever.
    const BackwardSm90Config config = backward_sm90_config(compiled.spec);
    EXPECT_EQ(compiled.result.artifact->entries[1].registers, config.registers()) << text;
  }
}

// What runs in place of the sm90 family's defaults where strides rule them out.
TEST(CompileSlow, KernelsForOtherStridesCompileWithoutSpills) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC on this machine";
  std::vector<KernelSpec> specs;
  for (const KernelSpec& usual : default_specs(Pass::kForward, kSm90Target)) {
    if (usual.problem.dtype != KernelDType::kBF16) continue;
    Problem problem = usual.problem;
    problem.family = Family::kSm80;
    problem.target.arch_specific = false;
    for (int log2 = 0; log2 <= kMostHeadsPerPackLog2; ++log2) {
      const PlanView view{usual.tile.block_m >> log2, usual.tile.view_block_n()};
      const auto tile = sm80_tile_for_views(problem, {&view, 1}, log2);
      if (!tile || *tile == default_tile(problem)) continue;
      const KernelSpec spec{problem, *tile};
      if (specs.empty() || specs.back() != spec) specs.push_back(spec);
    }
  }
  ASSERT_FALSE(specs.empty());
  for (const Compiled& compiled : compile_all(specs)) {
    const std::string text = to_string(compiled.spec);
    ASSERT_TRUE(compiled.result.artifact) << text << ": " << compiled.result.failure;
    for (const EntryFacts& facts : compiled.result.artifact->entries) {
      EXPECT_EQ(facts.spill_bytes, 0) << text;
    }
  }
}

// Targets that run other specs' code paths or are newer than any GPU this was measured on.
TEST(CompileSlow, OtherTargetsAndSoftcapCompile) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC on this machine";
  std::vector<KernelSpec> specs;
  for (const char* target : {"sm_80", "sm_86", "sm_90", "sm_100", "sm_120"}) {
    if (!knows(parse_target(target))) continue;
    specs.push_back(parse_kernel_spec(std::string("plan/sm80@") + target));
    for (const char* problem : {"f16/d64v64/softcap", "bf16/d128v128/softcap", "bf16/d256v256",
                                "bf16/d192v128/softcap", "f16/d40v40"}) {
      for (const char* pass : {"fwd/sm80@", "bwd/sm80@", "bwd_dq/sm80@"}) {
        specs.push_back(parse_kernel_spec(std::string(pass) + target + "/" + problem));
      }
    }
  }
  ASSERT_FALSE(specs.empty());
  for (const Compiled& compiled : compile_all(specs)) {
    EXPECT_TRUE(compiled.result.artifact)
        << to_string(compiled.spec) << ": " << compiled.result.failure;
  }
}

// A kernel that a user meets first: cold, on one thread, generation included.
TEST(Compile, FirstKernelOfAHeadIsCompiledWithinItsTime) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC on this machine";
  const KernelSpec spec = parse_kernel_spec("fwd/sm80@sm_90/bf16/d128v128");
  const double begin = testing::cpu_ms();
  NvrtcCompiler compiler{""};
  const CompileResult result = compiler.compile(generate(spec), compile_options(spec));
  const double ms = testing::cpu_ms() - begin;
  ASSERT_TRUE(result.artifact) << result.failure;
  RecordProperty("milliseconds", static_cast<int>(ms));
  EXPECT_LT(ms, 10'000) << "some 1,300 ms on a machine of 2025";
}

}  // namespace
}  // namespace treeattn
