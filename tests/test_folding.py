"""1x1 convolutions with the norms around them, or a gate, folded in: against the modules called one by one."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from glocal.blocks import MBConv
from glocal.folding import can_join, gated_map, normed_map, unwatched

FAULTS = (
    ("tokens are not centred", "tokens = tokens - mean", "tokens = tokens - 0 * mean"),
    ("the covariance is that of a sample", "@ tokens / len(tokens)", "@ tokens / (len(tokens) - 1)"),
    ("channels are taken to be independent", "((between @ covariance) * between)", "(between**2 * variance)"),
    ("the norms' eps change places", "(out_variance + second.eps).rsqrt()", "(out_variance + first.eps).rsqrt()"),
    ("running variances are those of the batch", "variance * (count / (count - 1))", "variance"),
    ("the second norm's running mean stays", "    _move(second, out_mean", "    _move(second, 0 * out_mean"),
    ("batches are not counted", "norm.num_batches_tracked.add_(1)", "pass"),
    ("the first norm's bias has no gradient", "second.bias + 0 * out_mean", "second.bias"),
    ("in evaluation the first norm's bias is lost", "(first.bias - mean * scale)", "(-mean * scale)"),
    ("in evaluation the second norm's bias is lost", "* out_scale + second.bias", "* out_scale"),
    ("gates are those of the first image", "gate[:, None]", "gate[:1, None]"),
    ("hooks in front are not seen", "part._forward_hooks or part._forward_pre_hooks", "part._forward_hooks"),
    ("norms of another kind are joined", "type(n) is not nn.BatchNorm2d or not", "not"),
    ("a frozen norm is joined with one that is not", "first.training == second.training and", "True and"),
    ("a single token has a variance", "x[..., 0].numel() > 1", "True"),
    ("lower precisions are joined", "x.dtype in (torch.float32, torch.float64)", "True"),
    ("autocast is forgotten", "or torch.is_autocast_enabled(x.device.type)", ""),
    ("strides are lost", "conv.stride != (1, 1)", "False"),
    ("calls that are replaced are not seen", '"forward" in vars(part)', "False"),
    ("statistics that stay move", "not n.track_running_stats or", ""),
    ("batches that are not counted are missing", "or n.num_batches_tracked is None for", "for"),
    ("an empty batch has no channels", "len(conv.weight))", "-1)"),
)  # fmt: skip


def parts(dim=6, out_dim=9):
    """Two batch norms and the convolution between them, every number in them its own."""
    torch.manual_seed(0)
    made = nn.BatchNorm2d(dim, eps=1e-2), nn.Conv2d(dim, out_dim, 1, bias=False), nn.BatchNorm2d(out_dim, eps=0.5)
    for norm in (made[0], made[2]):
        with torch.no_grad():
            norm.weight.normal_()
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    made[2].momentum = 0.3
    return nn.ModuleList(made).double()


def one_by_one(modules, x):
    x = x.movedim(-1, 1)
    for module in modules:
        x = module(x)
    return x.movedim(1, -1)


@pytest.mark.parametrize("training", [True, False])
def test_norms_around_a_convolution(training):
    ours = parts().train(training)
    theirs, x = copy.deepcopy(ours), torch.randn(3, 4, 5, 6, dtype=torch.float64) * 3 + 7
    found = []
    for model, call in ((ours, lambda modules, x: normed_map(*modules, x)), (theirs, one_by_one)):
        x = x.detach().requires_grad_()
        y = call(model, x)
        y.sin().sum().backward()
        found.append([y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    assert_close(found[0], found[1])


def test_second_derivatives():
    modules = parts().train()
    x = torch.randn(2, 2, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: normed_map(*modules, x), x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out_dim", [4, 6])
def test_gate_in_front_of_a_convolution(bias, out_dim):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, out_dim, 1, bias=bias).double()
    x, gate = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    expected = conv(x.movedim(-1, 1) * gate[..., None, None]).movedim(1, -1)
    assert_close(gated_map(conv, x, gate), expected)


def test_what_is_joined():
    first, conv, second = parts()
    x = torch.randn(2, 3, 3, 6, dtype=torch.float64)
    assert can_join(first, conv, second, x) and can_join(first, conv, second, x.float())
    assert not can_join(first, conv, second, x.bfloat16())
    assert not can_join(first, conv, second, x[:1, :1, :1])
    assert not can_join(first, conv, second, x.to("meta"))  # where autocast cannot be asked for
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_join(first, conv, second, x)
    assert not can_join(first, nn.Conv2d(6, 9, 1, bias=True), second, x)
    assert not can_join(first, nn.Conv2d(6, 9, 1, stride=2, bias=False), second, x)
    assert not can_join(nn.SyncBatchNorm(6), conv, second, x)
    for other in (nn.BatchNorm2d(9, affine=False), nn.BatchNorm2d(9, track_running_stats=False)):
        assert not can_join(first, conv, other, x)
    assert not can_join(first, conv, nn.BatchNorm2d(9, momentum=None), x)
    assert not can_join(first.eval(), conv, second, x) and can_join(first, conv, second.eval(), x)


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_are_called(register):
    """A part that is watched is called; of the others nothing changes."""
    block = MBConv(4, 8).train()
    x, calls = torch.randn(2, 4, 4, 4), []
    expected = copy.deepcopy(block)(x)
    for part in (block.conv1_1x1, block.conv3_1x1, block.norm1, block.se):
        assert unwatched(part)
        getattr(part, register)(lambda *_: calls.append(1))
        assert not unwatched(part)
    found = block(x.requires_grad_())
    found.sum().backward()
    assert len(calls) == 4
    assert_close(found, expected)


@pytest.mark.parametrize("valid", [False, True])
def test_a_block_is_what_its_parts_are(valid):
    """Joined, and called one by one since its convolutions are watched; gradients and statistics as well."""
    torch.manual_seed(0)
    block = MBConv(6, 8, stride=2, stride_in="depthwise").double().train()
    other, x = copy.deepcopy(block), torch.randn(3, 9, 8, 6, dtype=torch.float64)
    other.conv1_1x1.register_forward_hook(lambda *_: None)
    other.conv3_1x1.register_forward_hook(lambda *_: None)
    real = torch.ones(3, 9, 8, dtype=torch.bool) if valid else None
    found = []
    for model in (block, other):
        y = model(x, real)
        y.sin().sum().backward()
        found.append([y, *(p.grad for p in model.parameters()), *model.buffers()])
    assert_close(found[0], found[1])


def test_replaced_calls_happen():
    """As accelerate replaces them, to bring weights from elsewhere."""
    block, calls = MBConv(4, 8).eval(), []
    for part in (block.pre_norm, block.conv1_1x1, block.conv3_1x1, block.se):
        own = part.forward
        part.forward = lambda *call, own=own: (calls.append(1), own(*call))[1]
    block(torch.randn(2, 4, 4, 4))
    assert len(calls) == 4


@pytest.mark.parametrize("counted", [True, False])
def test_statistics_that_were_told_to_stay(counted):
    """And those of a norm that does not count its batches, which move."""
    block = MBConv(4, 8).train()
    block.norm1.track_running_stats = not counted
    if not counted:
        block.norm1.num_batches_tracked = None
    before, x = block.norm1.running_var.clone(), torch.randn(2, 4, 4, 4)
    block(x)
    assert torch.equal(block.norm1.running_var, before) == counted


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_nothing(training):
    assert MBConv(4, 8).train(training)(torch.zeros(0, 4, 4, 4)).shape == (0, 4, 4, 8)
