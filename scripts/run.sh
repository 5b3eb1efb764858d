#!/usr/bin/env bash
# The built command line with the NVRTC that scripts/setup.sh found: scripts/run.sh doctor
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
use_cuda
program="$treeattn_root/build/bin/treeattn"
[ -x "$program" ] || die "$program is not built yet; run scripts/build.sh"
cd "$OLDPWD"
exec "$program" "$@"
