#include "runtime/support/dynamic_library.h"

#include <dlfcn.h>
#include <link.h>

namespace treeattn {

namespace {

std::string resolved_path(void* handle, const std::string& candidate) {
  link_map* map = nullptr;
  if (dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0 && map != nullptr && map->l_name != nullptr &&
      *map->l_name != '\0') {
    return map->l_name;
  }
  return candidate;
}

std::string loader_error() {
  const char* text = dlerror();
  return text != nullptr ? text : "not loaded in this process";
}

}  // namespace

DynamicLibrary::~DynamicLibrary() {
  if (handle_ != nullptr) dlclose(handle_);
}

DynamicLibrary::DynamicLibrary(DynamicLibrary&& other) noexcept
    : handle_(std::exchange(other.handle_, nullptr)),
      path_(std::move(other.path_)),
      failures_(std::move(other.failures_)) {}

DynamicLibrary& DynamicLibrary::operator=(DynamicLibrary&& other) noexcept {
  std::swap(handle_, other.handle_);
  std::swap(path_, other.path_);
  std::swap(failures_, other.failures_);
  return *this;
}

DynamicLibrary DynamicLibrary::open(std::span<const std::string> candidates, Mode mode) {
  DynamicLibrary library;
  // NODELETE keeps the code mapped after dlclose, so destroying this object at exit, after other
  // libraries' destructors, cannot pull functions from under anyone.
  const int flags =
      RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE | (mode == Mode::kOnlyIfLoaded ? RTLD_NOLOAD : 0);
  for (const std::string& candidate : candidates) {
    if (candidate.empty()) {  // dlopen would answer with the program itself
      library.failures_.push_back({candidate, "empty name"});
      continue;
    }
    dlerror();
    if (void* handle = dlopen(candidate.c_str(), flags)) {
      library.handle_ = handle;
      library.path_ = resolved_path(handle, candidate);
      return library;
    }
    library.failures_.push_back({candidate, loader_error()});
  }
  return library;
}

std::string DynamicLibrary::failure_text() const {
  std::string text;
  for (const Failure& failure : failures_) {
    if (!text.empty()) text += '\n';
    // The loader usually opens its own message with the name.
    const bool named = failure.reason.starts_with(failure.candidate + ":");
    text += named ? failure.reason : failure.candidate + ": " + failure.reason;
  }
  return text;
}

void* DynamicLibrary::symbol(const char* name) const {
  return handle_ != nullptr ? dlsym(handle_, name) : nullptr;
}

}  // namespace treeattn
