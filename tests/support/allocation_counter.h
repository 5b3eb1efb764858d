// Counts calls of operator new on the calling thread. A test program that uses it has the global
// operators replaced.
#pragma once

#include <functional>

namespace treeattn::test {

long count_allocations(const std::function<void()>& body);

}  // namespace treeattn::test
