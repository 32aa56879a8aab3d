from setuptools import find_namespace_packages, setup

# Namespace packages, because gspo_ops/kernels (a link to kernels/) has no __init__.py: a top-level
# package `kernels` would hide Hugging Face's package of that name.
setup(packages=find_namespace_packages(include=["gspo_ops", "gspo_ops.*"]))
