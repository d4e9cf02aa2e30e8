"""Batch norms of operators: padding does not count, and statistics move only where a batch has any."""

import pytest
import torch
from torch import nn

import glocal


@pytest.mark.parametrize("name", ["DynamicDepthwiseConv", "InhomogeneousDepthwiseConv"])
def test_a_batch_of_padding_alone_moves_no_statistics(name):
    m = glocal.build(f"{name}(kernel_size=3)", 32).train()
    out = m(torch.randn(2, 8, 8, 32), valid=torch.zeros(2, 8, 8, dtype=torch.bool))
    assert out.isfinite().all()
    assert torch.equal(m.bn.running_mean, torch.zeros(8))
    assert torch.equal(m.bn.running_var, torch.ones(8))


@pytest.mark.parametrize("name", ["DynamicDepthwiseConv", "InhomogeneousDepthwiseConv"])
def test_converted_to_synchronised_batch_norm(name):
    m = glocal.build(f"{name}(kernel_size=3)", 32).eval()
    x = torch.randn(2, 8, 8, 32)
    expected = m(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(m)
    assert isinstance(converted.bn, nn.SyncBatchNorm)
    torch.testing.assert_close(converted(x), expected)
    with pytest.raises(ValueError, match="SyncBatchNorm: in training"):
        converted.train().weights(x)


@pytest.mark.parametrize(
    ("name", "real"),
    [
        ("DynamicDepthwiseConv", (1, slice(None), slice(None))),  # pools each image: one value
        ("InhomogeneousDepthwiseConv", (1, 2, 0)),
    ],
)
def test_one_real_value_moves_no_statistics(name, real):
    """Its variance says nothing; two values have one."""
    mixer = glocal.build(f"{name}(kernel_size=3, reduction=4)", 32).train()
    valid = torch.zeros(3, 4, 5, dtype=torch.bool)
    valid[real] = True
    assert mixer(torch.randn(3, 4, 5, 32), valid=valid).isfinite().all()
    assert torch.equal(mixer.bn.running_mean, torch.zeros(8))
    assert torch.equal(mixer.bn.running_var, torch.ones(8))
    valid[(2, *real[1:])] = True
    mixer(torch.randn(3, 4, 5, 32), valid=valid)
    assert not torch.allclose(mixer.bn.running_mean, torch.zeros(8))
    assert not torch.allclose(mixer.bn.running_var, torch.ones(8))
