"""DeformableConv against torchvision.ops.deform_conv2d, and against the paper's sum over all tokens."""

import sys

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.ops import deform_conv2d

import glocal

FAULTS = (
    ("moves are read as right, then down", "at = place + moves[..., axis]", "at = place + moves[..., 1 - axis]"),
    ("moves lie all down, then all right", "unflatten(-1, (-1, 2))", "unflatten(-1, (2, -1)).mT"),
    (
        "the share of the two corners is exchanged",
        "low.append((floor, 1 - (at - floor), length))\n            high.append((floor + 1, at - floor, length))",
        "low.append((floor, at - floor, length))\n            high.append((floor + 1, 1 - (at - floor), length))",
    ),
    ("moves get no gradient", "at = place + moves[..., axis]", "at = place + moves[..., axis].detach()"),
    ("corners outside wrap into the next row", "& (column[0] >= 0) & (column[0] < column[2])", ""),
    (
        "places below the last row are counted",
        "(row[0] >= 0) & (row[0] < row[2])",
        "(row[0] >= 0) & (row[0] <= row[2])",
    ),
    ("rows are as long as columns", "* column[2] + torch", "* row[2] + torch"),
    ("the factors have no sigmoid", "found[..., 2 * taps :].sigmoid()", "found[..., 2 * taps :]"),
    ("the definition leaves the factors out", "corners = corners * factor[..., None]", "pass"),
    ("padding moves the taps", "x = x.masked_fill(~valid[..., None], 0)", "pass"),
    (
        "taps are numbered column by column",
        "rows.repeat_interleave(self._kernel[1], -1)",
        "rows.repeat(1, self._kernel[1])",
    ),
    (
        "channels of the offset groups are mixed up on the way out",
        "(self.offset_groups, taps, -1)).transpose(2, 3)",
        "(taps, self.offset_groups, -1))",
    ),
    (
        "offset groups are stripes of channels",
        "source.flatten(1, -2).unflatten(-1, (self.offset_groups, -1))",
        "source.flatten(1, -2).unflatten(-1, (-1, self.offset_groups)).mT",
    ),
    ("taps are not dilated", "+ self.dilation * torch.arange(k", "+ torch.arange(k"),
    ("the offsets do not start at zero", "nn.init.zeros_(self.conv_offset.weight)", "pass"),
    ("a second derivative is silently wrong", "out.register_hook(_no_second_derivative)", "pass"),
    (
        "the fast path drops the bias",
        "tokens.new_zeros(self.out_dim) if self.bias is None",
        "tokens.new_zeros(self.out_dim) if True",
    ),
)

CASES = [  # arguments, grid; 4 channels
    ({}, (5, 7)),
    ({"modulated": False}, (6, 4)),
    ({"kernel_size": 1, "out_dim": 3}, (4, 5)),
    ({"kernel_size": (3, 5), "out_dim": 6, "bias": False}, (6, 5)),
    ({"kernel_size": (5, 1), "stride": 2, "modulated": False}, (6, 7)),
    ({"stride": 2, "out_dim": 6}, (7, 8)),
    ({"stride": 3, "dilation": 2}, (8, 7)),
    ({"kernel_size": 3, "dilation": 2}, (5, 3)),
    ({"groups": 2, "out_dim": 6, "bias": False}, (5, 4)),
    ({"groups": 4, "kernel_size": (3, 5), "modulated": False}, (4, 6)),
    ({"groups": 4, "out_dim": 8, "stride": 2, "dilation": 2}, (9, 6)),
    ({"stride": 2}, (1, 1)),
    ({"offset_groups": 2}, (5, 4)),
    ({"offset_groups": 4, "groups": 2, "out_dim": 6, "kernel_size": (1, 3), "stride": 2}, (6, 5)),
    ({"offset_groups": 2, "groups": 4, "modulated": False, "dilation": 2}, (4, 6)),
]


def spec_of(arguments):
    return f"DeformableConv({', '.join(f'{k}={v}' for k, v in arguments.items())})"


def predicted(mixer, x, *, kernel_size=3, stride=1, dilation=1, modulated=True, offset_groups=1, **others):
    """Kernel, padding, moves [B, 2K, H, W] and mask [B, K, H, W] of images [B, C, H, W]; K of all offset groups."""
    kernel = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
    taps, padding = offset_groups * kernel[0] * kernel[1], tuple(dilation * (k // 2) for k in kernel)
    found = F.conv2d(x, mixer.conv_offset.weight, mixer.conv_offset.bias, stride, padding, dilation)
    assert found.shape[1] == (3 if modulated else 2) * taps
    mask = found[:, 2 * taps :].sigmoid() if modulated else None
    return kernel, padding, found[:, : 2 * taps], mask


def by_torchvision(mixer, **arguments):
    stride, dilation = arguments.get("stride", 1), arguments.get("dilation", 1)

    def oracle(x, valid=None):
        x = (x if valid is None else x * valid.unsqueeze(-1)).movedim(-1, 1)
        _, padding, moves, mask = predicted(mixer, x, **arguments)
        y = deform_conv2d(x, moves, mixer.weight, mixer.bias, stride, padding, dilation, mask)
        return y.movedim(1, -1)

    return oracle


def by_paper(mixer, **arguments):
    """x(p) is the sum over all tokens q of max(0, 1 - |q_y - p_y|) max(0, 1 - |q_x - p_x|) x(q)."""
    stride, dilation, groups, apart = (
        arguments.get(name, 1) for name in ("stride", "dilation", "groups", "offset_groups")
    )

    def oracle(x):
        _, height, width, _ = x.shape
        kernel, padding, moves, mask = predicted(mixer, x.movedim(-1, 1), **arguments)
        out = mixer.weight.shape[0]
        y = torch.zeros(x.shape[0], *moves.shape[2:], out, dtype=x.dtype)
        for i in range(moves.shape[2]):
            for j in range(moves.shape[3]):
                for tap in range(kernel[0] * kernel[1]):
                    row, column = divmod(tap, kernel[1])
                    read = []
                    for group, channels in enumerate(x.chunk(apart, -1)):
                        move = group * kernel[0] * kernel[1] + tap
                        down = i * stride - padding[0] + dilation * row + moves[:, 2 * move, i, j]
                        right = j * stride - padding[1] + dilation * column + moves[:, 2 * move + 1, i, j]
                        near = (1 - (torch.arange(height) - down[:, None]).abs()).relu()
                        beside = (1 - (torch.arange(width) - right[:, None]).abs()).relu()
                        read.append(torch.einsum("bh,bw,bhwc->bc", near, beside, channels))
                        if mask is not None:
                            read[-1] = read[-1] * mask[:, move, i, j, None]
                    token = torch.cat(read, -1)
                    weight = mixer.weight[:, :, row, column]
                    parts = [t @ w.T for t, w in zip(token.chunk(groups, -1), weight.chunk(groups, 0), strict=True)]
                    at = torch.zeros_like(y)
                    at[:, i, j] = torch.cat(parts, -1)
                    y = y + at
        return y if mixer.bias is None else y + mixer.bias

    return oracle


@pytest.mark.parametrize(("arguments", "grid"), CASES)
def test_is_torchvisions(build, check, tokens, arguments, grid):
    mixer = build(spec_of(arguments), 4)
    check(mixer, by_torchvision(mixer, **arguments), tokens(2, *grid, 4))


@pytest.mark.parametrize(
    ("arguments", "grid"),
    [({}, (3, 4)), CASES[4], ({"groups": 2, "dilation": 2}, (4, 3)), ({"offset_groups": 2, "groups": 2}, (3, 2))],
)
def test_is_the_papers_sum(build, check, tokens, arguments, grid):
    mixer = build(spec_of(arguments), 4)
    check(mixer, by_paper(mixer, **arguments), tokens(2, *grid, 4))


@pytest.mark.parametrize(("arguments", "grid"), [CASES[0], CASES[4], CASES[6]])
def test_untouched_offsets_have_torchvisions_gradients(build, check, tokens, arguments, grid):
    """Every tap stands on a token, where the bilinear weights have a kink: the side to the right counts."""
    mixer = build(spec_of(arguments), 4)
    fresh = glocal.build(spec_of(arguments), 4)
    mixer.conv_offset.load_state_dict(fresh.conv_offset.state_dict())
    assert not mixer.conv_offset.weight.any() and not mixer.conv_offset.bias.any()
    check(mixer, by_torchvision(mixer, **arguments), tokens(2, *grid, 4))


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(("groups", "stride", "dilation"), [(1, 1, 1), (2, 2, 1), (4, 1, 2)])
def test_untouched_is_a_convolution(build, tokens, impl, modulated, groups, stride, dilation):
    arguments = f"kernel_size=(3, 5), groups={groups}, stride={stride}, dilation={dilation}"
    mixer = build(f"DeformableConv({arguments}, modulated={modulated})", 4)
    plain = build(f"Convolution({arguments})", 4)
    mixer.impl = impl
    with torch.no_grad():
        mixer.conv_offset.weight.zero_()
        mixer.conv_offset.bias.zero_()
        plain.weight.copy_(mixer.weight * (0.5 if modulated else 1))  # sigmoid(0)
        plain.bias.copy_(mixer.bias)
    x = tokens(2, 6, 7, 4)
    assert_close(mixer(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize("move", [1, -2])
@pytest.mark.parametrize("axis", [0, 1])
def test_moving_all_taps_moves_the_image(build, tokens, impl, move, axis):
    mixer, x = build("DeformableConv(modulated=False, bias=False)", 4), tokens(2, 5, 6, 4)
    mixer.impl = impl
    with torch.no_grad():
        mixer.conv_offset.weight.zero_()
        mixer.conv_offset.bias.zero_()
        mixer.conv_offset.bias[axis::2] = move
    ends = [1, 1, 1, 1]  # left, right, above, below
    ends[2 - 2 * axis] -= move
    ends[3 - 2 * axis] += move
    expected = F.conv2d(F.pad(x.movedim(-1, 1), ends), mixer.weight).movedim(1, -1)
    assert_close(mixer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_taps_may_go_anywhere(build, tokens, impl):
    """However far outside, there are zeros."""
    mixer, x = build("DeformableConv()", 4), tokens(2, 4, 5, 4)
    mixer.impl = impl
    with torch.no_grad():
        mixer.conv_offset.bias.fill_(1e30)
    assert_close(mixer(x), mixer.bias.expand(2, 4, 5, 4))


@pytest.mark.parametrize(("arguments", "grid"), [CASES[0], CASES[5], CASES[9]])
def test_invalid_tokens_count_as_zero_anywhere(build, check, tokens, arguments, grid):
    mixer = build(spec_of(arguments), 4)
    check(mixer, by_torchvision(mixer, **arguments), tokens(2, *grid, 4), valid=torch.rand(2, *grid) < 0.6)


@pytest.mark.parametrize(
    ("arguments", "extents"),
    [
        ({"kernel_size": (3, 5)}, [(4, 3), (2, 5)]),
        ({"stride": 2, "out_dim": 6, "modulated": False}, [(4, 3), (5, 6)]),
        ({"stride": 2, "dilation": 2, "groups": 2}, [(3, 4), (6, 1)]),
    ],
)
def test_padding_leaves_images_alone(build, check_padding, arguments, extents):
    check_padding(build(spec_of(arguments), 4), extents, 4)


def test_without_torchvision_the_definition_runs(build, tokens, monkeypatch):
    mixer, x = build("DeformableConv()", 4), tokens(2, 4, 5, 4)
    expected = mixer(x)
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)  # importing it fails
    assert "torchvision cannot be imported" in mixer.unsupported(x)
    assert_close(mixer(x), expected)
    mixer.impl = "fast"
    with pytest.raises(glocal.Unsupported, match=r"DeformableConv: .*install"):
        mixer(x)


def test_the_definition_exports_too(build, tokens):
    mixer, sizes = build("DeformableConv(stride=2)", 4), {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    mixer.impl = "reference"
    program = torch.export.export(mixer, (tokens(2, 7, 6, 4),), dynamic_shapes=(sizes,)).module()
    for grid in ((4, 9), (8, 8)):
        x = tokens(2, *grid, 4)
        assert_close(program(x), mixer(x))


def test_the_fast_path_has_no_second_derivative(build, tokens):
    mixer, x = build("DeformableConv()", 4), tokens(1, 3, 4, 4).requires_grad_()
    with pytest.raises(glocal.Unsupported, match="impl='reference'"):
        torch.autograd.grad(mixer(x).square().sum(), x, create_graph=True)
    mixer.impl = "reference"
    (first,) = torch.autograd.grad(mixer(x).square().sum(), x, create_graph=True)
    first.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_parameters():
    def shapes(spec, dim):
        return {k: tuple(v.shape) for k, v in glocal.build(spec, dim).named_parameters()}

    assert shapes("DeformableConv(out_dim=6)", 4) == {
        "weight": (6, 4, 3, 3),
        "bias": (6,),
        "conv_offset.weight": (27, 4, 3, 3),
        "conv_offset.bias": (27,),
    }
    assert shapes("DeformableConv(kernel_size=(1, 3), groups=4, modulated=False, bias=False)", 4) == {
        "weight": (4, 1, 1, 3),
        "conv_offset.weight": (6, 4, 1, 3),
        "conv_offset.bias": (6,),
    }
    for bad in ("kernel_size=2", "groups=3", "modulated='no'"):
        with pytest.raises(ValueError, match=bad.partition("=")[0]):
            glocal.build(f"DeformableConv({bad})", 4)


def test_images_only(build, tokens):
    with pytest.raises(ValueError, match="rank"):
        build("DeformableConv()", 4)(tokens(2, 5, 4))


def test_weights_are_four_corners_for_each_tap(build, tokens):
    mixer, x = build("DeformableConv(kernel_size=3)", 16), tokens(2, 8, 8, 16)
    found = mixer.weights(x)
    assert found.weights.shape == found.index.shape == (2, 9, 64, 4)
    *_, mask = predicted(mixer, x.movedim(-1, 1))
    assert_close(found.weights.sum(-1), mask.flatten(2))
