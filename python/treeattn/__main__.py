"""The command line that came with the package: treeattn doctor, or python -m treeattn doctor."""

from __future__ import annotations

import os
import pathlib
import sys

from . import _native


def main() -> None:
    program = pathlib.Path(__file__).parent / "bin" / "treeattn"
    if not program.exists():
        sys.exit(
            f"error: {program} was not built, because CLI11 and nlohmann-json were not found; "
            "install libcli11-dev and nlohmann-json3-dev and the package again"
        )
    _native.name_nvrtc()
    os.execv(program, [str(program), *sys.argv[1:]])


if __name__ == "__main__":
    main()
