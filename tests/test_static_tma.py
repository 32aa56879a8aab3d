"""The choice of products by kernels that copy boxes (TMA), tested without a GPU."""

import importlib.util

import pytest
import torch

from gspo_ops.backend import has_tma


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [
        ((8, 0), None, [False, False]),
        ((9, 0), None, [True, True]),
        ((10, 0), None, [True, False]),
        ((10, 3), None, [True, False]),
        ((12, 0), None, [False, False]),  # 99 KB of shared memory
        ((9, 4), "6.4", [False, False]),  # gfx942 reports the capability of an sm_94
    ],
)
def test_gpus_that_have_what_boxes_need(capability, hip, expected, monkeypatch):
    """has_tma is right for each GPU, without and with a soft cap."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert [has_tma(torch.device("cuda"), capped) for capped in (False, True)] == expected
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not has_tma(torch.device("cuda"), False)  # as with Triton before 3.4


def test_cpus_have_no_boxes():
    assert not has_tma(torch.device("cpu"), False)
