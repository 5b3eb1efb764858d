// A forked child that runs a function, and a gate that releases many children at once.
#pragma once

#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <functional>
#include <stdexcept>
#include <utility>

namespace treeattn::test {

class ChildProcess {
 public:
  /// The child exits with the function's value; 99 if it throws.
  explicit ChildProcess(const std::function<int()>& body) : pid_(fork()) {
    if (pid_ < 0) throw std::runtime_error("fork failed");
    if (pid_ == 0) {
      int code = 99;
      try {
        code = body();
      } catch (...) {
      }
      _exit(code);
    }
  }
  ~ChildProcess() {
    if (pid_ > 0) {
      send(SIGKILL);
      wait();
    }
  }
  ChildProcess(ChildProcess&& other) noexcept : pid_(std::exchange(other.pid_, 0)) {}
  ChildProcess& operator=(ChildProcess&&) = delete;
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  void send(int signal) const { kill(pid_, signal); }
  /// The exit status, or minus the signal that ended it.
  int wait() {
    int status = 0;
    while (waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
    pid_ = 0;
    return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
  }

 private:
  pid_t pid_;
};

/// A one-shot event between processes, made before the fork.
class ProcessGate {
 public:
  ProcessGate() {
    if (pipe(ends_.data()) != 0) throw std::runtime_error("pipe failed");
  }
  ~ProcessGate() {
    for (const int end : ends_) {
      if (end >= 0) close(end);
    }
  }
  ProcessGate(const ProcessGate&) = delete;
  ProcessGate& operator=(const ProcessGate&) = delete;

  /// Lets every waiter through, those that come later included.
  void open() const {
    const char token = 1;
    [[maybe_unused]] const ssize_t written = write(ends_[1], &token, 1);
  }
  void wait() const {
    char token = 0;
    while (read(ends_[0], &token, 1) < 0 && errno == EINTR) {
    }
    open();  // pass it on
  }

 private:
  std::array<int, 2> ends_{-1, -1};
};

}  // namespace treeattn::test
