#include "runtime/support/log.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/log_capture.h"

namespace treeattn {
namespace {

using test::LogCapture;

TEST(Log, DropsMessagesBelowTheLevel) {
  const LogCapture capture(LogLevel::kWarning);
  log(LogLevel::kInfo, "quiet");
  log(LogLevel::kWarning, "shown");
  log(LogLevel::kError, "loud");
  const auto messages = capture.messages();
  ASSERT_EQ(messages.size(), 2u);
  EXPECT_EQ(messages[0], std::pair(LogLevel::kWarning, std::string("shown")));
  EXPECT_EQ(messages[1], std::pair(LogLevel::kError, std::string("loud")));
}

TEST(Log, SaysAKeyOnce) {
  const LogCapture capture;
  log_once(LogLevel::kWarning, "log_test-once", "first");
  log_once(LogLevel::kWarning, "log_test-once", "second");
  log_once(LogLevel::kWarning, "log_test-other", "third");
  EXPECT_EQ(capture.text(), "first\nthird\n");
}

TEST(Log, AMessageThatWasNotShownDoesNotUseUpItsKey) {
  const LogCapture capture(LogLevel::kWarning);
  log_once(LogLevel::kInfo, "log_test-hidden", "hidden");
  set_log_level(LogLevel::kInfo);
  log_once(LogLevel::kInfo, "log_test-hidden", "shown");
  EXPECT_EQ(capture.text(), "shown\n");
}

TEST(Log, SaysAKeyOnceAcrossThreads) {
  const LogCapture capture;
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([] {
      for (int n = 0; n < 50; ++n) {
        log_once(LogLevel::kWarning, "log_test-thread-" + std::to_string(n), "threaded");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(capture.count("threaded"), 50u);
}

TEST(Log, ASinkMayLogAndMayThrow) {
  const LogLevel before = log_level();
  set_log_level(LogLevel::kWarning);
  std::string seen;
  set_log_sink([&](LogLevel, std::string_view message) {
    seen += message;
    if (message == "outer") log(LogLevel::kWarning, "inner");
    throw std::runtime_error("sink");
  });
  testing::internal::CaptureStderr();
  EXPECT_NO_THROW(log(LogLevel::kWarning, "outer"));
  const std::string stderr_text = testing::internal::GetCapturedStderr();
  set_log_sink(nullptr);
  set_log_level(before);
  EXPECT_EQ(seen, "outerinner");
  EXPECT_EQ(stderr_text, "treeattn warning: inner\ntreeattn warning: outer\n");
}

TEST(Log, ReportsEachConfigProblemOnce) {
  const LogCapture capture;
  Config config;
  config.problems = {"log_test: first problem", "log_test: second problem"};
  log_problems(config);
  log_problems(config);
  EXPECT_EQ(capture.text(), "log_test: first problem\nlog_test: second problem\n");
}

}  // namespace
}  // namespace treeattn
