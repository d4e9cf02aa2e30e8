"""LargeKernelConv against torch's convolution and batch norm, and against the one kernel it merges into."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import glocal

DIM = 4


def by_torch(mixer, kernels):
    """conv_nd with explicit zeros on both sides, then batch_norm, for each branch; statistics of copies move."""
    names = ("lkb_origin", "small_conv")[: len(kernels)]
    parameters = dict(mixer.named_parameters())
    statistics = {name: buffer.clone() for name, buffer in mixer.named_buffers()}

    def oracle(x):
        rank = x.dim() - 2
        conv = {1: F.conv1d, 2: F.conv2d}[rank]
        y = 0
        for name, kernel in zip(names, kernels, strict=True):
            zeros = [k // 2 for k in reversed(kernel) for _ in range(2)]
            planes = F.pad(x.movedim(-1, 1).contiguous(), zeros)
            one = conv(planes, parameters[f"{name}.conv.weight"], stride=mixer.stride, groups=DIM)
            y = y + F.batch_norm(
                one,
                statistics[f"{name}.bn.running_mean"],
                statistics[f"{name}.bn.running_var"],
                parameters[f"{name}.bn.weight"],
                parameters[f"{name}.bn.bias"],
                training=mixer.training,
            )
        return y.movedim(1, -1)

    oracle.statistics = statistics
    return oracle


CASES = [  # arguments, kernels, grid
    ("kernel_size=7", [(7, 7), (5, 5)], (6, 9)),
    ("kernel_size=13, small_kernel=3", [(13, 13), (3, 3)], (4, 8)),
    ("kernel_size=(5, 9), small_kernel=(1, 3), stride=2", [(5, 9), (1, 3)], (7, 6)),
    ("kernel_size=(9, 3), small_kernel=(5, 3), stride=3", [(9, 3), (5, 3)], (8, 5)),
    ("kernel_size=9, small_kernel=None", [(9, 9)], (5, 3)),
    ("kernel_size=5", [(5, 5), (5, 5)], (3, 4)),
    ("", [(31, 31), (5, 5)], (3, 2)),
    ("kernel_size=11, small_kernel=3, stride=2, rank=1", [(11,), (3,)], (8,)),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("arguments", "kernels", "grid"), CASES)
def test_is_convolution_and_batch_norm(build, check, tokens, arguments, kernels, grid, training):
    mixer = build(f"LargeKernelConv({arguments})", DIM).train(training)
    check(mixer, by_torch(mixer, kernels), tokens(3, *grid, DIM))


@pytest.mark.parametrize(("arguments", "kernels", "grid"), [CASES[0], CASES[2], CASES[7]])
def test_a_call_moves_the_statistics_as_batch_norm_does(build, tokens, arguments, kernels, grid):
    mixer = build(f"LargeKernelConv({arguments})", DIM).train()
    oracle, x = by_torch(mixer, kernels), tokens(3, *grid, DIM)
    before = {name: buffer.clone() for name, buffer in mixer.named_buffers()}
    mixer.mix(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in mixer.named_buffers())
    oracle(x)
    mixer(x)
    for name, buffer in mixer.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == before[name] + 1
        else:
            assert not torch.allclose(buffer, before[name])
            expected = oracle.statistics[name]
            assert_close(buffer, expected, rtol=1e-14, atol=1e-14, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("arguments", "kernels", "grid"), CASES)
def test_merged_is_the_same(build, tokens, arguments, kernels, grid):
    mixer = build(f"LargeKernelConv({arguments})", DIM)
    one, x = mixer.merged(), tokens(3, *grid, DIM)
    assert repr(one).startswith("DepthwiseConv(") and not one.training
    assert one.weight.shape[2:] == kernels[0]
    assert_close(one(x), mixer(x), rtol=0, atol=1e-12)
    with torch.no_grad():
        one.weight.zero_()  # a copy: the parts live on
    assert mixer.lkb_origin.conv.weight.abs().min() > 0


def test_merged_keeps_precision_and_mode():
    mixer = glocal.build("LargeKernelConv(kernel_size=7)", DIM).train()
    one = mixer.merged()
    assert one.training and one.weight.dtype == torch.float32 and one.weight.requires_grad
    mixer.eval()
    x = torch.randn(2, 5, 6, DIM)
    assert_close(mixer.merged()(x), mixer(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "extents"),
    [
        ("kernel_size=7, small_kernel=3", [(4, 3), (2, 5)]),
        ("kernel_size=7, small_kernel=3, rank=1", [(7,), (4,)]),
    ],
)
def test_padding_leaves_images_alone(build, check_padding, arguments, extents):
    check_padding(build(f"LargeKernelConv({arguments})", DIM), extents, DIM)


def test_without_momentum_statistics_are_the_average_of_all_calls(build, tokens):
    mixer = build("LargeKernelConv(kernel_size=3, small_kernel=None)", DIM).train()
    norm, twin = mixer.lkb_origin.bn, nn.BatchNorm2d(DIM, momentum=None).double()
    norm.momentum = None
    norm.reset_running_stats()
    for _ in range(3):
        x = tokens(2, 5, 4, DIM)
        mixer(x)
        twin(F.conv2d(x.movedim(-1, 1), mixer.lkb_origin.conv.weight, padding=1, groups=DIM))
    assert norm.num_batches_tracked == 3
    assert_close(norm.running_mean, twin.running_mean, rtol=1e-14, atol=1e-14)
    assert_close(norm.running_var, twin.running_var, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_statistics_are_those_of_outputs_on_real_tokens(build, tokens, stride):
    mixer = build(f"LargeKernelConv(kernel_size=5, small_kernel=3, stride={stride})", DIM).train()
    x, valid = 9 + tokens(3, 5, 6, DIM), torch.rand(3, 5, 6) < 0.6
    expected = 0
    for branch, k in ((mixer.lkb_origin, 5), (mixer.small_conv, 3)):
        planes = F.pad((x * valid[..., None]).movedim(-1, 1).contiguous(), [k // 2] * 4)
        out = F.conv2d(planes, branch.conv.weight, stride=stride, groups=DIM).movedim(1, -1)
        real = out[valid[:, ::stride, ::stride]]
        twin = nn.BatchNorm1d(DIM).double()
        twin.load_state_dict(branch.bn.state_dict())
        expected = expected + twin(real)
        branch.expected = twin
    got = mixer(x, valid=valid)[valid[:, ::stride, ::stride]]
    assert_close(got, expected)
    for branch in (mixer.lkb_origin, mixer.small_conv):
        assert_close(branch.bn.running_mean, branch.expected.running_mean)
        assert_close(branch.bn.running_var, branch.expected.running_var)


def test_parameters():
    """Names of the released code; 31 x 31 and 5 x 5 with 128 channels as in the first stage of RepLKNet-31B."""
    mixer = glocal.build("LargeKernelConv()", 128)
    shapes = {k: tuple(v.shape) for k, v in mixer.named_parameters()}
    assert shapes == {
        "lkb_origin.conv.weight": (128, 1, 31, 31),
        "lkb_origin.bn.weight": (128,),
        "lkb_origin.bn.bias": (128,),
        "small_conv.conv.weight": (128, 1, 5, 5),
        "small_conv.bn.weight": (128,),
        "small_conv.bn.bias": (128,),
    }
    assert mixer.macs((56, 56)) == 56 * 56 * (31 * 31 + 5 * 5) * 128
    assert mixer.merged().macs((56, 56)) == 56 * 56 * 31 * 31 * 128
    alone = glocal.build("LargeKernelConv(kernel_size=7, small_kernel=None)", 8)
    assert {name.split(".")[0] for name in alone.state_dict()} == {"lkb_origin"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("kernel_size=8", "kernel_size: 8, must be odd"),
        ("small_kernel=4", "small_kernel: 4, must be odd"),
        ("kernel_size=(7, 3)", "small_kernel: 5 is longer than kernel_size"),
    ],
)
def test_kernels_that_have_no_common_centre_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        glocal.build(f"LargeKernelConv({arguments})", 8)


def test_training_refuses_statistics_of_one_value(build, tokens):
    with pytest.raises(ValueError, match="one value per channel in training"):
        build("LargeKernelConv(kernel_size=3, small_kernel=None)", DIM).train()(tokens(1, 1, 1, DIM))


# planted by scripts/mutate
FAULTS = {
    "mixers/large_kernel_conv.py": (
        (
            "merging forgets the norm's epsilon",
            "(self.bn.running_var + self.bn.eps).sqrt()",
            "self.bn.running_var.sqrt()",
        ),
        ("merging forgets the running mean", "self.bn.bias - self.bn.running_mean * scale", "self.bn.bias"),
        (
            "merging puts margins of the rows around the columns",
            "for margin in reversed(margins)",
            "for margin in margins",
        ),
        ("merging takes the large branch's bias alone", "bias = bias + small_bias", "bias = bias"),
        (
            "the merged convolution has no stride",
            "kernel_size=self.kernel_size, stride=self.stride, rank=self.rank",
            "kernel_size=self.kernel_size, rank=self.rank",
        ),
        (
            "padding counts in the statistics",
            "return normalise(self.bn, out, valid, update=update)",
            "return normalise(self.bn, out, None, update=update)",
        ),
        ("padding is read", "x = x.masked_fill(~valid[..., None], 0)", "pass"),
        (
            "statistics never move",
            "return normalise(self.bn, out, valid, update=update)",
            "return normalise(self.bn, out, valid, update=False)",
        ),
        (
            "with a stride the wrong outputs count as real",
            "torch.arange(0, valid.shape[axis], self.stride,",
            "torch.arange(len(range(0, valid.shape[axis], self.stride)),",
        ),
        (
            "the small branch counts twice",
            "out = out + self.small_conv(x, valid, stride=self.stride, update=update_statistics)",
            "out = out + self.small_conv(x, valid, stride=self.stride, update=update_statistics) * 2",
        ),
        ("the cost leaves out the small kernel", " + (0 if self._small is None else math.prod(self._small))", ""),
    ),
    "mixers/_norm.py": (
        (
            "the momentum is rounded to float32",
            "torch.full((), self.momentum, dtype=self.running_mean.dtype, ",
            "torch.full((), self.momentum, ",
        ),
        (
            "the plain average is one in float32",
            "1 / self.num_batches_tracked.to(self.running_mean)",
            "(1 / self.num_batches_tracked).to(self.running_mean)",
        ),
    ),
}
