"""torch's convolutions as they are inspected: their weights rebuild them, and are those of a loop over places."""

from itertools import product

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

import glocal
from glocal.analysis.maps import maps

FAULTS = {
    ("inspection.py", "test_adapters_convolution.py"): (
        (
            "a call that was refused was no call",
            "called = self.calls or self._canonical.keys() & self.refused.keys()",
            "called = self.calls",
        ),
    ),
    "adapters/convolution.py": (
        ("1x1 kernels are shown", "s < d * (k - 1) + 1 and k > 1", "s < d * (k - 1) + 1 or k == 1"),
        ("patches are shown", "s < d * (k - 1) + 1 and k > 1", "k > 1"),
        ("dilation is passed over", "device=x.device) * layer.dilation[axis]", "device=x.device)"),
        ("stride is passed over", "* layer.stride[axis] + taps", "+ taps"),
        ("all paddings are zeros", "place.new_full((), n), layer.padding_mode)", 'place.new_full((), n), "zeros")'),
        ("padding is behind", "* layer.dilation[axis] - self._sides[axis][0]", "* layer.dilation[axis]"),
        ("own forwards are passed over", 'if own or "forward" in vars(layer):', "if False:"),
        ("channels that are heads twice change places", ".repeat_interleave(self.out_dim // self.dim, -1)",
         ".repeat(1, 1, self.out_dim // self.dim)"),
        ("groups read one another", "(layer.groups, -1))  # [groups", "(-1, layer.groups)).transpose(0, 1)  # [groups"),
        ("bias is left out", "if layer.bias is None else mixed + layer.bias", ""),
        ("operators of ours are taken apart", "if inside or not", "if not"),
        ("outputs are what a later layer makes of them", ".movedim(1, -1).clone())", ".movedim(1, -1))"),
        ("single images are batches", "if x.dim() != len(layer.kernel_size) + 2:", "if False:"),
    ),
    "adapters/__init__.py": (("convolutions are always there", "    if convolutions:", "    if True:"),),
    "mixers/_library.py": (
        ("shares are of squares", ".sum((1, 2)).sqrt()", ".sum((1, 2))"),
        ("groups are those of other channels", ".unflatten(0, (groups, -1)).square()",
         ".unflatten(0, (-1, groups)).transpose(0, 1).square()"),
    ),
    "analysis/maps.py": (
        ("taps change places", "found.index.permute(0, 3, 2, 1)", "found.index.permute(0, 3, 2, 1).flip(-1)"),
    ),
}  # fmt: skip

LAYERS = [
    (nn.Conv1d, {"kernel_size": 4, "stride": 3, "padding": 2}),
    (nn.Conv1d, {"kernel_size": 3, "dilation": 3, "padding": "same", "groups": 4}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "groups": 2}),
    (nn.Conv2d, {"kernel_size": (2, 5), "stride": (1, 2), "padding": (0, 3), "dilation": (3, 1), "bias": False}),
    (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 4}),
]


@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect", "circular"])
@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_weights_are_the_kernels_and_rebuild_the_output(kind, options, mode):
    layer = kind(4, 8, **options, padding_mode=mode).double()
    grid = (11,) if kind is nn.Conv1d else (7, 8)
    x = torch.randn(2, 4, *grid, dtype=torch.float64)
    with torch.no_grad(), glocal.inspect(layer, convolutions=True) as seen:
        out = layer(x)
    (call,) = seen
    assert call.rebuild_error() < 1e-14 and call.name == kind.__name__ and repr(call.mixer) == repr(layer)
    found = call.weights()
    assert found.out_grid == out.shape[2:] and found.source_grid == grid
    # by moving one: what each source changes is its weight, and where it stands
    one = torch.zeros(1, 4, *grid, dtype=torch.float64)
    heads = found.dense()
    for place in list(product(*map(range, grid)))[:: 3 if len(grid) == 1 else 11]:
        number = sum(p * n for p, n in zip(place, (grid[1], 1) if len(grid) == 2 else (1,), strict=True))
        one.zero_()[(0, 2, *place)] = 1.0
        moved = (layer(one) - layer(torch.zeros_like(one)))[0].flatten(1).T.detach()  # [N, C_out]
        if layer.groups == 4:
            assert_close(heads[0, 4:6, :, number], moved[:, 4:6].T)
            assert not moved[:, :4].any()
        else:
            kernel = layer.weight.detach().flatten(2)
            channel = 2 % (4 // layer.groups)
            out_channels = slice(4, 8) if layer.groups == 2 else slice(0, 8)
            assert_close(heads[0, :, :, number].T @ kernel[out_channels, channel].T, moved[:, out_channels])


def test_positions_are_in_tokens_of_the_output():
    layer = nn.Conv2d(3, 4, 3, stride=(2, 1), padding=1)
    with torch.no_grad(), glocal.inspect(layer, convolutions=True) as seen:
        layer(torch.randn(1, 3, 4, 5))
    found = seen.calls[0].weights()
    assert found.query_positions.tolist() == [[i, j] for i in range(2) for j in range(5)]
    assert found.source_positions.tolist() == [[i / 2, j] for i in range(4) for j in range(5)]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_page_shows_the_kernel_of_each_group(groups):
    """By the norm of its weights at each tap, where the tap reads; borders lose what falls outside."""
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)
    ours = glocal.build(f"Convolution(out_dim=6, stride=2, groups={groups})", 4)
    with torch.no_grad():
        layer.weight[:3, :, 0, 1] *= 5
        ours.weight.copy_(layer.weight), ours.bias.copy_(layer.bias)
    for part, x in ((layer, torch.randn(1, 4, 5, 6)), (ours, torch.randn(1, 5, 6, 4))):
        with torch.no_grad(), glocal.inspect(part, convolutions=True) as seen:
            part(x)
        (found,), refused = maps(list(seen))
        assert not refused and (found.kind, found.heads, found.kernel) == ("weights", groups, True)
        assert found.error < 1e-6
        for group in range(groups):
            own = layer.weight.detach()[group * 6 // groups : (group + 1) * 6 // groups]
            norms = torch.stack([own[:, :, i, j].norm() for i in range(3) for j in range(3)])
            assert found.rows[0].codes[group, 0] == pytest.approx((norms / norms.sum()).numpy(), rel=1e-5)
        reads = found.index[0][0]  # the query in the second row and column reads around the token (2, 2)
        assert reads[3 + 1].tolist() == [6 * i + j for i in (1, 2, 3) for j in (1, 2, 3)]
        assert reads[0].tolist() == [-1, -1, -1, -1, 0, 1, -1, 6, 7]


def test_a_page_shows_every_channel_of_a_depthwise_kernel():
    depthwise = nn.Conv2d(4, 4, 3, groups=4)
    with torch.no_grad(), glocal.inspect(depthwise, convolutions=True) as seen:
        depthwise(torch.randn(1, 4, 5, 5))
    (found,), _ = maps(list(seen))
    assert not found.kernel and found.heads == 4 and found.kind == "signed"
    assert found.rows[0].codes == pytest.approx(
        depthwise.weight.detach().flatten(2).movedim(1, 0).numpy().reshape(4, 1, 9)
    )


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(x * 2)


def test_what_is_shown_and_what_is_not():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4),  # patches
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 3, padding=1),
        Own(8, 8, 3, padding=1),
        nn.ConvTranspose2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, (1, 3), padding=(0, 1)),
        nn.Conv2d(8, 8, 2, stride=2, dilation=2, padding=1),
    )
    with torch.no_grad():
        with glocal.inspect(net, convolutions=True) as seen:
            net(torch.randn(2, 3, 32, 32))
        assert [call.name for call in seen] == ["2", "5", "6"]
        assert seen.refused == {"3": "computes in a way of its own, not as torch's convolutions do"}
        with glocal.inspect(net, convolutions=True) as seen:
            net(torch.randn(1, 3, 32, 32)), net(torch.randn(3, 32, 32))
        assert len(seen) == 3 and seen.refused["5"] == "was called with (8, 8, 8), which is no batch"
        with glocal.inspect(net) as seen:
            net(torch.randn(2, 3, 32, 32))
        assert not len(seen) and not seen.refused
        one = nn.Sequential(nn.Conv2d(3, 8, 3))
        with glocal.inspect(one, convolutions=True) as seen:
            one(torch.randn(3, 32, 32))
        assert not len(seen) and seen.refused == {"0": "was called with (3, 32, 32), which is no batch"}
        with pytest.raises(ValueError, match="no token mixer was called"), glocal.inspect(one, convolutions=True):
            pass


def test_what_follows_in_place_changes_nothing():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, groups=4), nn.Hardswish(inplace=True)
    )
    with torch.no_grad(), glocal.inspect(net, convolutions=True) as seen:
        net(torch.randn(1, 3, 9, 9))
    assert max(call.rebuild_error() for call in seen) < 1e-6


def test_operators_of_ours_are_not_taken_apart():
    outlook = glocal.build("LinearSpatialReductionAttention(num_heads=2)", 8)
    net = nn.ModuleDict({"a": nn.Conv2d(8, 8, 3, padding=1), "b": outlook, "ab": nn.Conv2d(8, 8, 3, padding=1)})
    net["b"].inner = nn.Conv2d(8, 8, 3, padding=1)
    with torch.no_grad(), glocal.inspect(net, convolutions=True) as seen:
        x = torch.randn(1, 8, 8, 8)
        net["ab"](net["b"](net["a"](x).movedim(1, -1)).movedim(-1, 1))
        net["b"].inner(x)
    assert [call.name for call in seen] == ["a", "b", "ab"]


@pytest.mark.parametrize(
    ("name", "layers"),
    [("resnet18", 17), ("mobilenet_v2", 18), ("timm:convnext_atto", 12), ("timm:coatnet_0_rw_224", None)],
)
def test_networks_show_every_layer_that_moves_something(name, layers):
    torch.manual_seed(0)
    of_timm = name.startswith("timm:")
    net = timm.create_model(name[5:]) if of_timm else getattr(torchvision.models, name)()
    with torch.no_grad(), glocal.inspect(net.eval(), convolutions=True) as seen:
        net(torch.randn(1, 3, *((224, 224) if layers is None else (64, 96))))
    expected = [n for n, p in net.named_modules() if isinstance(p, nn.Conv2d) and p.kernel_size[0] > p.stride[0]]
    assert layers in (None, len(expected))
    assert [call.name for call in seen if isinstance(net.get_submodule(call.name), nn.Conv2d)] == expected
    assert max(call.rebuild_error() for call in list(seen)[:3]) < 1e-5
