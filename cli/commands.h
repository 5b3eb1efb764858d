// The commands of the program: each adds itself to the parser, checks its arguments there, and
// leaves what is to be done in `action`, which runs once all arguments are known to be good.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>

namespace treeattn::cli {

/// Returns the exit status.
using Action = std::function<int()>;

void add_doctor(CLI::App& app, Action& action);
void add_demo(CLI::App& app, Action& action);
void add_emit(CLI::App& app, Action& action);
void add_precompile(CLI::App& app, Action& action);
void add_cache(CLI::App& app, Action& action);
void add_tree(CLI::App& app, Action& action);
void add_check(CLI::App& app, Action& action);
void add_bench(CLI::App& app, Action& action);

}  // namespace treeattn::cli
