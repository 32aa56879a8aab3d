from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

# `gspo-ops bench` needs these modules. The others make the repository's tables, from a checkout.
BENCH = {"bench", "clip_error", "measure", "plots", "providers", "updates", "workloads"}


class BuildPy(build_py):
    """A build without the modules of gspo_ops.benchmarks that are of use only in a checkout."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [m for m in modules if package != "gspo_ops.benchmarks" or m[1] in BENCH]


# These are namespace packages, because gspo_ops/kernels and gspo_ops/benchmarks (links to top-level
# folders) have no __init__.py: a top-level package `kernels` would hide Hugging Face's `kernels`.
setup(
    packages=find_namespace_packages(include=["gspo_ops", "gspo_ops.*"]),
    cmdclass={"build_py": BuildPy},
)
