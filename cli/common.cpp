#include "cli/common.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <span>
#include <system_error>

#include "generator/generate.h"
#include "runtime/support/digest.h"
#include "runtime/support/file_io.h"
#include "treeattn/error.h"
#include "treeattn/treeattn_c.h"

namespace treeattn::cli {

namespace fs = std::filesystem;

namespace {

constexpr int kUsualColumns = 80;

std::string dump(const Json& document, int indent) {
  return document.dump(indent, ' ', false, Json::error_handler_t::replace) + "\n";
}

/// Permission bits of a new file, as open(2) would give it.
unsigned new_file_mode() {
  const mode_t mask = umask(0);
  umask(mask);
  return 0666U & ~static_cast<unsigned>(mask);
}

}  // namespace

void print(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
}

void print_json(const Json& document) {
  print(dump(document, 2));
}

void print_json_line(const Json& document) {
  print(dump(document, -1));
}

void print_error(std::string_view message) {
  std::fflush(stdout);
  const std::string line = fmt::format("treeattn: {}\n", message);
  std::fwrite(line.data(), 1, line.size(), stderr);
}

Table::Table(std::vector<Column> columns) : columns_(std::move(columns)) {
  for (Column& column : columns_) column.width = std::max(column.width, column.title.size());
}

void Table::add(Cells cells) {
  for (std::size_t c = 0; c < columns_.size(); ++c) {
    columns_[c].width = std::max(columns_[c].width, cells.at(c).size());
  }
  rows_.push_back(std::move(cells));
}

std::string Table::line(const Cells& cells) const {
  std::string line;
  for (std::size_t c = 0; c < columns_.size(); ++c) {
    const auto& [title, align, width] = columns_[c];
    line += align == Align::kRight ? fmt::format("{:>{}}  ", cells.at(c), width)
                                   : fmt::format("{:<{}}  ", cells.at(c), width);
  }
  return line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
}

std::string Table::header() const {
  Cells titles;
  for (const Column& column : columns_) titles.push_back(column.title);
  return line(titles);
}

std::string Table::text() const {
  std::string text = header();
  for (const Cells& row : rows_) text += line(row);
  return text;
}

std::string format_bytes(std::uint64_t bytes) {
  constexpr std::uint64_t kStep = 1024;
  if (bytes < kStep) return fmt::format("{} B", bytes);
  auto value = static_cast<double>(bytes);
  const char* unit = "B";
  for (const char* next : {"KiB", "MiB", "GiB", "TiB"}) {
    if (value < static_cast<double>(kStep)) break;
    value /= static_cast<double>(kStep);
    unit = next;
  }
  return fmt::format("{:.1f} {}", value, unit);
}

std::string format_count(std::int64_t count) {
  std::string digits = fmt::format("{}", count);
  const std::ptrdiff_t first = count < 0 ? 1 : 0;
  for (auto at = static_cast<std::ptrdiff_t>(digits.size()) - 3; at > first; at -= 3) {
    digits.insert(static_cast<std::size_t>(at), ",");
  }
  return digits;
}

std::string format_ms(double ms) {
  if (!std::isfinite(ms)) return "-";
  if (ms < 1) return fmt::format("{:.4f}", ms);
  return ms < 100 ? fmt::format("{:.3f}", ms) : fmt::format("{:.0f}", ms);
}

std::string format_age(std::int64_t seconds) {
  constexpr std::int64_t kMinute = 60, kHour = 60 * kMinute, kDay = 24 * kHour;
  if (seconds < kMinute) return fmt::format("{} s", std::max<std::int64_t>(0, seconds));
  if (seconds < kHour) return fmt::format("{} min", seconds / kMinute);
  return seconds < kDay ? fmt::format("{} h", seconds / kHour)
                        : fmt::format("{} d", seconds / kDay);
}

std::string format_share(double part, double whole) {
  return whole > 0 ? fmt::format("{:.1f} %", 100 * part / whole) : "-";
}

std::string plural(std::int64_t count, std::string_view noun) {
  return count == 1 ? fmt::format("1 {}", noun) : fmt::format("{} {}s", format_count(count), noun);
}

std::string library_version() {
  const std::int32_t version = treeattn_version();
  return fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100);
}

std::string template_digest() {
  return to_hex(sha256(embedded_templates_text()));
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[32];
  const std::size_t length = std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &parts);
  return {text, length};
}

std::string cuda_version_text(int version) {
  return fmt::format("{}.{}", version / 1000, version / 10 % 100);
}

bool terminal_is_utf8() {
  // The first one that is set decides, as in setlocale(3).
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {
    const char* value = std::getenv(name);
    if (value == nullptr || *value == '\0') continue;
    std::string upper(value);
    for (char& c : upper) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    return upper.find("UTF-8") != std::string::npos || upper.find("UTF8") != std::string::npos;
  }
  return false;
}

int terminal_columns() {
  winsize size{};
  const bool known = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  return known ? size.ws_col : kUsualColumns;
}

void write_output(const std::string& path, std::string_view text) {
  const auto fail = [&](const std::string& why) {
    throw Error(ErrorCode::kIoError, fmt::format("cannot write '{}': {}", path, why));
  };
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (fs::exists(status) && !fs::is_regular_file(status)) {
    if (fs::is_directory(status)) fail("it is a folder, expected a file");
    std::ofstream stream(path, std::ios::binary);
    stream.write(text.data(), static_cast<std::streamsize>(text.size()));
    if (!stream.flush()) fail("the write failed");
    return;
  }
  // A link keeps pointing at what it names.
  fs::path target = fs::is_regular_file(status) ? fs::canonical(path, error) : fs::path(path);
  if (target.empty()) target = path;
  const auto bytes = std::as_bytes(std::span(text.data(), text.size()));
  if (const IoStatus written = write_file_atomically(target, bytes, new_file_mode()); !written) {
    fail(written.why);
  }
}

}  // namespace treeattn::cli
