// What all commands share: help, versions, bad arguments, exit statuses.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/cli/run_cli.h"

namespace treeattn::test {
namespace {

const std::vector<std::vector<std::string>>& all_commands() {
  static const std::vector<std::vector<std::string>> kCommands{
      {"doctor"},         {"demo"},
      {"emit"},           {"precompile"},
      {"cache", "list"},  {"cache", "verify"},
      {"cache", "prune"}, {"cache", "explain"},
      {"tree", "show"},   {"check"},
      {"bench"}};
  return kCommands;
}

TEST(CliUsage, EveryCommandHasHelpWithAnExampleAndJson) {
  const Cli cli;
  for (std::vector<std::string> args : all_commands()) {
    args.emplace_back("--help");
    const CliResult result = cli.run(args);
    EXPECT_EQ(result.status, 0) << args.front();
    EXPECT_EQ(result.err, "");
    EXPECT_TRUE(contains(result.out, "Example")) << result.out;
    EXPECT_TRUE(contains(result.out, "  treeattn " + args.front())) << result.out;
    EXPECT_TRUE(contains(result.out, "--json")) << result.out;
  }
}

TEST(CliUsage, VersionIsPrinted) {
  const CliResult result = Cli().run({"--version"});
  EXPECT_EQ(result.status, 0);
  EXPECT_EQ(result.out, "treeattn 0.1.0\n");
}

TEST(CliUsage, UnknownCommandsAreNamedWithWhatWasExpected) {
  const Cli cli;
  expect_usage_error(cli.run({"frobnicate"}), {"'frobnicate'", "doctor, demo, emit"});
  expect_usage_error(cli.run({"cache", "drop"}), {"'drop'", "list, verify, prune, explain"});
  expect_usage_error(cli.run({}), {"needs a command", "doctor"});
  expect_usage_error(cli.run({"tree"}), {"'treeattn tree'", "show"});
}

TEST(CliUsage, UnknownOptionsAreNamedByEveryCommand) {
  const Cli cli;
  for (std::vector<std::string> args : all_commands()) {
    if (args.back() == "emit" || args.back() == "explain" || args.back() == "show") {
      args.emplace_back("chain:4");
    }
    args.emplace_back("--frobnicate");
    expect_usage_error(cli.run(args), {"--frobnicate", "--help'"});
  }
}

TEST(CliUsage, BadNumbersNameValueAndRange) {
  const Cli cli;
  expect_usage_error(cli.run({"check", "--cases", "many"}), {"--cases", "'many'", "whole number"});
  expect_usage_error(cli.run({"check", "--cases", "-1"}), {"--cases", "'-1'", "from 0"});
  expect_usage_error(cli.run({"bench", "--reps", "0"}), {"--reps", "'0'", "from 1"});
  expect_usage_error(cli.run({"bench", "--reps", "3.5"}), {"--reps", "'3.5'"});
  expect_usage_error(cli.run({"bench", "--softcap", "nan"}), {"--softcap", "'nan'"});
  expect_usage_error(cli.run({"precompile", "-j", "0"}), {"--jobs", "'0'"});
}

TEST(CliUsage, BadListsNameTheBadPart) {
  const Cli cli;
  expect_usage_error(cli.run({"bench", "--dtype", "bf16,f8"}), {"--dtype", "'f8'", "f16 or bf16"});
  expect_usage_error(cli.run({"bench", "--head-dim", "64,65"}),
                     {"--head-dim", "'65'", "multiple of 8"});
  expect_usage_error(cli.run({"bench", "--head-dim", "64,,128"}),
                     {"--head-dim", "'64,,128'", "comma"});
  expect_usage_error(cli.run({"check", "--heads", "6", "--heads-kv", "4"}),
                     {"--heads", "'6'", "multiple", "4"});
  expect_usage_error(cli.run({"check", "--device", "tpu"}), {"--device", "'tpu'", "cpu"});
  expect_usage_error(cli.run({"bench", "fork:12"}), {"fork:12", "fork:P,RxL"});
}

TEST(CliUsage, DeterministicForwardIsRefusedAsItAlwaysIs) {
  const Cli cli;
  for (const char* command : {"check", "bench"}) {
    expect_usage_error(cli.run({command, "--device", "cpu", "--deterministic", "chain:16"}),
                       {"--deterministic", "--pass bwd"});
  }
}

TEST(CliUsage, AnOutputThatCannotBeWrittenIsAFailure) {
  const Cli cli;
  const CliResult result = cli.run({"emit", "plan/sm80@sm_80", "--out", "/nonexistent/kernel.cu"});
  EXPECT_EQ(result.status, 1);
  EXPECT_TRUE(contains(result.err, "/nonexistent/kernel.cu")) << result.err;
}

}  // namespace
}  // namespace treeattn::test
