// One sink for messages; the default writes to stderr.
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "runtime/support/config.h"

namespace treeattn {

using LogSink = std::function<void(LogLevel, std::string_view)>;

/// Replaces the sink (null restores stderr). Thread-safe.
void set_log_sink(LogSink sink);
void set_log_level(LogLevel level);
LogLevel log_level();
void log(LogLevel level, std::string_view message);
/// Logs the message the first time `key` is seen in this process.
void log_once(LogLevel level, std::string_view key, std::string_view message);

}  // namespace treeattn
