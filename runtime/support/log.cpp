#include "runtime/support/log.h"

#include <unistd.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_set>

namespace treeattn {

namespace {

struct LogState {
  std::mutex mutex;
  std::shared_ptr<const LogSink> sink;  // null: stderr
  std::unordered_set<std::string> seen;
};

// Leaked: messages may come from destructors that run after ours would have.
LogState& state() {
  static auto* const leaked = new LogState;
  return *leaked;
}

constexpr int kLevelFromConfig = -1;
std::atomic<int> level_override{kLevelFromConfig};

const char* level_name(LogLevel level) {
  switch (level) {
    case LogLevel::kError:
      return "error";
    case LogLevel::kWarning:
      return "warning";
    case LogLevel::kInfo:
      return "info";
    case LogLevel::kDebug:
      return "debug";
  }
  return "message";
}

// One write, so that lines of several processes on one terminal do not mix.
void write_to_stderr(LogLevel level, std::string_view message) {
  std::string line = "treeattn ";
  line += level_name(level);
  line += ": ";
  line += message;
  line += '\n';
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, line.data(), line.size());
}

}  // namespace

void set_log_sink(LogSink sink) {
  auto shared = sink ? std::make_shared<const LogSink>(std::move(sink)) : nullptr;
  const std::lock_guard lock(state().mutex);
  state().sink.swap(shared);
}

void set_log_level(LogLevel level) {
  level_override = static_cast<int>(level);
}

LogLevel log_level() {
  const int level = level_override;
  return level == kLevelFromConfig ? config().log_level : static_cast<LogLevel>(level);
}

void log(LogLevel level, std::string_view message) {
  if (level > log_level()) return;
  std::shared_ptr<const LogSink> sink;
  {
    const std::lock_guard lock(state().mutex);
    sink = state().sink;
  }
  if (!sink) {
    write_to_stderr(level, message);
    return;
  }
  // Outside the lock, so that a sink may log or replace itself. Its exceptions end here: a message
  // must not turn a cache miss into a failure.
  try {
    (*sink)(level, message);
  } catch (...) {
    write_to_stderr(level, message);
  }
}

void log_once(LogLevel level, std::string_view key, std::string_view message) {
  if (level > log_level()) return;
  {
    const std::lock_guard lock(state().mutex);
    if (!state().seen.emplace(key).second) return;
  }
  log(level, message);
}

void log_problems(const Config& config) {
  for (const std::string& problem : config.problems) {
    log_once(LogLevel::kWarning, "config:" + problem, problem);
  }
}

}  // namespace treeattn
