import contextlib
import os

import pytest
import torch

with contextlib.suppress(ImportError):
    # Inductor imports it, and it refuses once something else has imported Python's own distutils.
    import setuptools  # noqa: F401

from gspo_ops import testing

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    testing.patch_interpreter()


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, so that the same tests run the compiled kernels."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
