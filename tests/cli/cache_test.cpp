#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "runtime/cache/cubin_store.h"
#include "tests/cli/run_cli.h"
#include "tests/support/fake_artifact.h"

namespace treeattn::test {
namespace {

namespace fs = std::filesystem;

/// A command line whose cache holds `count` kernels; number n is n days old.
class CliCache : public ::testing::Test {
 protected:
  void fill(int count) {
    CubinStore store({{cli_.cache_dir(), true, false}});
    for (int n = 0; n < count; ++n) {
      const Artifact artifact = fake_artifact(static_cast<std::uint32_t>(n + 1));
      std::string why;
      ASSERT_TRUE(store.publish(artifact, why)) << why;
      const fs::path path =
          CubinStore::entry_path(cli_.cache_dir(), 13, artifact.spec, artifact.key);
      fs::last_write_time(path, fs::file_time_type::clock::now() - std::chrono::hours(24 * n + 1));
      paths_.push_back(path);
    }
  }
  void damage(const fs::path& path) {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(200);
    file.put('\x5a');
  }
  std::size_t left() const {
    std::size_t count = 0;
    for (const fs::path& path : paths_) count += fs::exists(path);
    return count;
  }

  Cli cli_;
  std::vector<fs::path> paths_;
};

TEST_F(CliCache, ListsAnEmptyCacheThatWasNeverMade) {
  const CliResult result = cli_.run({"cache", "list"});
  EXPECT_EQ(result.status, 0);
  EXPECT_TRUE(contains(result.out, "0 kernels")) << result.out;
  EXPECT_EQ(cli_.run({"cache", "list", "--json"}).json()["entries"].size(), 0u);
  EXPECT_EQ(cli_.run({"cache", "verify"}).status, 0);
  EXPECT_EQ(cli_.run({"cache", "prune"}).status, 0);
  EXPECT_FALSE(fs::exists(cli_.cache_dir()));
}

TEST_F(CliCache, ListsEntriesWithTheirFacts) {
  fill(2);
  const nlohmann::json json = cli_.run({"cache", "list", "--json"}).json();
  ASSERT_EQ(json["entries"].size(), 2u);
  for (const auto& entry : json["entries"]) {
    EXPECT_TRUE(entry["ok"]);
    EXPECT_EQ(entry["spec"], kFakeSpec);
    EXPECT_EQ(entry["nvrtc"], "13.0.88");
    EXPECT_EQ(entry["registers"], 255);
    EXPECT_EQ(entry["spill_bytes"], 8);
    EXPECT_EQ(entry["smem_bytes"], 98304 + 16);
  }
  const std::string text = cli_.run({"cache", "list"}).out;
  EXPECT_TRUE(contains(text, kFakeSpec)) << text;
  EXPECT_TRUE(contains(text, "2 kernels")) << text;
}

TEST_F(CliCache, VerifyFindsTheDamagedEntry) {
  fill(3);
  EXPECT_EQ(cli_.run({"cache", "verify"}).status, 0);
  damage(paths_[1]);
  const CliResult result = cli_.run({"cache", "verify", "--json"});
  EXPECT_EQ(result.status, 1);
  const nlohmann::json json = result.json();
  EXPECT_EQ(json["ok"], 2);
  ASSERT_EQ(json["damaged"].size(), 1u);
  EXPECT_EQ(json["damaged"][0]["path"], paths_[1].string());
  EXPECT_TRUE(contains(result.err, paths_[1].string())) << result.err;
}

TEST_F(CliCache, PruneAloneRemovesDamageOnly) {
  fill(3);
  damage(paths_[2]);
  const CliResult result = cli_.run({"cache", "prune"});
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_TRUE(contains(result.out, "removed 1 kernel,")) << result.out;
  EXPECT_FALSE(fs::exists(paths_[2]));
  EXPECT_EQ(left(), 2u);
}

TEST_F(CliCache, PruneByAgeAndADryRunThatRemovesNothing) {
  fill(4);
  const nlohmann::json dry =
      cli_.run({"cache", "prune", "--older-than", "2d", "--dry-run", "--json"}).json();
  EXPECT_EQ(dry["entries"].size(), 2u);
  EXPECT_EQ(dry["removed"], 0);
  EXPECT_EQ(left(), 4u);
  const nlohmann::json real = cli_.run({"cache", "prune", "--older-than", "2d", "--json"}).json();
  EXPECT_EQ(real["removed"], 2);
  EXPECT_TRUE(fs::exists(paths_[0]) && fs::exists(paths_[1]));
  EXPECT_EQ(left(), 2u);
}

TEST_F(CliCache, PruneBySizeKeepsTheNewest) {
  fill(4);
  const auto size = fs::file_size(paths_[0]);
  const CliResult result =
      cli_.run({"cache", "prune", "--keep-bytes", std::to_string(2 * size + size / 2)});
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_TRUE(fs::exists(paths_[0]) && fs::exists(paths_[1]));
  EXPECT_EQ(left(), 2u);
}

TEST_F(CliCache, PruneAllOfANamedFolderOnly) {
  fill(2);
  const std::string pack = cli_.path("pack");
  fs::copy(cli_.cache_dir(), pack, fs::copy_options::recursive);
  fs::permissions(pack, fs::perms::owner_all);
  EXPECT_EQ(cli_.run({"cache", "prune", "--all", "--dir", pack}).status, 0);
  EXPECT_EQ(cli_.run({"cache", "list", "--dir", pack, "--json"}).json()["entries"].size(), 0u);
  EXPECT_EQ(left(), 2u);
}

TEST_F(CliCache, ExplainSaysWhereItLookedAndWhatToDo) {
  cli_.without_nvrtc();
  const CliResult result = cli_.run({"cache", "explain", "fwd/sm80@sm_90/bf16/d64v64", "--json"});
  EXPECT_EQ(result.status, 0);
  const nlohmann::json json = result.json();
  EXPECT_FALSE(json["found"]);
  EXPECT_FALSE(json["compiler"]["available"]);
  EXPECT_EQ(json["key"].get<std::string>().size(), 64u);
  ASSERT_FALSE(json["probes"].empty());
  EXPECT_TRUE(contains(json["probes"][0]["path"].get<std::string>(), cli_.cache_dir()));
  EXPECT_TRUE(contains(json["verdict"].get<std::string>(), "treeattn precompile --spec"));
  EXPECT_TRUE(contains(cli_.run({"cache", "explain", "plan/sm80@sm_80"}).out, "looked at"));
}

TEST_F(CliCache, ExplainSaysWhenAKernelOfTheSm90FamilyIsNotUsed) {
  const auto explain = [&](const char* spec) {
    return cli_.run({"cache", "explain", spec, "--json"}).json();
  };
  const auto use = [](const nlohmann::json& json) { return json["used"].get<std::string>(); };
  nlohmann::json json = explain("fwd/sm90@sm_90a/bf16/d128v128");
  EXPECT_EQ(json["other_strides"], "fwd/sm80@sm_90/bf16/d128v128/m128n64s2w4");
  EXPECT_TRUE(contains(use(json), "not for q, k or v with a zero or negative token stride"));
  EXPECT_TRUE(contains(use(json), "fwd/sm80@sm_90/bf16/d128v128/m128n64s2w4 is used then"));
  const std::string text = cli_.run({"cache", "explain", "fwd/sm90@sm_90a/bf16/d128v128"}).out;
  EXPECT_TRUE(contains(text, "used      on compute capability 9.0")) << text;

  json = explain("bwd/sm90@sm_90a/bf16/d128v128");
  EXPECT_EQ(json["other_strides"], "bwd/sm80@sm_90/bf16/d128v128/m64n128s2w8");
  EXPECT_TRUE(contains(use(json), "not for q, k, v or dout with a zero"));

  json = explain("fwd/sm90@sm_90a/bf16/d64v64");
  EXPECT_TRUE(json["other_strides"].is_null());
  EXPECT_TRUE(contains(use(json), "TREEATTN_FAMILY=sm80"));

  const char* const other_tile = "fwd/sm90@sm_90a/bf16/d128v128/m128n96s2w8b32";
  json = explain(other_tile);
  EXPECT_TRUE(contains(use(json), "by calls that name it; it refuses"));
  EXPECT_FALSE(json.contains("other_strides"));
  EXPECT_FALSE(explain("fwd/sm80@sm_90/bf16/d128v128").contains("used"));
  cli_.set("TREEATTN_FAMILY", "sm80");
  EXPECT_TRUE(contains(use(explain("fwd/sm90@sm_90a/bf16/d128v128")),
                       "by calls that name it, under TREEATTN_FAMILY=sm80"));
}

TEST_F(CliCache, BadArgumentsAreNamed) {
  expect_usage_error(cli_.run({"cache", "prune", "--older-than", "soon"}),
                     {"--older-than", "'soon'", "30d"});
  expect_usage_error(cli_.run({"cache", "prune", "--keep-bytes", "9E"}),
                     {"--keep-bytes", "'9E'", "500M"});
  expect_usage_error(cli_.run({"cache", "prune", "--keep-bytes", "99999999999999999999G"}),
                     {"--keep-bytes"});
  expect_usage_error(cli_.run({"cache", "list", "--dir", "/nonexistent"}),
                     {"--dir", "'/nonexistent'"});
  expect_usage_error(cli_.run({"cache", "explain", "nonsense"}), {"'nonsense'"});
}

}  // namespace
}  // namespace treeattn::test
