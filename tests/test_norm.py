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


# planted by scripts/mutate
FAULTS = {
    ("mixers/_norm.py", "test_contract.py -k=empty_batch-DynamicDepthwise"): (
        ("an empty batch makes the statistics NaN", "if x.numel() == 0:", "if False:"),
    ),
    (
        "mixers/_norm.py",
        "mixers/test_dynamic_depthwise_conv.py",
        "mixers/test_inhomogeneous_depthwise_conv.py",
        "test_contract.py",
    ): (
        (
            "running variances are biased",
            "unbiased = variance.detach() * (count / (count - 1))",
            "unbiased = variance.detach()",
        ),
        (
            "training normalises by the unbiased variance",
            "return self._normalise(x, mean, variance)",
            "return self._normalise(x, mean, variance * x[..., 0].numel() / (x[..., 0].numel() - 1))",
        ),
        (
            "without momentum, statistics are the last batch's",
            "share = 1 / self.num_batches_tracked.to(self.running_mean)",
            "share = torch.ones_like(self.running_mean)",
        ),
        ("one value per channel is taken for a batch", "if count == 1:", "if count == 0:"),
        (
            "running variances of padded batches are biased",
            "unbiased = variance.detach() * total / (total - 1).clamp(min=1)",
            "unbiased = variance.detach()",
        ),
    ),
    "mixers/_norm.py": (
        ("a batch of padding alone divides by nothing", "total = count.clamp(min=1)", "total = count"),
        ("a batch of padding alone moves the statistics", "None if valid is None else count > 1)", "None)"),
        (
            "one real value moves the statistics",
            "None if valid is None else count > 1)",
            "None if valid is None else count > 0)",
        ),
        (
            "a synchronised batch norm counts padding, and moves when looked at",
            "if norm.training and (valid is not None or not update):",
            "if False:",
        ),
    ),
}
