"""What the tests of Backbone share: small ones, with nothing at zero or one, of every operator."""

import torch

import glocal
from glocal.backbone import Backbone


def backbone(layout="C-C-T-T", **options):
    return Backbone(layout, **({"in_chans": 1, "num_classes": 5, "img_size": 24} | options))


def entry(operator):
    """The operator's name alone where it has what it needs and keeps the grid, else its first example."""
    try:
        mixer = glocal.build(operator, 64, rank=2, grid_size=(8, 8))
    except ValueError:
        mixer = None
    kept = mixer is not None and (not hasattr(mixer, "out_grid") or tuple(mixer.out_grid((8, 8))) == (8, 8))
    return operator if kept else getattr(glocal.mixers, operator).examples[0]


NO_ENTRIES = {"CrossAttention": "reads a source besides", "ClassAttention": "makes a grid of"}


def random(net):
    """In float64, with every parameter and statistic random."""
    net = net.double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in net.named_buffers():
            if name.endswith("var"):
                buffer.uniform_(0.5, 1.5)
            elif buffer.is_floating_point():
                buffer.normal_(std=0.3)
    return net
