from setuptools import find_namespace_packages, setup

# Namespace packages, because gspo_ops/kernels and gspo_ops/benchmarks (links to folders at the top
# level) have no __init__.py: a top-level package `kernels` would hide Hugging Face's of that name.
setup(packages=find_namespace_packages(include=["gspo_ops", "gspo_ops.*"]))
