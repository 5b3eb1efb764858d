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
            "error: this package was installed without the command line; install it again with "
            "pip install . --config-settings=cmake.define.TREEATTN_BUILD_CLI=ON"
        )
    _native.name_nvrtc()
    os.execv(program, [str(program), *sys.argv[1:]])


if __name__ == "__main__":
    main()
