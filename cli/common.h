// What every command prints with: exit statuses, tables, JSON, numbers for people, output files.
// Text for people and JSON go to standard output, everything else to standard error. Not
// thread-safe.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace treeattn::cli {

/// Keeps the order in which fields were added.
using Json = nlohmann::ordered_json;

enum ExitStatus : int { kExitOk = 0, kExitFailure = 1, kExitUsage = 2, kExitInterrupted = 130 };

/// A bad argument: the message names its value and what was expected.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Writes to standard output; main() reports a failure to do so.
void print(std::string_view text);
/// One document; text that is not UTF-8 is replaced, numbers that JSON lacks become null.
void print_json(const Json& document);
/// The same on one line.
void print_json_line(const Json& document);
/// "treeattn: ..." on standard error.
void print_error(std::string_view message);

/// Columns padded to their widest cell, or to the widths given where rows are printed one by one.
class Table {
 public:
  enum class Align { kLeft, kRight };
  struct Column {
    std::string title;
    Align align = Align::kLeft;
    std::size_t width = 0;
  };
  using Cells = std::vector<std::string>;
  explicit Table(std::vector<Column> columns);

  /// As many cells as there are columns.
  void add(Cells cells);
  bool empty() const { return rows_.empty(); }
  std::string text() const;

  std::string header() const;
  std::string line(const Cells& cells) const;

 private:
  std::vector<Column> columns_;
  std::vector<Cells> rows_;
};

std::string format_bytes(std::uint64_t bytes);  ///< 1.5 MiB
std::string format_count(std::int64_t count);   ///< 16,384
std::string format_ms(double ms);               ///< 0.0123, 4.56, 1234
std::string format_age(std::int64_t seconds);   ///< 3 d
std::string format_share(double part, double whole);
std::string plural(std::int64_t count, std::string_view noun);  ///< 1 kernel, 2 kernels

/// What the library says about itself.
std::string library_version();               ///< 0.1.0
std::string template_digest();               ///< SHA-256 of the embedded templates
std::string utc_now();                       ///< 2026-01-31T12:00:00Z
std::string cuda_version_text(int version);  ///< 13000 -> 13.0

/// Whether the terminal's character set is UTF-8, and how wide it is.
bool terminal_is_utf8();
int terminal_columns();

/// Replaces a file in one step; what is no regular file (a pipe, /dev/stdout) is written to as it
/// is. Throws Error(kIoError).
void write_output(const std::string& path, std::string_view text);

}  // namespace treeattn::cli
