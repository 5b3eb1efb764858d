// The parts of a source that no template can hold: what depends on the spec. Pure text.
#pragma once

#include <string>

#include "generator/kernel_spec.h"

namespace treeattn {

/// Comment block that opens every source: spec, launch shape and how to compile it by hand.
std::string emit_banner(const KernelSpec& spec, const std::string& launch);
/// `kConfig` of a forward kernel, with what the host computed from the same definition asserted.
std::string emit_forward_config(const KernelSpec& spec);
std::string emit_forward_sm90_config(const KernelSpec& spec);
/// The same of a backward kernel.
std::string emit_backward_config(const KernelSpec& spec);
std::string emit_backward_sm90_config(const KernelSpec& spec);
std::string emit_backward_dq_config(const KernelSpec& spec);
/// The wgmma shapes of a forward or a backward kernel of the sm90 family.
std::string emit_wgmma(const KernelSpec& spec);
std::string emit_backward_wgmma(const KernelSpec& spec);
/// The MMA and conversion instructions of the spec's dtype.
std::string emit_mma(const KernelSpec& spec);

}  // namespace treeattn
