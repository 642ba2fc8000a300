"""Builds the CPU kernels; all else is in pyproject.toml. Without a C compiler the install goes on, on torch's kernels."""

import platform
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("runtime/kubeinfer/kernels/cpu")

kernels = Extension(
    "kubeinfer.kernels.cpu._kernels",
    sources=sorted(str(path) for path in SOURCES.glob("*.c")),
    depends=sorted(str(path) for path in SOURCES.glob("*.h")),
    # -fopenmp compiles for OpenMP but is not linked: torch's own OpenMP runtime serves the kernels.
    extra_compile_args=["-std=gnu11", "-O3", "-fopenmp", "-fno-math-errno", "-Wno-psabi"],
    libraries=["m"],
    optional=True,
)
setup(ext_modules=[kernels] if platform.machine() in ("x86_64", "AMD64") else [])
