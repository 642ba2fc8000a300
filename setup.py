"""Builds the CPU kernels; all else is in pyproject.toml. Without a C compiler the install goes on, on torch's kernels."""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("runtime/kubeinfer/kernels/cpu")


def variant(name: str, folder: str) -> Extension:
    """The kernels over the vectors of a folder."""
    return Extension(
        f"kubeinfer.kernels.cpu.{name}",
        sources=sorted(str(path) for path in SOURCES.glob("*.c")),
        depends=sorted(str(path) for path in (*SOURCES.glob("*.h"), *SOURCES.glob(f"{folder}/*.h"))),
        include_dirs=[str(SOURCES / folder)],
        # -fopenmp compiles for OpenMP but is not linked: torch's own OpenMP runtime serves the kernels.
        extra_compile_args=["-std=gnu11", "-O3", "-fopenmp", "-fno-math-errno", "-Wno-psabi"],
        libraries=["m"],
        optional=True,
    )


class BuildVariants(build_ext):
    """Each variant's object files in a folder of its own: they come from the same sources."""

    def build_extension(self, ext: Extension) -> None:
        together = self.build_temp
        self.build_temp = str(Path(together) / ext.name)
        super().build_extension(ext)
        self.build_temp = together


kernels = [variant("_kernels", "avx512"), variant("_kernels_avx2", "avx2")]
setup(
    ext_modules=kernels if platform.machine() in ("x86_64", "AMD64") else [],
    cmdclass={"build_ext": BuildVariants},
)
