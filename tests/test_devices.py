"""Operators and networks on a device that is not there: nothing stays on the CPU, and nothing is read back.

Fake tensors know their device and no numbers: tensors of two devices, or a number that is asked for, are an error. On a
real device to ask for a number is to wait for all that was queued.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import glocal
from glocal import contract
from glocal.kernels import gpu

FAULTS = {
    "mixers/_quadratic.py": [
        ("offsets are made on the CPU", "axis_offsets(n, x.device,", 'axis_offsets(n, torch.device("cpu"),'),
        (
            "a spread is read to decide",
            "        grid, centres, spreads = x.shape",
            "        assert self.attention_centers.isfinite().all().item()\n        grid, centres, spreads = x.shape",
        ),
    ],
}
CUDNN = ("GRU", "LSTM")  # PyTorch asks the device before cuDNN computes
MODELS = (
    *("swin_tiny", "dwnet_tiny", "d_dwnet_tiny", "i_d_dwnet_tiny", "local_mlp_tiny", "coatnet_0", "volo_d1"),
    *("focal_tiny", "vit_small", "resnet50", "lesa_resnet50", "deformable_resnet50", "all_attention_quadratic"),
    *("all_attention_learned_content", "all_attention_generalized"),
)


@pytest.fixture(autouse=True)
def _a_recent_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "_recent", lambda device: True)


def moved(module):
    """What module.cuda() does, which fake tensors do not support."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, device="cuda")
                part._parameters[name] = nn.Parameter(empty, requires_grad=value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    return module


def tokens(spec, grid):
    given = {}
    if spec.startswith("CrossAttention"):
        given["source"] = torch.randn(2, 5, glocal.build(spec, contract.DIM).source_dim, device="cuda")
    return torch.randn(2, *grid, contract.DIM, device="cuda"), given


@pytest.mark.parametrize("spec", [s for s in contract.examples() if not s.startswith(CUDNN)])
def test_operators(spec, monkeypatch):
    grid = (13, 7) if contract.fits(spec, (13, 7)) else (21,)
    mixer = glocal.build(spec, contract.DIM)
    with FakeTensorMode(allow_non_fake_inputs=False):
        x, given = tokens(spec, grid)
        moved(mixer)
        for path in (mixer, mixer.reference):
            assert path(x, **given).device.type == "cuda"
        # whether each image's real tokens are a rectangle is looked at, and waited for
        monkeypatch.setattr(torch, "equal", lambda a, b: True)
        valid = torch.ones(given.get("source", x).shape[:-1], dtype=torch.bool, device="cuda")
        try:
            out = mixer(x, valid=valid, **given)
        except ValueError as refused:
            assert "valid was given" in str(refused)
        else:
            assert out.device.type == "cuda"


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model = glocal.create_model(name)
    side = 32 if name.startswith("all_attention") else 224
    with FakeTensorMode():
        moved(model)
        for training in (False, True):
            out = model.train(training)(torch.randn(2, 3, side, side, device="cuda"))
            assert (out[0] if isinstance(out, tuple) else out).device.type == "cuda"
