#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "tests/cli/run_cli.h"

namespace treeattn::test {
namespace {

/// The rows of a drawn mask: lines of marks alone, without labels and spaces.
std::string mask_marks(const std::string& text) {
  std::string marks;
  std::string row;
  for (const char c : text + "\n") {
    if (c == '#' || c == '.') row += c;
    if (c != '\n') continue;
    if (row.size() == 8) marks += row + "\n";
    row.clear();
  }
  return marks;
}

TEST(CliDemo, RunsWithoutAnythingInstalled) {
  Cli cli;
  const CliResult result = cli.without_nvrtc().run({"demo"});
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_TRUE(contains(result.out, "NVRTC was not found")) << result.out;
  EXPECT_TRUE(contains(result.out, "CPU executor")) << result.out;
  EXPECT_TRUE(contains(result.out, ": good")) << result.out;
}

TEST(CliDemo, DrawsTheReadmesMask) {
  Cli cli;
  const nlohmann::json json = cli.without_nvrtc().run({"demo", "--json"}).json();
  EXPECT_EQ(mask_marks(json["mask"]),
            "#.......\n##......\n###.....\n####....\n#####...\n###..#..\n###..##.\n###..###\n");
  EXPECT_EQ(json["tokens"], 209);
  EXPECT_TRUE(json["ok"]);
  EXPECT_LT(json["rel_l2"], 4e-3);
}

TEST(CliDemo, CompilesAKernelAndKeepsIt) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC here";
  const Cli cli;
  const nlohmann::json kernel = cli.run({"demo", "--json"}).json()["kernel"];
  EXPECT_TRUE(kernel["compiled"]);
  EXPECT_TRUE(kernel["kept"]);
  EXPECT_EQ(kernel["spill_bytes"], 0);
  EXPECT_GT(kernel["ms"], 1);
  const nlohmann::json list = cli.run({"cache", "list", "--json"}).json();
  ASSERT_EQ(list["entries"].size(), 1u);
  EXPECT_EQ(list["entries"][0]["spec"], kernel["spec"]);
}

TEST(CliDemo, ACacheThatCannotBeWrittenIsOnlyAWarning) {
  if (!has_nvrtc()) GTEST_SKIP() << "no NVRTC here";
  Cli cli;
  cli.set("TREEATTN_CACHE_DIR", cli.write("file", "") + "/below");
  const CliResult result = cli.run({"demo", "--json"});
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_TRUE(result.json()["ok"]);
  EXPECT_FALSE(result.json()["kernel"]["kept"]);
  EXPECT_TRUE(contains(result.err, "warning")) << result.err;
}

}  // namespace
}  // namespace treeattn::test
