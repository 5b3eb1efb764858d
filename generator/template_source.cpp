#include "generator/template_source.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <optional>
#include <vector>

#include "treeattn/error.h"

namespace treeattn {
namespace {

/// `path` relative to the folder of `includer`, with `.` and `..` resolved.
std::string resolve(std::string_view includer, std::string_view path) {
  std::vector<std::string_view> parts;
  const auto push = [&parts](std::string_view text) {
    while (!text.empty()) {
      const std::size_t slash = text.find('/');
      const std::string_view part = text.substr(0, slash);
      text = slash == std::string_view::npos ? std::string_view{} : text.substr(slash + 1);
      if (part.empty() || part == ".") continue;
      if (part == ".." && !parts.empty()) {
        parts.pop_back();
      } else {
        parts.push_back(part);
      }
    }
  };
  const std::size_t folder = includer.rfind('/');
  if (folder != std::string_view::npos) push(includer.substr(0, folder));
  push(path);
  return fmt::format("{}", fmt::join(parts, "/"));
}

std::string_view trimmed(std::string_view line) {
  const std::size_t begin = line.find_first_not_of(" \t");
  if (begin == std::string_view::npos) return {};
  return line.substr(begin, line.find_last_not_of(" \t\r") + 1 - begin);
}

/// The rest of a directive line such as `#include "x"`, or nothing if it is another line.
std::optional<std::string_view> directive(std::string_view line, std::string_view name) {
  line = trimmed(line);
  if (line.empty() || line.front() != '#') return std::nullopt;
  line = trimmed(line.substr(1));
  if (line.substr(0, name.size()) != name) return std::nullopt;
  return trimmed(line.substr(name.size()));
}

}  // namespace

std::string Flattener::load(std::string_view name, std::string_view includer) const {
  const std::string from =
      includer.empty() ? std::string{} : fmt::format(", included by {}", includer);
  if (!template_dir_.empty()) {
    std::ifstream file(template_dir_ + "/" + std::string(name), std::ios::binary);
    if (!file) {
      throw Error(ErrorCode::kNotFound,
                  fmt::format("no template {}/{}{}", template_dir_, name, from),
                  "TREEATTN_TEMPLATE_DIR must name a copy of the templates folder");
    }
    return {std::istreambuf_iterator<char>(file), {}};
  }
  const auto all = embedded_templates();
  const auto found = std::lower_bound(
      all.begin(), all.end(), name,
      [](const EmbeddedTemplate& t, std::string_view wanted) { return t.name < wanted; });
  if (found == all.end() || found->name != name) {
    throw Error(ErrorCode::kInternal, fmt::format("no embedded template {}{}", name, from));
  }
  return std::string(found->text);
}

void Flattener::inline_file(const std::string& name, std::string_view includer, std::string& out) {
  if (open_.count(name) != 0) {
    throw Error(ErrorCode::kInternal,
                fmt::format("templates include each other: {} and {}", includer, name));
  }
  if (!done_.insert(name).second) return;
  open_.insert(name);
  const std::string text = load(name, includer);
  std::string_view rest = text;
  out += fmt::format("#line 1 \"templates/{}\"\n", name);
  for (int line = 1; !rest.empty(); ++line) {
    const std::size_t end = std::min(rest.find('\n'), rest.size());
    const std::string_view here = rest.substr(0, end);
    rest = rest.substr(std::min(end + 1, rest.size()));
    if (const auto included = directive(here, "include")) {
      const std::size_t close = included->find('"', 1);
      if (included->size() < 3 || included->front() != '"' || close == std::string_view::npos) {
        throw Error(ErrorCode::kInternal,
                    fmt::format("templates/{}:{}: include {} is not a template in quotes", name,
                                line, *included));
      }
      inline_file(resolve(name, included->substr(1, close - 1)), name, out);
      out += fmt::format("#line {} \"templates/{}\"\n", line + 1, name);
    } else if (directive(here, "pragma once")) {
      out += "\n";  // keeps the line numbers
    } else {
      out += here;
      out += '\n';
    }
  }
  open_.erase(name);
}

std::string Flattener::flatten(std::string_view name) {
  std::string out;
  inline_file(std::string(name), {}, out);
  return out;
}

}  // namespace treeattn
