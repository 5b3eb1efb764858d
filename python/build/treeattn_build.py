"""scikit-build-core, and NVIDIA's header wheels where there is no CUDA toolkit.

Only types of cuda.h and nvrtc.h are used: neither a compiler nor a driver of CUDA is needed.
"""

from __future__ import annotations

import os
import pathlib
import sys

from scikit_build_core import build as _backend
from scikit_build_core.build import *  # noqa: F403

_WHEELS = ["nvidia-cuda-runtime==13.0.96", "nvidia-cuda-nvrtc==13.0.88"]


def _complete(home: str) -> bool:
    return all((pathlib.Path(home) / "include" / name).exists() for name in ("cuda.h", "nvrtc.h"))


def _toolkit() -> str | None:
    if os.environ.get("TREEATTN_SETUP_IGNORE_SYSTEM_CUDA", "0") == "1":  # as for scripts/setup.sh
        return None
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    return next((home for home in homes if home and _complete(home)), None)


def _use_wheels() -> None:
    """CMake looks into CUDA_HOME; the wheels unpack to a folder like a toolkit's."""
    if _toolkit() is None:
        for folder in sys.path:
            home = os.path.join(folder, "nvidia", "cu13")
            if _complete(home):
                os.environ["CUDA_HOME"] = home
                return


def get_requires_for_build_wheel(config_settings=None):
    wheels = [] if _toolkit() else _WHEELS
    return [*_backend.get_requires_for_build_wheel(config_settings), *wheels]


def get_requires_for_build_editable(config_settings=None):
    wheels = [] if _toolkit() else _WHEELS
    return [*_backend.get_requires_for_build_editable(config_settings), *wheels]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _use_wheels()
    return _backend.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _use_wheels()
    return _backend.build_editable(wheel_directory, config_settings, metadata_directory)
