#include <gtest/gtest.h>

#include <string>

#include "generator/generate.h"
#include "runtime/cache/artifact.h"
#include "tests/cli/run_cli.h"

namespace treeattn::test {
namespace {

constexpr const char* kSpec = "fwd/sm80@sm_90/bf16/d64v64";

TEST(CliEmit, PrintsExactlyTheGeneratedSource) {
  const CliResult result = Cli().run({"emit", kSpec});
  EXPECT_EQ(result.status, 0);
  EXPECT_EQ(result.err, "");
  EXPECT_EQ(result.out, generate(parse_kernel_spec(kSpec)).text);
}

TEST(CliEmit, WritesAFile) {
  const Cli cli;
  const std::string file = cli.write("kernel.cu", "something older");
  const CliResult result = cli.run({"emit", kSpec, "--out", file});
  EXPECT_EQ(result.status, 0);
  EXPECT_EQ(result.out, "");
  EXPECT_EQ(read_text(file), generate(parse_kernel_spec(kSpec)).text);
}

TEST(CliEmit, APipeIsWrittenToAndNotReplaced) {
  const Cli cli;
  const CliResult result = cli.run({"emit", kSpec, "--out", "/dev/stdout"});
  EXPECT_EQ(result.status, 0);
  EXPECT_EQ(result.out, generate(parse_kernel_spec(kSpec)).text);
}

TEST(CliEmit, JsonHoldsKeyTileAndEntries) {
  const nlohmann::json json = Cli().run({"emit", kSpec, "--json"}).json();
  const GeneratedSource source = generate(parse_kernel_spec(kSpec));
  EXPECT_EQ(json["spec"], to_string(source.spec));
  EXPECT_EQ(json["key"], artifact_key(source, compile_options(source.spec)).hex());
  EXPECT_EQ(json["tile"]["block_m"], source.spec.tile.block_m);
  ASSERT_EQ(json["entries"].size(), source.entries.size());
  EXPECT_EQ(json["entries"][0]["name"], source.entries[0].name);
  EXPECT_EQ(json["entries"][0]["smem_bytes"], source.entries[0].smem_bytes);
}

TEST(CliEmit, PlanKernelsHaveNoTile) {
  const nlohmann::json json = Cli().run({"emit", "plan/sm80@sm_80", "--json"}).json();
  EXPECT_TRUE(json["tile"].is_null());
  EXPECT_GT(json["entries"].size(), 1u);
  EXPECT_TRUE(contains(Cli().run({"emit", "plan/sm80@sm_80", "--key"}).out, "key "));
}

TEST(CliEmit, ListsTilesWithTheReasonForEveryRefusal) {
  const nlohmann::json json = Cli().run({"emit", kSpec, "--tiles", "--json"}).json();
  int legal = 0;
  for (const auto& tile : json["tiles"]) {
    EXPECT_EQ(tile.contains("refused"), !tile["legal"].get<bool>());
    legal += tile["legal"].get<bool>();
  }
  EXPECT_GT(legal, 0);
  EXPECT_TRUE(contains(Cli().run({"emit", kSpec, "--tiles"}).out, "the default"));
}

TEST(CliEmit, BadSpecsNameTheBadPart) {
  const Cli cli;
  expect_usage_error(cli.run({"emit", "fwd/sm80@sm_90/f8/d64v64"}), {"'f8'", "f16 or bf16"});
  expect_usage_error(cli.run({"emit", "sideways/sm80@sm_90"}), {"'sideways'"});
  expect_usage_error(cli.run({"emit", "fwd/sm80@sm_90/bf16/d60v60"}), {"60", "multiple of 8"});
  expect_usage_error(cli.run({"emit", "fwd/sm80@sm_90/bf16/d64v64/m128n64s9w4"}), {"stages", "9"});
  expect_usage_error(cli.run({"emit"}), {"spec"});
}

}  // namespace
}  // namespace treeattn::test
