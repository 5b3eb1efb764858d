// SHA-256 (libsodium) and an injective encoding of fields for content keys.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace treeattn {

using Digest = std::array<std::uint8_t, 32>;

Digest sha256(std::span<const std::byte> bytes);
Digest sha256(std::string_view text);

/// 64 lower-case digits.
std::string to_hex(const Digest& digest);
/// Inverse of to_hex; upper case is refused so that a digest has one text.
std::optional<Digest> digest_from_hex(std::string_view hex);

/// Digests a sequence of fields, each preceded by its length, so that no two different sequences
/// feed the same bytes ("ab" + "c" is not "a" + "bc"). Not thread-safe.
class FieldHasher {
 public:
  FieldHasher();
  ~FieldHasher();
  FieldHasher(const FieldHasher&) = delete;
  FieldHasher& operator=(const FieldHasher&) = delete;

  FieldHasher& field(std::string_view text);
  /// A number on its own: the count that must precede a list of fields.
  FieldHasher& number(std::uint64_t value);
  /// Call once, at the end.
  Digest finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace treeattn
