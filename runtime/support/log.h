// One sink for messages; the default writes to stderr. Thread-safe. The level starts as the
// configuration's and can be set.
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "runtime/support/config.h"

namespace treeattn {

using LogSink = std::function<void(LogLevel, std::string_view)>;

/// Replaces the sink (null restores stderr). A sink may be called from several threads at once; a
/// message it throws at goes to stderr.
void set_log_sink(LogSink sink);
void set_log_level(LogLevel level);
LogLevel log_level();
void log(LogLevel level, std::string_view message);
/// Logs the message the first time `key` is seen in this process (at a level that is shown).
void log_once(LogLevel level, std::string_view key, std::string_view message);
/// Warns once about each bad value that parsing the environment found.
void log_problems(const Config& config);

}  // namespace treeattn
