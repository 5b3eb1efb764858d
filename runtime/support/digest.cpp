#include "runtime/support/digest.h"

#include <sodium.h>

#include <algorithm>

namespace treeattn {

static_assert(sizeof(Digest) == crypto_hash_sha256_BYTES);

struct FieldHasher::State {
  crypto_hash_sha256_state sha;
};

namespace {

const unsigned char* as_bytes(const void* data) {
  return static_cast<const unsigned char*>(data);
}

}  // namespace

Digest sha256(std::span<const std::byte> bytes) {
  Digest digest;
  crypto_hash_sha256(digest.data(), as_bytes(bytes.data()), bytes.size());
  return digest;
}

Digest sha256(std::string_view text) {
  return sha256(std::as_bytes(std::span(text.data(), text.size())));
}

std::string to_hex(const Digest& digest) {
  std::array<char, 2 * sizeof(Digest) + 1> hex{};
  sodium_bin2hex(hex.data(), hex.size(), digest.data(), digest.size());
  return hex.data();
}

std::optional<Digest> digest_from_hex(std::string_view hex) {
  Digest digest;
  const bool lower_case =
      std::all_of(hex.begin(), hex.end(), [](char c) { return c < 'A' || c > 'F'; });
  if (hex.size() != 2 * digest.size() || !lower_case) return std::nullopt;
  std::size_t written = 0;
  const int rc = sodium_hex2bin(digest.data(), digest.size(), hex.data(), hex.size(), nullptr,
                                &written, nullptr);
  if (rc != 0 || written != digest.size()) return std::nullopt;
  return digest;
}

FieldHasher::FieldHasher() : state_(std::make_unique<State>()) {
  crypto_hash_sha256_init(&state_->sha);
}

FieldHasher::~FieldHasher() = default;

FieldHasher& FieldHasher::field(std::string_view text) {
  number(text.size());
  crypto_hash_sha256_update(&state_->sha, as_bytes(text.data()), text.size());
  return *this;
}

FieldHasher& FieldHasher::number(std::uint64_t value) {
  std::array<unsigned char, 8> little_endian;
  for (std::size_t i = 0; i < little_endian.size(); ++i) {
    little_endian[i] = static_cast<unsigned char>(value >> (8 * i));
  }
  crypto_hash_sha256_update(&state_->sha, little_endian.data(), little_endian.size());
  return *this;
}

Digest FieldHasher::finish() {
  Digest digest;
  crypto_hash_sha256_final(&state_->sha, digest.data());
  return digest;
}

}  // namespace treeattn
