#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <iostream>
#include <new>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/common.h"
#include "treeattn/error.h"

namespace treeattn::cli {
namespace {

std::string command_names(const CLI::App& app) {
  std::string names;
  for (const CLI::App* command : app.get_subcommands({})) {
    names += (names.empty() ? "" : ", ") + command->get_name();
  }
  return names;
}

/// "treeattn cache prune" as far as the arguments name commands.
std::string command_path(const CLI::App& app) {
  std::string path = app.get_name();
  for (const CLI::App* level = &app; !level->get_subcommands().empty();) {
    level = level->get_subcommands().front();
    path += " " + level->get_name();
  }
  return path;
}

/// Complains about a word that names no command: CLI11 would call it an unexpected argument.
void check_command(const CLI::App& app, const std::vector<std::string>& args) {
  const CLI::App* level = &app;
  std::string path = app.get_name();
  for (const std::string& arg : args) {
    const auto commands = level->get_subcommands([&](const CLI::App*) { return true; });
    if (commands.empty() || arg.starts_with('-')) return;
    const CLI::App* next = nullptr;
    for (const CLI::App* command : commands) {
      if (command->get_name() == arg) next = command;
    }
    if (next == nullptr) {
      throw UsageError(fmt::format("'{}' is not a command of '{}'; expected one of {}", arg, path,
                                   command_names(*level)));
    }
    level = next;
    path += " " + arg;
  }
  if (!level->get_subcommands([](const CLI::App*) { return true; }).empty()) {
    throw UsageError(fmt::format("'{}' needs a command: one of {}", path, command_names(*level)));
  }
}

int fail_usage(const CLI::App& app, const std::string& message) {
  print_error(fmt::format("{}\n  see '{} --help'", message, command_path(app)));
  return kExitUsage;
}

int run(int argc, char** argv) {
  CLI::App app{"Exact attention over trees of tokens, with CUDA kernels made at run time.",
               "treeattn"};
  app.set_version_flag("--version", "treeattn " + library_version());
  app.get_formatter()->column_width(32);
  app.footer(
      "Every command has --help and --json. Exit status: 0 success, 1 failure, 2 bad "
      "arguments.");
  Action action;
  add_doctor(app, action);
  add_demo(app, action);
  add_emit(app, action);
  add_precompile(app, action);
  add_cache(app, action);
  add_tree(app, action);
  add_check(app, action);
  add_bench(app, action);
  try {
    check_command(app, {argv + 1, argv + argc});
    app.parse(argc, argv);
    if (!action) {
      throw UsageError(fmt::format("a command is missing; expected one of {}", command_names(app)));
    }
    return action();
  } catch (const CLI::Success& success) {
    return app.exit(success);
  } catch (const CLI::ParseError& error) {
    return fail_usage(app, error.what());
  } catch (const UsageError& error) {
    return fail_usage(app, error.what());
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kInvalidArgument) return fail_usage(app, error.what());
    print_error(error.what());
  } catch (const std::bad_alloc&) {
    print_error("out of memory; use a smaller workload");
  } catch (const std::exception& error) {
    print_error(error.what());
  }
  return kExitFailure;
}

}  // namespace
}  // namespace treeattn::cli

int main(int argc, char** argv) {
  try {
    const int status = treeattn::cli::run(argc, argv);
    std::cout.flush();
    if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0 && std::cout) return status;
    treeattn::cli::print_error("cannot write to standard output");
    return status == treeattn::cli::kExitOk ? treeattn::cli::kExitFailure : status;
  } catch (...) {
    // Only an error about an error ends here.
    std::fputs("treeattn: out of memory\n", stderr);
    return treeattn::cli::kExitFailure;
  }
}
