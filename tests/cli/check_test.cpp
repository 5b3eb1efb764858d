#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "tests/cli/run_cli.h"

namespace treeattn::test {
namespace {

TEST(CliCheck, RandomCasesPassOnTheExecutorAndPrintTheirSeed) {
  const CliResult result = Cli().run(
      {"check", "--device", "cpu", "--cases", "4", "--seed", "11", "--head-dim", "16,24/40"});
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_TRUE(contains(result.out, "seed 11")) << result.out;
  EXPECT_TRUE(contains(result.out, "random 14")) << result.out;
  EXPECT_TRUE(contains(result.out, "4 cases checked, 0 failed")) << result.out;
}

TEST(CliCheck, TheSameSeedGivesTheSameCases) {
  const Cli cli;
  const auto all =
      cli.run({"check", "--cases", "3", "--seed", "20", "--head-dim", "16", "--json"}).json();
  const auto last =
      cli.run({"check", "--cases", "1", "--seed", "22", "--head-dim", "16", "--json"}).json();
  ASSERT_EQ(all["cases"].size(), 3u);
  ASSERT_EQ(last["cases"].size(), 1u);
  EXPECT_EQ(all["cases"][2], last["cases"][0]);
}

TEST(CliCheck, ListedWorkloadsRunInEveryDtypeAndHeadDim) {
  const nlohmann::json json = Cli()
                                  .run({"check", "--device", "cpu", "--dtype", "f16,f32,f64",
                                        "--head-dim", "16,32", "--heads", "3", "--heads-kv", "1",
                                        "--seed", "1", "--json", "fork:40,3x17", "2*chain:33"})
                                  .json();
  ASSERT_EQ(json["cases"].size(), 2u * 3 * 2);
  EXPECT_EQ(json["checked"], 12);
  EXPECT_EQ(json["failed"], 0);
  for (const auto& item : json["cases"]) {
    EXPECT_TRUE(item["ok"]);
    EXPECT_GT(item["rel_l2"], 0);
    if (item["dtype"] == "f64") {
      EXPECT_LT(item["rel_l2"], 1e-12);
    }
  }
  EXPECT_EQ(json["cases"][0]["queries"], 40 + 3 * 17);
  EXPECT_EQ(json["cases"][11]["trees"], 2);
}

TEST(CliCheck, GradientsAreCheckedToo) {
  for (const char* mode : {"", "--deterministic"}) {
    std::vector<std::string> arguments{"check", "--device",   "cpu",     "--pass",
                                       "bwd",   "--cases",    "6",       "--seed",
                                       "5",     "--head-dim", "16,24/40"};
    if (*mode != 0) arguments.emplace_back(mode);
    arguments.emplace_back("--json");
    const nlohmann::json json = Cli().run(arguments).json();
    EXPECT_EQ(json["checked"], 6) << mode;
    EXPECT_EQ(json["failed"], 0) << mode;
    double largest = 0;
    for (const auto& item : json["cases"]) {
      largest = std::max(largest, item["rel_l2"].get<double>());
    }
    EXPECT_GT(largest, 0) << "nothing was compared";
  }
  const CliResult bad = Cli().run({"check", "--pass", "sideways"});
  EXPECT_EQ(bad.status, 2);
  EXPECT_TRUE(contains(bad.err, "sideways")) << bad.err;
}

TEST(CliCheck, LargeCasesAreComparedOnSomeRows) {
  const nlohmann::json json = Cli()
                                  .run({"check", "--device", "cpu", "--rows", "64", "--head-dim",
                                        "16", "--heads", "1", "--json", "fork:500,4x300"})
                                  .json();
  EXPECT_EQ(json["failed"], 0);
  EXPECT_EQ(json["cases"][0]["queries"], 1700);
}

TEST(CliCheck, SoftcapIsChecked) {
  const nlohmann::json json = Cli()
                                  .run({"check", "--device", "cpu", "--softcap", "2.5",
                                        "--head-dim", "16", "--json", "chain:50"})
                                  .json();
  EXPECT_EQ(json["cases"][0]["softcap"], 2.5);
  EXPECT_EQ(json["failed"], 0);
}

TEST(CliCheck, NoGpuIsAFailureOnlyWhereOneWasAskedFor) {
  const Cli cli;
  const CliResult asked = cli.run({"check", "--device", "gpu", "--cases", "1"});
  EXPECT_EQ(asked.status, 1);
  EXPECT_EQ(asked.out, "");
  EXPECT_TRUE(contains(asked.err, "no GPU can be used")) << asked.err;
  EXPECT_TRUE(contains(asked.err, "--device cpu")) << asked.err;
  EXPECT_EQ(cli.run({"check", "--device", "auto", "chain:8"}).status, 0);
}

TEST(CliCheck, BadWorkloadsAreNamedBeforeAnythingRuns) {
  expect_usage_error(Cli().run({"check", "chain:8", "spoon:3"}), {"spoon:3", "unknown kind"});
}

}  // namespace
}  // namespace treeattn::test
