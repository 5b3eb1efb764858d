#!/usr/bin/env bash
# Sets up, configures and builds a preset (default: release). Further arguments go to cmake --build.
set -euo pipefail
scripts="$(dirname "${BASH_SOURCE[0]}")"
"$scripts/setup.sh"
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"
use_cuda
preset="${1:-release}"
configure "$preset"
build_preset "$preset" "${@:2}"
