#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "runtime/attention/workload.h"
#include "tests/cli/run_cli.h"

namespace treeattn::test {
namespace {

TEST(CliTreeShow, DrawsTheMaskTokenByToken) {
  const CliResult result = Cli().run({"tree", "show", "fork:2,2x1", "--ascii"});
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_TRUE(contains(result.out,
                       "      a a b c\n"
                       " a    # . . .\n"
                       " a    # # . .\n"
                       " b    # # # .\n"
                       " c    # # . #\n"))
      << result.out;
}

TEST(CliTreeShow, CountsTokensAndTiles) {
  const nlohmann::json json =
      Cli()
          .run({"tree", "show", "fork:128,2x128", "--block-m", "128", "--block-n", "128", "--json"})
          .json();
  EXPECT_EQ(json["tokens"], 384);
  EXPECT_EQ(json["unshared_tokens"], 512);
  EXPECT_DOUBLE_EQ(json["sharing_ratio"], 512.0 / 384);
  EXPECT_EQ(json["visible_pairs"], parse_workload("fork:128,2x128").visible_pairs());
  EXPECT_EQ(json["leaves"], 2);
  EXPECT_EQ(json["tile_rows"], (std::vector<std::string>{"+..", "#+.", "#.+"}));
  EXPECT_EQ(json["tiles"]["skipped"], 1);
  EXPECT_EQ(json["tiles"]["partial"], 3);
  EXPECT_EQ(json["tiles"]["full"], 2);
}

TEST(CliTreeShow, LargeTreesAreDrawnSmaller) {
  const CliResult ascii = Cli().run({"tree", "show", "binary:5,100", "--ascii"});
  EXPECT_EQ(ascii.status, 0);
  for (const char c : ascii.out) EXPECT_LT(static_cast<unsigned char>(c), 128);
  EXPECT_TRUE(contains(ascii.out, "####")) << ascii.out;
  EXPECT_TRUE(contains(ascii.out, "....")) << ascii.out;
  std::size_t longest = 0, at = 0;
  for (std::size_t end = 0; (end = ascii.out.find('\n', at)) != std::string::npos; at = end + 1) {
    longest = std::max(longest, end - at);
  }
  EXPECT_LE(longest, 80u);
  const CliResult unicode = Cli().run({"tree", "show", "binary:5,100"});
  EXPECT_TRUE(contains(unicode.out, "█")) << unicode.out;
}

TEST(CliTreeShow, DrawsOneOfManyTrees) {
  const CliResult result = Cli().run({"tree", "show", "3*chain:4", "--tree", "2"});
  EXPECT_EQ(result.status, 0);
  EXPECT_TRUE(contains(result.out, "tree 2 (0 to 2)")) << result.out;
  expect_usage_error(Cli().run({"tree", "show", "3*chain:4", "--tree", "3"}), {"--tree", "'3'"});
}

TEST(CliTreeShow, WritesAnSvgWithEveryClassAndOneShapeANode) {
  const Cli cli;
  const std::string file = cli.path("tree.svg");
  const CliResult result = cli.run({"tree", "show", "fork:512,3x200", "--svg", file});
  EXPECT_EQ(result.status, 0) << result.err;
  const std::string svg = read_text(file);
  EXPECT_EQ(svg.rfind("<svg ", 0), 0u);
  EXPECT_TRUE(svg.ends_with("</svg>\n"));
  EXPECT_TRUE(contains(svg, "class=\"full\""));
  EXPECT_TRUE(contains(svg, "class=\"partial\""));
  std::size_t shapes = 0;
  for (std::size_t at = 0; (at = svg.find("<polygon", at)) != std::string::npos; ++at) ++shapes;
  EXPECT_EQ(shapes, 4u);
}

TEST(CliTreeShow, WritesAPng) {
  const Cli cli;
  const std::string file = cli.path("tree.png");
  // 4 tokens: 180 pixels each. 512: sampled. 0: an empty frame.
  for (const auto& [workload, side] :
       {std::pair{"fork:2,2x1", 722}, std::pair{"fork:512,3x200", 722},
        std::pair{"chain:0", 722}}) {
    const CliResult result = cli.run({"tree", "show", workload, "--png", file});
    EXPECT_EQ(result.status, 0) << result.err;
    const std::string png = read_text(file);
    ASSERT_GT(png.size(), 57u);
    EXPECT_EQ(png.substr(0, 8), "\x89PNG\r\n\x1a\n");
    EXPECT_EQ(png.substr(12, 4), "IHDR");
    for (const std::size_t at : {16, 20}) {
      const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(png[i]); };
      EXPECT_EQ(byte(at + 2) * 256 + byte(at + 3), side) << workload;
    }
    EXPECT_TRUE(png.ends_with(std::string("\0\0\0\0IEND\xae\x42\x60\x82", 12)));
    EXPECT_LT(png.size(), 200'000u) << "runs are packed";
  }
}

TEST(CliTreeShow, ReadsEveryKindOfFile) {
  const Cli cli;
  const std::vector<std::string> files{
      cli.write("parents.json", R"({"parents": [-1, 0, 0], "lengths": [3, 2, 3]})"),
      cli.write("arrays.json", R"({"start": [0,0,0,1,1,2,2,2], "end": [2,2,2,1,1,2,2,2]})"),
      cli.write("rows.json", R"({"rows": [[7,8,9,1,2], [7,8,9,3,4,5]]})"),
      cli.write("list.json", R"([[{"parent": -1, "length": 3}, {"parent": 0, "length": 2},
                                  {"parent": 0, "length": 3}]])")};
  for (const std::string& file : files) {
    const nlohmann::json json = cli.run({"tree", "show", file, "--json"}).json();
    EXPECT_EQ(json["tokens"], 8) << file;
    EXPECT_EQ(json["unshared_tokens"], 11) << file;
    EXPECT_EQ(json["visible_pairs"], 6 + 9 + 15) << file;
    EXPECT_EQ(json["nodes"], 3) << file;
  }
}

TEST(CliTreeShow, RepeatedRowsCountAsUnshared) {
  const Cli cli;
  const std::string file = cli.write("rows.json", R"({"rows": [[1,2,3], [1,2,3], [1,2], []]})");
  const nlohmann::json json = cli.run({"tree", "show", file, "--json"}).json();
  EXPECT_EQ(json["tokens"], 3);
  EXPECT_EQ(json["unshared_tokens"], 8);
}

TEST(CliTreeShow, EmptyTreesAreDrawn) {
  EXPECT_EQ(Cli().run({"tree", "show", "chain:0"}).status, 0);
  const Cli cli;
  EXPECT_EQ(cli.run({"tree", "show", "chain:0", "--svg", cli.path("empty.svg")}).status, 0);
  EXPECT_EQ(cli.run({"tree", "show", cli.write("none.json", "[]")}).status, 0);
  EXPECT_EQ(cli.run({"tree", "show", cli.write("none.json", R"({"rows": []})")}).status, 0);
}

TEST(CliTreeShow, BadInputsAreNamed) {
  const Cli cli;
  expect_usage_error(cli.run({"tree", "show", "fork:3"}), {"fork:3", "fork:P,RxL"});
  expect_usage_error(cli.run({"tree", "show", "nothing"}), {"'nothing'", "chain:N"});
  expect_usage_error(cli.run({"tree", "show", "chain:9", "--block-m", "100"}),
                     {"--block-m", "'100'", "16"});
  expect_usage_error(cli.run({"tree", "show", cli.write("bad.json", "{")}),
                     {"bad.json", "not JSON"});
  expect_usage_error(cli.run({"tree", "show", cli.write("bad.json", "{\"a\": 1}")}),
                     {"no tree", "parents"});
  expect_usage_error(
      cli.run(
          {"tree", "show", cli.write("bad.json", R"({"parents": [-1, 0.5], "lengths": [1, 1]})")}),
      {"0.5", "parents"});
  expect_usage_error(
      cli.run({"tree", "show", cli.write("bad.json", R"({"parents": [-1], "lengths": [1, 1]})")}),
      {"1 parents", "2 lengths"});
  expect_usage_error(
      cli.run(
          {"tree", "show", cli.write("bad.json", R"({"start": [0, 3000000000], "end": [0, 1]})")}),
      {"3000000000", "start"});
  expect_usage_error(
      cli.run(
          {"tree", "show",
           cli.write("bad.json", R"({"parents": [-1, 18446744073709551615], "lengths": [1, 1]})")}),
      {"18446744073709551615", "parents"});
}

TEST(CliTreeShow, BrokenTreesAndMissingFilesAreFailures) {
  const Cli cli;
  const CliResult decreasing =
      cli.run({"tree", "show", cli.write("bad.json", R"({"start": [0, 1, 0], "end": [1, 1, 1]})")});
  EXPECT_EQ(decreasing.status, 1);
  EXPECT_TRUE(contains(decreasing.err, "token 2")) << decreasing.err;
  const CliResult missing = cli.run({"tree", "show", cli.path("missing.json")});
  EXPECT_EQ(missing.status, 1);
  EXPECT_TRUE(contains(missing.err, "missing.json")) << missing.err;
}

}  // namespace
}  // namespace treeattn::test
