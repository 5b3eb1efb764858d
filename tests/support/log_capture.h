// Collects what the library logs while it lives; the sink and the level are restored after it.
#pragma once

#include <algorithm>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "runtime/support/log.h"

namespace treeattn::test {

class LogCapture {
 public:
  explicit LogCapture(LogLevel level = LogLevel::kWarning) : level_before_(log_level()) {
    set_log_level(level);
    set_log_sink([this](LogLevel at, std::string_view text) {
      const std::lock_guard lock(mutex_);
      messages_.emplace_back(at, text);
    });
  }
  ~LogCapture() {
    set_log_sink(nullptr);
    set_log_level(level_before_);
  }
  LogCapture(const LogCapture&) = delete;
  LogCapture& operator=(const LogCapture&) = delete;

  std::vector<std::pair<LogLevel, std::string>> messages() const {
    const std::lock_guard lock(mutex_);
    return messages_;
  }
  /// How many messages hold a text.
  std::size_t count(const std::string& text) const {
    const auto all = messages();
    return static_cast<std::size_t>(std::count_if(all.begin(), all.end(), [&](const auto& message) {
      return message.second.find(text) != std::string::npos;
    }));
  }
  std::string text() const {
    std::string joined;
    for (const auto& message : messages()) joined += message.second + "\n";
    return joined;
  }

 private:
  LogLevel level_before_;
  mutable std::mutex mutex_;
  std::vector<std::pair<LogLevel, std::string>> messages_;
};

}  // namespace treeattn::test
