#include "tests/support/allocation_counter.h"

#include <cstdlib>
#include <new>

namespace treeattn::test {
namespace {

thread_local bool counting = false;
thread_local long allocations = 0;

}  // namespace

long count_allocations(const std::function<void()>& body) {
  allocations = 0;
  counting = true;
  body();
  counting = false;
  return allocations;
}

}  // namespace treeattn::test

void* operator new(std::size_t bytes) {
  if (treeattn::test::counting) ++treeattn::test::allocations;
  if (void* p = std::malloc(bytes)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept {
  std::free(p);
}
void operator delete(void* p, std::size_t) noexcept {
  std::free(p);
}
