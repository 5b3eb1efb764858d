#include "runtime/cache/artifact.h"

#include <algorithm>
#include <charconv>
#include <cstring>

#include "runtime/support/digest.h"
#include "treeattn/error.h"

namespace treeattn {

namespace {

constexpr std::string_view kMagic = "treeattn";
constexpr std::string_view kSchema = "1";
constexpr std::size_t kTrailerBytes = 16;
constexpr std::size_t kMaxFooterBytes = 1u << 20;

struct EntryField {
  const char* name;
  int EntryFacts::*value;
};
constexpr EntryField kEntryFields[] = {
    {"threads", &EntryFacts::threads},
    {"smem_bytes", &EntryFacts::smem_bytes},
    {"registers", &EntryFacts::registers},
    {"spill_bytes", &EntryFacts::spill_bytes},
    {"stack_bytes", &EntryFacts::stack_bytes},
    {"static_smem_bytes", &EntryFacts::static_smem_bytes},
};

std::string_view as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Magic and machine only: stricter checks have refused good cubins when the format moved on.
bool is_cuda_elf(std::span<const std::byte> bytes) {
  constexpr std::size_t kElfHeaderBytes = 64;
  constexpr std::size_t kMachineOffset = 18;
  constexpr unsigned kMachineCuda = 190;
  if (bytes.size() < kElfHeaderBytes || as_text(bytes.first(4)) !=
                                            "\x7f"
                                            "ELF") {
    return false;
  }
  const auto machine = std::to_integer<unsigned>(bytes[kMachineOffset]) |
                       std::to_integer<unsigned>(bytes[kMachineOffset + 1]) << 8;
  return machine == kMachineCuda;
}

// Text that can stand in a footer line. The bounds keep every footer below kMaxFooterBytes.
constexpr std::size_t kMaxTextBytes = 4096;
constexpr std::size_t kMaxEntries = 128;

bool is_line_text(std::string_view value) {
  const auto control = [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; };
  return !value.empty() && value.size() <= kMaxTextBytes &&
         std::none_of(value.begin(), value.end(), control);
}

void append_line(std::string& footer, std::string_view name, std::string_view value) {
  footer.append(name).append("=").append(value).append("\n");
}

std::string entry_field(std::size_t index, std::string_view name) {
  return "entry." + std::to_string(index) + "." + std::string(name);
}

std::string footer_text(const Artifact& artifact) {
  std::string footer;
  append_line(footer, "treeattn_artifact", kSchema);
  append_line(footer, "key", artifact.key.hex());
  append_line(footer, "spec", artifact.spec);
  append_line(footer, "target", artifact.target);
  append_line(footer, "nvrtc", artifact.nvrtc);
  append_line(footer, "entries", std::to_string(artifact.entries.size()));
  for (std::size_t i = 0; i < artifact.entries.size(); ++i) {
    append_line(footer, entry_field(i, "name"), artifact.entries[i].name);
    for (const EntryField& field : kEntryFields) {
      append_line(footer, entry_field(i, field.name),
                  std::to_string(artifact.entries[i].*field.value));
    }
  }
  append_line(footer, "cubin_bytes", std::to_string(artifact.cubin.size()));
  append_line(footer, "cubin_sha256", to_hex(sha256(artifact.cubin)));
  append_line(footer, "footer_sha256", to_hex(sha256(footer)));
  return footer;
}

// Reads the footer's lines in their one order; remembers the first trouble and answers nothing
// after it.
class FooterReader {
 public:
  explicit FooterReader(std::string_view text) : rest_(text) {}

  std::string_view value(std::string_view name) {
    if (!why_.empty()) return {};
    const std::size_t end = rest_.find('\n');
    const std::string_view line = rest_.substr(0, end);
    if (end == std::string_view::npos || line.size() <= name.size() || !line.starts_with(name) ||
        line[name.size()] != '=') {
      why_ = "its footer has no field '" + std::string(name) + "' where one was expected";
      return {};
    }
    rest_.remove_prefix(end + 1);
    return line.substr(name.size() + 1);
  }

  template <typename Number>
  Number number(std::string_view name) {
    const std::string_view text = value(name);
    Number parsed{};
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), parsed);
    if (why_.empty() && (error != std::errc{} || end != text.data() + text.size())) {
      why_ = "its footer field '" + std::string(name) + "' is not a number";
    }
    return parsed;
  }

  void fail(std::string why) {
    if (why_.empty()) why_ = std::move(why);
  }
  bool at_end() const { return rest_.empty(); }
  bool failed() const { return !why_.empty(); }
  const std::string& why() const { return why_; }

 private:
  std::string_view rest_;
  std::string why_;
};

struct FileParts {
  std::span<const std::byte> cubin;
  std::string_view footer;
};

std::optional<FileParts> split_file(std::span<const std::byte> file, std::string& why) {
  if (file.empty()) {
    why = "it is empty";
    return std::nullopt;
  }
  if (file.size() < kTrailerBytes || as_text(file.last(kMagic.size())) != kMagic) {
    why = "it does not end in this library's magic: it was cut short, or is not a treeattn entry";
    return std::nullopt;
  }
  std::uint64_t footer_bytes = 0;
  for (std::size_t i = 0; i < 8; ++i) {
    footer_bytes |= std::to_integer<std::uint64_t>(file[file.size() - kTrailerBytes + i])
                    << (8 * i);
  }
  if (footer_bytes > std::min(kMaxFooterBytes, file.size() - kTrailerBytes)) {
    why = "its footer length is impossible";
    return std::nullopt;
  }
  const std::size_t cubin_bytes = file.size() - kTrailerBytes - footer_bytes;
  return FileParts{file.first(cubin_bytes), as_text(file.subspan(cubin_bytes, footer_bytes))};
}

// The last line digests all lines before it.
bool footer_digest_matches(std::string_view footer) {
  constexpr std::string_view kName = "footer_sha256=";
  const std::size_t begin = footer.rfind(kName);
  if (begin == std::string_view::npos) return false;
  return footer.substr(begin + kName.size()) == to_hex(sha256(footer.substr(0, begin))) + "\n";
}

void read_fields(FooterReader& reader, Artifact& artifact) {
  const std::optional<ArtifactKey> key = parse_artifact_key(reader.value("key"));
  if (!key) reader.fail("its footer field 'key' is not a key");
  artifact.key = key.value_or(ArtifactKey{});
  artifact.spec = reader.value("spec");
  artifact.target = reader.value("target");
  artifact.nvrtc = reader.value("nvrtc");
  const auto entries = reader.number<std::uint32_t>("entries");
  for (std::size_t i = 0; i < entries && !reader.failed(); ++i) {
    EntryFacts facts;
    facts.name = reader.value(entry_field(i, "name"));
    for (const EntryField& field : kEntryFields) {
      facts.*field.value = reader.number<int>(entry_field(i, field.name));
    }
    artifact.entries.push_back(std::move(facts));
  }
}

}  // namespace

std::optional<int> nvrtc_major(std::string_view version) {
  int major = 0;
  const auto [end, error] = std::from_chars(version.data(), version.data() + version.size(), major);
  const bool whole = end == version.data() + version.size() || *end == '.';
  if (error != std::errc{} || !whole || major <= 0) return std::nullopt;
  return major;
}

std::optional<std::string> refuse_artifact(const Artifact& artifact) {
  constexpr const char* kBadText = " is empty, too long, or holds a control character";
  if (!is_line_text(artifact.spec)) return std::string("its spec") + kBadText;
  if (!is_line_text(artifact.target)) return std::string("its target") + kBadText;
  if (!is_line_text(artifact.nvrtc)) return std::string("its NVRTC version") + kBadText;
  if (!nvrtc_major(artifact.nvrtc))
    return "its NVRTC version '" + artifact.nvrtc + "' has no major";
  if (artifact.entries.size() > kMaxEntries) return "it has too many entries";
  for (const EntryFacts& entry : artifact.entries) {
    if (!is_line_text(entry.name)) return std::string("an entry name") + kBadText;
  }
  if (!is_cuda_elf(artifact.cubin)) return "its code is not a CUDA ELF image";
  return std::nullopt;
}

std::vector<std::byte> encode_artifact(const Artifact& artifact) {
  if (const auto refused = refuse_artifact(artifact)) {
    throw Error(ErrorCode::kInternal,
                "cannot encode artifact '" + artifact.spec + "': " + *refused);
  }
  const std::string footer = footer_text(artifact);
  std::vector<std::byte> file;
  file.reserve(artifact.cubin.size() + footer.size() + kTrailerBytes);
  file.insert(file.end(), artifact.cubin.begin(), artifact.cubin.end());
  const auto append = [&file](std::string_view text) {
    const auto bytes = std::as_bytes(std::span(text.data(), text.size()));
    file.insert(file.end(), bytes.begin(), bytes.end());
  };
  append(footer);
  for (std::size_t i = 0; i < 8; ++i) {
    file.push_back(static_cast<std::byte>(std::uint64_t{footer.size()} >> (8 * i) & 0xff));
  }
  append(kMagic);
  return file;
}

std::optional<Artifact> decode_artifact(std::span<const std::byte> file, std::string& why) {
  const auto refuse = [&why](std::string reason) {
    why = std::move(reason);
    return std::nullopt;
  };
  const std::optional<FileParts> parts = split_file(file, why);
  if (!parts) return std::nullopt;

  FooterReader reader(parts->footer);
  const std::string_view schema = reader.value("treeattn_artifact");
  // Before the digest, whose place and meaning another schema may change.
  if (!reader.failed() && schema != kSchema) {
    return refuse("its schema is '" + std::string(schema.substr(0, 20)) + "', this version reads " +
                  std::string(kSchema));
  }
  if (!footer_digest_matches(parts->footer)) return refuse("its footer fails its sha256");

  Artifact artifact;
  read_fields(reader, artifact);
  const auto cubin_bytes = reader.number<std::uint64_t>("cubin_bytes");
  const std::string cubin_sha256(reader.value("cubin_sha256"));
  reader.value("footer_sha256");
  if (reader.failed()) return refuse(reader.why());
  if (!reader.at_end()) return refuse("its footer has lines that this version does not know");
  if (cubin_bytes != parts->cubin.size()) return refuse("its length is not what its footer says");
  if (cubin_sha256 != to_hex(sha256(parts->cubin))) return refuse("its code fails its sha256");
  artifact.cubin.assign(parts->cubin.begin(), parts->cubin.end());
  if (auto refused = refuse_artifact(artifact)) return refuse(std::move(*refused));
  return artifact;
}

}  // namespace treeattn
