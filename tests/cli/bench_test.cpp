#include <gtest/gtest.h>

#include <sstream>
#include <string>
#include <vector>

#include "generator/generate.h"
#include "runtime/attention/workload.h"
#include "runtime/support/digest.h"
#include "tests/cli/run_cli.h"

namespace treeattn::test {
namespace {

TEST(CliBench, BackwardIsTimedByItsOwnFlops) {
  const CliResult result =
      Cli().run({"bench", "--device", "cpu", "--pass", "fwd,bwd", "--reps", "2", "--warmup", "1",
                 "--head-dim", "16", "--heads", "2", "--json", "chain:40"});
  EXPECT_EQ(result.status, 0) << result.err;
  std::istringstream lines(result.out);
  std::vector<nlohmann::json> documents;
  for (std::string line; std::getline(lines, line);)
    documents.push_back(nlohmann::json::parse(line));
  ASSERT_EQ(documents.size(), 2u);
  EXPECT_EQ(documents[0]["pass"], "fwd");
  EXPECT_EQ(documents[1]["pass"], "bwd");
  EXPECT_DOUBLE_EQ(documents[1]["useful_flops"].get<double>(),
                   2.5 * documents[0]["useful_flops"].get<double>());
  EXPECT_GT(documents[1]["attention_ms"]["median"], 0);
  const CliResult bad = Cli().run({"bench", "--device", "cpu", "--pass", "back", "chain:8"});
  EXPECT_EQ(bad.status, 2);
  EXPECT_TRUE(contains(bad.err, "'back' is not fwd or bwd")) << bad.err;
}

TEST(CliBench, PacksThatTheHeadsDoNotAllowAreRefused) {
  const auto refusal = [](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {"bench", "--device", "cpu", "--pack-heads"});
    arguments.push_back("chain:8");
    const CliResult result = Cli().run(arguments);
    EXPECT_EQ(result.status, 2) << result.err;
    return result.err;
  };
  EXPECT_TRUE(contains(refusal({"1,3", "--heads", "8", "--heads-kv", "1"}), "'3' is not a power"));
  EXPECT_TRUE(contains(refusal({"4", "--heads", "6", "--heads-kv", "1"}), "from 1 to 2"));
  EXPECT_TRUE(contains(refusal({"2", "--pass", "bwd"}), "needs --pass fwd"));
  EXPECT_TRUE(contains(refusal({"2"}), "about GPU kernels, but --device is cpu"));
}

TEST(CliBench, JsonLinesSayEverythingThatANumberNeeds) {
  const CliResult result =
      Cli().run({"bench", "--device", "cpu", "--reps", "3", "--warmup", "1", "--head-dim", "16,32",
                 "--heads", "2", "--heads-kv", "1", "--json", "chain:40", "fork:10,2x9"});
  EXPECT_EQ(result.status, 0) << result.err;
  std::istringstream lines(result.out);
  std::vector<nlohmann::json> documents;
  for (std::string line; std::getline(lines, line);) {
    documents.push_back(nlohmann::json::parse(line, nullptr, false));
    ASSERT_FALSE(documents.back().is_discarded()) << line;
  }
  ASSERT_EQ(documents.size(), 4u);
  const nlohmann::json& json = documents[3];
  EXPECT_EQ(json["workload"], "fork:10,2x9");
  EXPECT_EQ(json["head_dim"], 32);
  EXPECT_EQ(json["tokens"], 28);
  EXPECT_EQ(json["unshared_tokens"], 38);
  EXPECT_EQ(json["reps"], 3);
  EXPECT_EQ(json["device"]["kind"], "cpu");
  EXPECT_EQ(json["templates_sha256"], to_hex(sha256(embedded_templates_text())));
  EXPECT_EQ(json["date"].get<std::string>().size(), 20u);
  const double flops =
      4.0 * 2 * 32 * static_cast<double>(parse_workload("fork:10,2x9").visible_pairs());
  EXPECT_DOUBLE_EQ(json["useful_flops"], flops);
  const double ms = json["attention_ms"]["median"];
  EXPECT_GT(ms, 0);
  EXPECT_NEAR(json["useful_tflops"].get<double>(), flops / ms / 1e9, 1e-9);
  EXPECT_LE(json["attention_ms"]["min"], json["attention_ms"]["median"]);
  EXPECT_GT(json["plan_and_attention_ms"]["median"], 0);
}

TEST(CliBench, PrintsATable) {
  const CliResult result = Cli().run({"bench", "--device", "cpu", "--reps", "2", "--head-dim", "16",
                                      "--heads", "1", "--dtype", "f32", "chain:20"});
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_TRUE(contains(result.out, "TFLOP/s")) << result.out;
  EXPECT_TRUE(contains(result.out, "chain:20 ")) << result.out;
  EXPECT_TRUE(contains(result.out, "CPU executor")) << result.out;
}

TEST(CliBench, WithoutAGpuItSaysSo) {
  const CliResult result = Cli().run({"bench", "chain:16"});
  EXPECT_EQ(result.status, 1);
  EXPECT_EQ(result.out, "");
  EXPECT_TRUE(contains(result.err, "no GPU can be used")) << result.err;
}

TEST(CliBench, SpecsAreForGpusAndForward) {
  const Cli cli;
  expect_usage_error(
      cli.run({"bench", "--device", "cpu", "--spec", "fwd/sm80@sm_90/bf16/d64v64", "chain:16"}),
      {"--spec", "GPU kernel"});
  expect_usage_error(cli.run({"bench", "--spec", "plan/sm80@sm_90", "chain:16"}),
                     {"'plan/sm80@sm_90'", "forward"});
  expect_usage_error(cli.run({"bench", "--spec", "fwd/sm80@sm_90/bf16/d64v64/softcap", "chain:16"}),
                     {"softcap"});
}

}  // namespace
}  // namespace treeattn::test
