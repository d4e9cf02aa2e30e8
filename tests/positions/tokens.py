"""Tokens and masks that the tests of encodings share."""

import torch

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def float64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def corner_valid(grid, *extents):
    """Masks of images of these sizes, padded at their ends."""
    valid = torch.zeros(len(extents), *grid, dtype=torch.bool)
    for mask, extent in zip(valid, extents, strict=True):
        mask[tuple(slice(n) for n in extent)] = True
    return valid
