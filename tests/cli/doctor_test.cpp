#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <string>

#include "runtime/cache/cubin_store.h"
#include "tests/cli/run_cli.h"
#include "tests/support/fake_artifact.h"

namespace treeattn::test {
namespace {

TEST(CliDoctor, WorksWithNothingInstalled) {
  Cli cli;
  const CliResult text = cli.without_nvrtc().run({"doctor"});
  EXPECT_EQ(text.status, 0);
  EXPECT_EQ(text.err, "");
  EXPECT_TRUE(contains(text.out, "driver")) << text.out;
  EXPECT_TRUE(contains(text.out, "/nonexistent/libcuda.so.1")) << text.out;
  EXPECT_TRUE(contains(text.out, "/nonexistent/libnvrtc.so")) << text.out;
  EXPECT_TRUE(contains(text.out, "pip install nvidia-cuda-nvrtc")) << text.out;
  EXPECT_TRUE(contains(text.out, "CPU executor")) << text.out;

  const nlohmann::json json = cli.run({"doctor", "--json"}).json();
  EXPECT_EQ(json["version"], "0.1.0");
  EXPECT_FALSE(json["driver"]["found"]);
  EXPECT_FALSE(json["nvrtc"]["found"]);
  EXPECT_TRUE(json["gpus"].empty());
  EXPECT_TRUE(json["can"]["run_on_cpu"]);
  EXPECT_FALSE(json["can"]["run_on_gpu"]);
  EXPECT_FALSE(json["can"]["compile"]);
}

TEST(CliDoctor, NamesTheCompilerThatWasFound) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC here";
  const nlohmann::json nvrtc = Cli().run({"doctor", "--json"}).json()["nvrtc"];
  EXPECT_TRUE(nvrtc["found"]);
  EXPECT_EQ(nvrtc["version"], nvrtc_version(*try_nvrtc()));
  EXPECT_NE(std::count(nvrtc["targets"].begin(), nvrtc["targets"].end(), "sm_90"), 0);
}

TEST(CliDoctor, LooksIntoCacheFolders) {
  Cli cli;
  CubinStore store({{cli.cache_dir(), true, false}});
  std::string why;
  ASSERT_TRUE(store.publish(fake_artifact(), why)) << why;
  cli.set("TREEATTN_CACHE_PATH", "/nonexistent/pack");
  const nlohmann::json folders = cli.run({"doctor", "--json"}).json()["cache"];
  ASSERT_EQ(folders.size(), 2u);
  EXPECT_EQ(folders[0]["kind"], "prebuilt");
  EXPECT_FALSE(folders[0]["usable"]);
  EXPECT_EQ(folders[1]["path"], cli.cache_dir());
  EXPECT_TRUE(folders[1]["usable"]);
  EXPECT_EQ(folders[1]["entries"], 1);
  EXPECT_EQ(folders[1]["damaged"], 0);
}

TEST(CliDoctor, SaysWhyAFolderIsNotUsed) {
  Cli cli;
  std::filesystem::create_directory(cli.path("open"));
  ASSERT_EQ(chmod(cli.path("open").c_str(), 0777), 0);
  cli.set("TREEATTN_CACHE_DIR", cli.path("open"));
  nlohmann::json json = cli.run({"doctor", "--json"}).json();
  EXPECT_FALSE(json["cache"][0]["usable"]);
  EXPECT_NE(json["cache"][0]["problem"], "");
  EXPECT_FALSE(json["can"]["keep_kernels"]);

  cli.set("TREEATTN_CACHE_DIR", cli.write("file", "") + "/below");
  json = cli.run({"doctor", "--json"}).json();
  EXPECT_FALSE(json["cache"][0]["usable"]);
  EXPECT_TRUE(contains(json["cache"][0]["problem"].get<std::string>(), "no folder"));
}

TEST(CliDoctor, ListsTheVariablesThatAreSetAndTheirProblems) {
  Cli cli;
  cli.set("TREEATTN_JIT", "sometimes");
  const nlohmann::json json = cli.run({"doctor", "--json"}).json();
  bool listed = false;
  for (const auto& variable : json["environment"]) {
    EXPECT_NE(variable["value"], "");
    listed = listed || (variable["name"] == "TREEATTN_JIT" && variable["value"] == "sometimes");
  }
  EXPECT_TRUE(listed);
  ASSERT_EQ(json["problems"].size(), 1u);
  EXPECT_TRUE(contains(json["problems"][0].get<std::string>(), "sometimes"));
  EXPECT_TRUE(contains(cli.run({"doctor"}).out, "'sometimes'"));
}

}  // namespace
}  // namespace treeattn::test
