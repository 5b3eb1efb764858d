// The one exception type that crosses the library's public edge, and its codes.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace treeattn {

/// Stable error codes; the C API returns them as its status values.
enum class ErrorCode : int {
  kOk = 0,
  kInvalidArgument = 1,  ///< an argument is wrong; nothing was launched
  kUnsupported = 2,      ///< legal, but no kernel can do it (the message says what can)
  kNotFound = 3,         ///< a driver, compiler, file or cached kernel is missing
  kCompileFailed = 4,    ///< NVRTC refused generated source (a bug; the log is in the message)
  kCudaError = 5,        ///< the driver returned an error
  kIoError = 6,          ///< a file could not be read or written
  kInvalidTree = 7,      ///< a tree or plan input breaks the rules
  kInternal = 8,         ///< a broken invariant of this library
};

/// Carries what was wrong, what was expected, and what to do next.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  Error(ErrorCode code, const std::string& message, std::string hint)
      : std::runtime_error(hint.empty() ? message : message + "\n  " + hint),
        code_(code),
        hint_(std::move(hint)) {}

  ErrorCode code() const { return code_; }
  /// What to do next; empty when the message says it all.
  const std::string& hint() const { return hint_; }

 private:
  ErrorCode code_;
  std::string hint_;
};

}  // namespace treeattn
