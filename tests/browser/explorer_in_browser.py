"""What tests of the explorer's page share: a layer of every kind, pointing, what is shown, and the same by PyTorch."""

import dataclasses
import functools
import io

import numpy as np
import torch
from PIL import Image
from torch import nn

import glocal

GRID, IMAGES = (5, 6), 3


class Net(nn.Module):
    """One layer of every kind that a page treats differently."""

    def __init__(self):
        super().__init__()
        self.content = glocal.build("SelfAttention(num_heads=3)", 24)
        self.both = glocal.build("RelativeAttention(grid_size=(5, 6), num_heads=2)", 24)
        self.places = glocal.build("QuadraticAttention(num_heads=4)", 24)
        self.conv = glocal.build("DepthwiseConv(kernel_size=3)", 48)
        self.window = glocal.build("WindowAttention(window_size=3, shift_size=1, num_heads=2)", 24)
        self.pooled = glocal.build("SpatialReductionAttention(num_heads=2, sr_ratio=2)", 24)
        self.strided = glocal.build("Convolution(kernel_size=3, stride=2)", 24)
        for parameter in self.parameters():
            parameter.data.add_(0.5 * torch.randn_like(parameter))
        self.own = glocal.build("InhomogeneousDepthwiseConv(kernel_size=3, num_groups=4)", 24)
        with torch.random.fork_rng():
            self.gated = glocal.build("GatedPaddedAttention(padding=1, encoding='learned', head_dim=8)", 24)
            self.mixture = glocal.build("GatedPositionalAttention(num_heads=2)", 24)
            for parameter in (*self.gated.parameters(), *self.mixture.parameters()):
                parameter.data.add_(0.5 * torch.randn_like(parameter))

    def forward(self, x):
        self.content(torch.cat([x.mean((1, 2))[:, None], x.flatten(1, 2)], 1), grid=GRID)
        self.both(x), self.places(x), self.conv(torch.cat([x, -x], -1)), self.window(x), self.pooled(x)
        return self.strided(x), self.own(x), self.gated(x), self.mixture(x)


def png(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 36, 3), np.uint8)).save(file, "png")
    return file.getvalue()


def settled(page):
    """Waits for what was asked for to be drawn."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def point_at(page, row, column, grid=GRID):
    box = page.locator("#ground").bounding_box()
    page.mouse.move(
        box["x"] + (column + 0.5) / grid[1] * box["width"], box["y"] + (row + 0.5) / grid[0] * box["height"]
    )
    settled(page)


def shown(page, layer, head):
    """The numbers drawn, NaN where nothing is; None if nothing is drawn of the layer."""
    script = "([l, h]) => { const s = explorer.shown(l, h); return [s.query, s.values && s.values.map(String)]; }"
    found = page.evaluate(script, [layer, head])
    return found[0], None if found[1] is None else np.array([float(v.replace("NaN", "nan")) for v in found[1]])


@functools.cache
def weights_of(call):
    return call.weights()


@functools.cache
def scores_of(call):
    return call.scores()


def expected(call, image, head, query, terms="both"):
    """By torch, from the mixer itself; None where it has no such term."""
    if terms != "both" and (parts := call.parts()):
        dense = dataclasses.replace(weights_of(call), weights=parts[terms][1]).dense().detach().double()
        return dense[min(image, len(dense) - 1), head, query].numpy()
    if terms != "both":
        scores = scores_of(call)
        if not scores:
            terms = "both"
        elif terms not in scores:
            return None
        else:
            term = scores[terms]
            index = weights_of(call).index
            term, seen = torch.broadcast_tensors(term, weights_of(call).weights > 0)
            row = term.masked_fill(~seen, -torch.inf).softmax(-1)
            row = row[min(image, len(row) - 1), head, query].detach().double()
            if index is None:
                return row.numpy()
            index = index[min(image, len(index) - 1), 0, query]
            full = torch.zeros(weights_of(call).num_sources + 1, dtype=torch.float64)
            return full.index_add(0, torch.where(index < 0, len(full) - 1, index), row)[:-1].numpy()
    dense = weights_of(call).dense().detach().double()
    if call.name == "strided":  # its taps, by the norm of what they learned
        norms = call.mixer.weight.detach().double().flatten(2).norm(dim=(0, 1))
        return torch.einsum("k,km->m", norms / norms.sum(), dense[0, :, query]).numpy()
    return dense[min(image, len(dense) - 1), min(head, dense.shape[1] - 1), query].numpy()


def assert_shown(page, calls, image, row, column, terms="both"):
    """All layers show the weights of the token at this place of a 5 x 6 grid."""
    for layer, call in enumerate(calls):
        query = 1 + row * 6 + column if call.name == "content" else row * 6 + column
        if call.name == "strided":
            query = int((row + 0.5) / 5 * 3) * 3 + int((column + 0.5) / 6 * 3)  # a grid of 3 x 3 over the same image
        for head in range(1 if call.name == "strided" else min(weights_of(call).num_groups, 3)):
            number, values = shown(page, layer, head)
            should = expected(call, image, head, query, terms)
            assert (values is None) == (should is None), call.name
            if values is not None:
                assert number == query
                assert np.abs(np.nan_to_num(values) - should).max() <= np.abs(should).max() / 128 + 1e-9, call.name
