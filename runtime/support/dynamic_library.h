// A shared library opened at run time from a list of candidates. Failing to open is a value: the
// object remembers what every candidate said. The code stays mapped until the process ends, because
// entry points are kept in tables that outlive this object. Immutable after open(), so thread-safe.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace treeattn {

class DynamicLibrary {
 public:
  enum class Mode {
    kOpen,         ///< load it if need be
    kOnlyIfLoaded  ///< take it only where the process already has it
  };

  /// One candidate that did not open.
  struct Failure {
    std::string candidate;
    std::string reason;  ///< the loader's text
  };

  DynamicLibrary() = default;
  ~DynamicLibrary();
  DynamicLibrary(DynamicLibrary&& other) noexcept;
  DynamicLibrary& operator=(DynamicLibrary&& other) noexcept;
  DynamicLibrary(const DynamicLibrary&) = delete;
  DynamicLibrary& operator=(const DynamicLibrary&) = delete;

  /// Opens the first candidate that loads: a path, or a bare name for the loader's search.
  static DynamicLibrary open(std::span<const std::string> candidates, Mode mode = Mode::kOpen);

  explicit operator bool() const { return handle_ != nullptr; }
  /// The file that was opened, as the loader resolved it; empty if none was.
  const std::string& path() const { return path_; }
  /// The candidates that failed before one opened, in order.
  const std::vector<Failure>& failures() const { return failures_; }
  /// "name: reason" lines for an error message.
  std::string failure_text() const;

  /// The address of a symbol, or null.
  void* symbol(const char* name) const;
  /// Sets a function pointer from a symbol; false (and null) if it is missing.
  template <typename Function>
  bool load(Function*& function, const char* name) const {
    function = reinterpret_cast<Function*>(symbol(name));
    return function != nullptr;
  }

 private:
  void* handle_ = nullptr;
  std::string path_;
  std::vector<Failure> failures_;
};

}  // namespace treeattn
