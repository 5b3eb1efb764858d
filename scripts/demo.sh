#!/usr/bin/env bash
# Sets up, builds and runs the demo: on the GPU if there is one, else on the CPU executor, with the kernels
# generated and compiled by NVRTC either way. Arguments go to `treeattn demo`.
set -euo pipefail
scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
"$scripts/build.sh" release --target treeattn_cli
exec "$scripts/run.sh" demo "$@"
