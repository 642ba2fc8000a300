"""Builds the CPU kernels; all else is in pyproject.toml. Without a C compiler the install goes on, on torch's kernels."""

import platform

from setuptools import Extension, setup

kernels = Extension(
    "kubeinfer.kernels.cpu._kernels",
    sources=["runtime/kubeinfer/kernels/cpu/kernels.c"],
    # -fopenmp compiles for OpenMP but is not linked: torch's own OpenMP runtime serves the kernels.
    extra_compile_args=["-std=c11", "-O3", "-fopenmp", "-fno-math-errno", "-Wno-psabi"],
    libraries=["m"],
    optional=True,
)
setup(ext_modules=[kernels] if platform.machine() in ("x86_64", "AMD64") else [])
