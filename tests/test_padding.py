"""A sequence's output does not depend on how far it is padded, nor on what else is in its batch."""

import pytest
import torch

import glocal
from glocal import contract

LENGTH = 9
AMOUNTS = (0, 1, 2, 5, 12)
# operators that may be padded in front, as translation models do: nothing in them counts from the first token
ANYWHERE = (
    *("CrossAttention", "DepthwiseConv", "DynamicConv", "LightweightConv", "LinearAttention"),
    *("MultiScaleAttention", "NeighborhoodAttention", "SelfAttention"),
)


def padded_by(x, amount, front):
    """The sequence [1, T, C], padded with large random tokens, beside one that fills the length."""
    batch = 100 * torch.randn(2, x.shape[1] + amount, x.shape[2], dtype=x.dtype)
    valid = torch.ones(batch.shape[:2], dtype=torch.bool)
    start = amount if front else 0
    batch[0, start : start + x.shape[1]] = x[0]
    valid[0] = False
    valid[0, start : start + x.shape[1]] = True
    return batch, valid, start


@pytest.mark.parametrize("front", [False, True])
def test_any_amount_of_padding_gives_the_same(front, record_property):
    """Every operator that runs in 1-D, both paths; the largest difference, relative to the largest entry."""
    differences, refused = {}, {}
    for spec in contract.examples():
        name = spec.partition("(")[0]
        if not contract.fits(spec, (LENGTH,)) or (front and name not in ANYWHERE):
            continue
        mixer = glocal.build(spec, contract.DIM).double().eval()
        x = torch.randn(1, LENGTH, contract.DIM, dtype=torch.float64)
        for path in (mixer, mixer.reference):
            alone = path(x, **mixer.besides(x))[0]
            for amount in AMOUNTS:
                batch, valid, start = padded_by(x, amount, front)
                try:
                    out = path(batch, valid=valid, **mixer.besides(batch))[0]
                except ValueError as error:
                    refused[spec] = str(error)
                    continue
                error = (out[start : start + len(alone)] - alone).abs().max() / alone.abs().max()
                differences[spec] = max(differences.get(spec, 0.0), error.item())
    assert len(differences) >= (10 if front else 30)
    assert not differences.keys() & refused.keys()
    for spec, said in refused.items():
        assert "padding" in said, f"{spec}: {said}"
    worst = max(differences, key=differences.get)
    record_property("difference", differences[worst])
    assert differences[worst] <= 1e-12, f"{worst} differs by {differences[worst]:.1e}"
    print(f"largest difference: {differences[worst]:.1e}, {worst}; refused: {sorted(refused)}")
