#!/usr/bin/env bash
# Runs test files of the Python package with the first Python that has pytest. TREEATTN_TEST_PYTHON names one.
set -euo pipefail
folder="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
for python in "${TREEATTN_TEST_PYTHON:-}" "$folder/../../.venv-python/bin/python" python3; do
  if [ -n "$python" ] && "$python" -c 'import pytest' 2>/dev/null; then
    exec "$python" "$folder/run.py" "$@"
  fi
done
echo "skipped: no Python with pytest was found; scripts/setup.sh --python makes one in .venv-python"
exit 77
