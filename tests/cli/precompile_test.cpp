#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "runtime/cache/cubin_store.h"
#include "tests/cli/run_cli.h"

namespace treeattn::test {
namespace {

TEST(CliPrecompile, BuildsAPackKeepsItAndBuildsItAgainByForce) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC here";
  const Cli cli;
  const std::vector<std::string> args{"precompile", "--arch", "sm_80",         "--head-dim",
                                      "16",         "--out",  cli.path("pack")};
  const CliResult built = cli.run(args);
  EXPECT_EQ(built.status, 0) << built.err;
  EXPECT_TRUE(contains(built.out, "plan/sm80@sm_80")) << built.out;
  EXPECT_TRUE(contains(built.out, "fwd/sm80@sm_80/bf16/d16v16/")) << built.out;
  EXPECT_TRUE(contains(built.out, "0 kept, 2 built, 0 failed")) << built.out;
  EXPECT_TRUE(contains(built.err, "[2/2]")) << built.err;
  EXPECT_FALSE(std::filesystem::exists(cli.cache_dir())) << "--out leaves the cache alone";

  std::vector<std::string> json_args = args;
  json_args.emplace_back("--json");
  const nlohmann::json kept = cli.run(json_args).json();
  EXPECT_EQ(kept["kept"], 2);
  EXPECT_EQ(kept["built"], 0);
  ASSERT_EQ(kept["kernels"].size(), 2u);
  for (const auto& kernel : kept["kernels"]) {
    EXPECT_EQ(kernel["result"], "kept");
    EXPECT_GT(kernel["registers"], 0);
    EXPECT_EQ(kernel["spill_bytes"], 0);
    EXPECT_GT(kernel["cubin_bytes"], 1000);
  }
  json_args.emplace_back("--force");
  EXPECT_EQ(cli.run(json_args).json()["built"], 2);

  // Made to be read by other users.
  struct stat info {};
  for (const auto& file : files_below(cli.path("pack"))) {
    ASSERT_EQ(stat(file.c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0644U) << file;
  }
  // Found without NVRTC by who names the folder.
  Cli other;
  other.without_nvrtc().set("TREEATTN_CACHE_PATH", cli.path("pack"));
  const nlohmann::json found =
      other.run({"cache", "explain", "fwd/sm80@sm_80/bf16/d16v16", "--json"}).json();
  EXPECT_TRUE(found["found"]);
}

TEST(CliPrecompile, SpecsGoToTheCacheWithTheirPlanKernels) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC here";
  const Cli cli;
  const nlohmann::json json = cli.run({"precompile", "--spec", "fwd/sm80@sm_86/f16/d24v16",
                                       "--spec", "plan/sm80@sm_86", "-j", "2", "--json"})
                                  .json();
  ASSERT_EQ(json["kernels"].size(), 2u) << json;
  EXPECT_EQ(json["kernels"][0]["spec"], "plan/sm80@sm_86");
  EXPECT_EQ(json["built"], 2);
  EXPECT_EQ(CubinStore({{cli.cache_dir(), true, false}}).list().size(), 2u);
}

TEST(CliPrecompile, ListsEveryCombinationOnce) {
  Cli cli;
  const CliResult result = cli.without_nvrtc().run({"precompile", "--arch", "sm_80,8.0,sm_90",
                                                    "--head-dim", "64,192/128,64", "--dtype",
                                                    "f16,bf16", "--softcap", "both", "--json"});
  EXPECT_EQ(result.status, 1);
  const nlohmann::json json = result.json();
  // 2 plan kernels, then 2 targets x 2 dtypes x 2 pairs of head dims, with and without softcap.
  EXPECT_EQ(json["kernels"].size(), 2u + 2 * 2 * 2 * 2);
  EXPECT_EQ(json["failed"], json["kernels"].size());
}

// A GPU of compute capability 9.0 needs kernels of two families and two targets.
TEST(CliPrecompile, ATargetMeansWhatItsGpusRun) {
  Cli cli;
  const auto specs = [&](const std::string& arch) {
    std::vector<std::string> names;
    const nlohmann::json json =
        cli.without_nvrtc()
            .run({"precompile", "--arch", arch, "--head-dim", "64", "--pass", "fwd,bwd", "--json"})
            .json();
    for (const auto& kernel : json["kernels"]) {
      const auto spec = kernel["spec"].get<std::string>();
      names.push_back(spec.substr(0, spec.find("/bf16")));
    }
    return names;
  };
  using Names = std::vector<std::string>;
  const Names hopper{"plan/sm80@sm_90", "fwd/sm90@sm_90a", "bwd/sm80@sm_90", "bwd_dq/sm80@sm_90"};
  const Names plain{"plan/sm80@sm_90", "fwd/sm80@sm_90", "bwd/sm80@sm_90", "bwd_dq/sm80@sm_90"};
  EXPECT_EQ(specs("sm_90"), hopper);
  EXPECT_EQ(specs("sm_90a"), hopper);
  EXPECT_EQ(specs("sm_90,sm_90a"), hopper);
  const Names all = specs("all");
  for (const char* forward : {"fwd/sm90@sm_90a", "fwd/sm80@sm_90", "fwd/sm80@sm_120"}) {
    EXPECT_EQ(std::count(all.begin(), all.end(), forward), 1) << forward;
  }
  cli.set("TREEATTN_FAMILY", "sm80");
  EXPECT_EQ(specs("sm_90"), plain);
  EXPECT_EQ(specs("sm_90a"), hopper);
}

TEST(CliPrecompile, FailsOnceAndClearlyWithoutNvrtc) {
  Cli cli;
  const CliResult result =
      cli.without_nvrtc().run({"precompile", "--arch", "sm_80", "--head-dim", "64,128"});
  EXPECT_EQ(result.status, 1);
  EXPECT_TRUE(contains(result.out, "0 kept, 0 built, 3 failed")) << result.out;
  const std::size_t first = result.err.find("NVRTC, which compiles kernels, was not found");
  ASSERT_NE(first, std::string::npos) << result.err;
  EXPECT_EQ(result.err.find("was not found", first + 60), std::string::npos) << result.err;
}

TEST(CliPrecompile, AFolderThatCannotKeepKernelsIsAFailureBeforeAnythingIsCompiled) {
  const Cli cli;
  const std::string file = cli.write("file", "");
  const std::string open = cli.path("open");
  std::filesystem::create_directory(open);
  std::filesystem::permissions(open, std::filesystem::perms::all);
  for (const std::string& folder : {file + "/pack", open}) {
    const CliResult result =
        cli.run({"precompile", "--arch", "sm_80", "--pass", "plan", "--out", folder});
    EXPECT_EQ(result.status, 1);
    EXPECT_EQ(result.out, "") << "nothing was tried";
    EXPECT_TRUE(contains(result.err, "--out: kernels cannot be kept in '" + folder)) << result.err;
  }
}

TEST(CliPrecompile, BadArgumentsAreNamed) {
  const Cli cli;
  expect_usage_error(cli.run({"precompile"}), {"--arch", "--spec"});
  expect_usage_error(cli.run({"precompile", "--arch", "sm_90"}), {"--head-dim"});
  expect_usage_error(cli.run({"precompile", "--head-dim", "64"}), {"--arch"});
  expect_usage_error(cli.run({"precompile", "--arch", "sm_70", "--head-dim", "64"}),
                     {"'sm_70'", "sm_80"});
  expect_usage_error(cli.run({"precompile", "--arch", "sm_90", "--head-dim", "64/20"}),
                     {"'64/20'"});
  expect_usage_error(cli.run({"precompile", "--arch", "sm_90", "--head-dim", "64", "--pass", "up"}),
                     {"--pass", "'up'", "fwd"});
  expect_usage_error(
      cli.run({"precompile", "--arch", "sm_90", "--head-dim", "64", "--softcap", "x"}),
      {"--softcap", "'x'", "both"});
  expect_usage_error(cli.run({"precompile", "--arch", "native", "--head-dim", "64"}), {"'native'"});
  expect_usage_error(cli.run({"precompile", "--spec", "fwd/sm80@sm_90/bf16"}),
                     {"fwd/sm80@sm_90/bf16"});
}

TEST(CliPrecompile, AnInterruptFinishesWhatIsUnderWayAndLeavesNoHalfEntry) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC here";
  const Cli cli;
  ChildProcess child =
      cli.start({"precompile", "--arch", "sm_80,sm_86,sm_89,sm_90", "--head-dim", "16,24,32,40,48",
                 "-j", "1", "--json", "--out", cli.path("pack")});
  // The first entry says that others are to come.
  const auto entries = [&] { return CubinStore({{cli.path("pack"), false, true}}).list(); };
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  while (entries().empty() && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  child.send(SIGINT);
  const CliResult result = cli.finish(std::move(child));
  EXPECT_EQ(result.status, 130) << result.err;
  EXPECT_TRUE(contains(result.err, "interrupted")) << result.err;
  const nlohmann::json json = result.json();
  EXPECT_GT(json["skipped"], 0);
  EXPECT_EQ(json["failed"], 0);
  const auto kept = entries();
  EXPECT_EQ(kept.size(), json["built"].get<std::size_t>());
  for (const StoreEntry& entry : kept) EXPECT_TRUE(entry.artifact) << entry.damage;
  for (const auto& file : files_below(cli.path("pack"))) {
    EXPECT_FALSE(file.filename().string().starts_with(".tmp-")) << file;
  }
}

}  // namespace
}  // namespace treeattn::test
