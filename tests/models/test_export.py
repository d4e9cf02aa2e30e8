"""torch.export of small networks of every family: one program for any batch, height and width."""

import pytest
import torch
from torch.export import Dim, export
from torch.testing import assert_close

import glocal

PYRAMID = {"depths": (1, 1), "dims": (8, 16), "num_classes": 3}
STAGES = {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8), "num_classes": 3}
WINDOWS = {**PYRAMID, "num_groups": (2, 2), "kernel_size": 4, "depths": (1, 2)}
VOLO = {"dims": (8, 12), "depths": (1, 1, 1, 1), "num_heads": (2, 2), "stem_dim": 4, "num_classes": 3, "img_size": 48}
FOCAL = {**PYRAMID, "num_heads": (2, 2), "window_size": 3, "expand_size": 1, "focal_windows": (3, 1), "img_size": 64}
LESA = {**STAGES, "num_groups": 2, "img_size": 64}

FAULTS = {
    "models/vit.py": (("a program has one batch", "cls_token.expand(x.shape[0], ", "cls_token.expand(len(x), "),),
    "models/volo.py": (("a program has one batch", "cls_token.expand(x.shape[0], ", "cls_token.expand(len(x), "),),
    "models/parts.py": (
        (
            "a program has one size",
            "h, w = ((n + p - 1) // p for n in x.shape[2:])",
            "h, w = ((int(n) + p - 1) // p for n in x.shape[2:])",
        ),
    ),
}  # fmt: skip


def slow(name, arguments):
    return pytest.param(name, arguments, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny", {"dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32, "num_classes": 3}),
        ("resnet18", PYRAMID),
        ("swin_tiny", {**PYRAMID, "depths": (1, 2), "num_heads": (2, 2), "window_size": 4}),
        ("dwnet_tiny", PYRAMID),
        slow("resnet50", STAGES),
        slow("dwnet_tiny_shared_channels", {**PYRAMID, "kernel_size": 4, "num_groups": (2, 2)}),
        slow("d_dwnet_tiny", PYRAMID),
        slow("i_d_dwnet_tiny", {**PYRAMID, "num_groups": (4, 4)}),
        slow("local_mlp_tiny", WINDOWS),
        slow("local_mlp_tiny_shared_positions", WINDOWS),
        slow("volo_d1", VOLO),
        slow("focal_tiny", FOCAL),
        slow("focal_tiny_paper", FOCAL),
        slow("lesa_resnet50", LESA),
        slow("lesa_resnet50_detection", LESA),
        slow("all_attention_quadratic", {"dim": 8, "depth": 2, "num_heads": 2}),
    ],
)
def test_one_program_for_any_batch_and_size(name, arguments):
    model = glocal.create_model(name, **arguments).eval()
    sizes = {0: Dim("batch", min=1, max=64), 2: Dim.AUTO, 3: Dim.AUTO}
    program = export(model, (torch.randn(2, 3, 48, 64),), dynamic_shapes=(sizes,)).module()
    for size in ((2, 3, 48, 64), (1, 3, 64, 48), (5, 3, 33, 40), (3, 3, 97, 131)):
        image = torch.randn(size)
        with torch.no_grad():
            assert_close(program(image), model(image), rtol=1e-4, atol=1e-5)
