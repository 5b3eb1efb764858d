// Where template files come from, and the flattener that turns one with its includes into one text.
#pragma once

#include <set>
#include <span>
#include <string>
#include <string_view>

namespace treeattn {

struct EmbeddedTemplate {
  std::string_view name;  ///< relative to templates/, such as kernels/forward_sm80.cuh
  std::string_view text;
};

/// All templates, sorted by name. Defined in a source that templates/embed.cmake writes.
std::span<const EmbeddedTemplate> embedded_templates();

/// Inlines templates, each file once over the flattener's life, with #line marks that name the
/// file.
class Flattener {
 public:
  /// Reads from `template_dir` where it is not empty: the one place of the generator that touches
  /// files.
  explicit Flattener(std::string template_dir = {}) : template_dir_(std::move(template_dir)) {}

  /// The text of a template with its quoted includes inlined; empty if it was inlined before.
  /// Throws Error(kInternal) for a missing file, an include cycle or an include in angle brackets:
  /// kernels depend on no header of a toolkit.
  std::string flatten(std::string_view name);

 private:
  std::string load(std::string_view name, std::string_view includer) const;
  void inline_file(const std::string& name, std::string_view includer, std::string& out);

  std::string template_dir_;
  std::set<std::string> done_;
  std::set<std::string> open_;
};

}  // namespace treeattn
