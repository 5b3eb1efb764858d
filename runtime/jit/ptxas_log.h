// Reads what ptxas reports about each kernel out of a compile log. Pure; never throws on odd text.
#pragma once

#include <string_view>
#include <vector>

#include "runtime/cache/artifact.h"

namespace treeattn {

/// Fills registers, spills, stack and static shared memory of the entries that the log names;
/// others keep their values. Returns how many entries it named.
int read_ptxas_log(std::string_view log, std::vector<EntryFacts>& entries);

/// The line where ptxas says that it serialised wgmma (C7510, C7512 and others, by their cause) or
/// ignored setmaxnreg (C7508): the kernel would run, at a fraction of its speed. Empty if there is
/// none.
std::string_view find_performance_warning(std::string_view log);

}  // namespace treeattn
