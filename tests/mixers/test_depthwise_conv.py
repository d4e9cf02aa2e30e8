"""DepthwiseConv against nn.Conv1d and nn.Conv2d with one group for each channel."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import glocal

CASES = [  # arguments, grid; 5 channels
    ({}, (8, 9)),
    ({}, (3, 5)),
    ({"kernel_size": (3, 5)}, (6, 5)),
    ({"kernel_size": (5, 3), "stride": 2, "bias": False}, (6, 7)),
    ({"kernel_size": 3, "stride": 2, "dilation": 3}, (7, 10)),
    ({"kernel_size": 1}, (2, 3)),
    ({"kernel_size": 5, "stride": 3}, (1, 8)),
    ({"rank": 1}, (12,)),
    ({"rank": 1, "kernel_size": 3, "stride": 2, "dilation": 2}, (7,)),
    ({"kernel_size": 4}, (6, 5)),
    ({"kernel_size": (2, 12), "bias": False}, (3, 7)),
    ({"kernel_size": (5, 8), "stride": 2}, (6, 9)),
    ({"rank": 1, "kernel_size": 4, "stride": 3}, (8,)),
]


def torch_convolution(*, kernel_size=7, stride=1, dilation=1, bias=True, rank=2):
    """Also the state dict's names and shapes: functional_call refuses others."""
    kernel = (kernel_size,) * rank if isinstance(kernel_size, int) else kernel_size
    odd = all(k % 2 for k in kernel)
    padding = tuple(dilation * (k - 1) // 2 for k in kernel) if odd else "same"  # torch's name for even ones
    conv = (nn.Conv1d, nn.Conv2d)[rank - 1]
    found = conv(5, 5, kernel, stride if odd else 1, padding, dilation, groups=5, bias=bias).double()
    found.every = 1 if odd else stride  # which torch does not do together with "same"
    return found


def oracle_of(mixer, conv):
    def oracle(x, valid=None):
        if valid is not None:
            x = x * valid.unsqueeze(-1)
        out = functional_call(conv, dict(mixer.named_parameters()), x.movedim(-1, 1)).movedim(1, -1)
        every = slice(None, None, getattr(conv, "every", 1))
        return out[(slice(None), *(every,) * (x.dim() - 2))]

    return oracle


def spec_of(arguments):
    return f"DepthwiseConv({', '.join(f'{k}={v}' for k, v in arguments.items())})"


@pytest.mark.parametrize(("arguments", "grid"), CASES)
def test_is_torch_convolution(build, check, tokens, arguments, grid):
    mixer = build(spec_of(arguments), 5)
    conv = torch_convolution(**arguments)
    assert mixer.state_dict().keys() == conv.state_dict().keys()
    check(mixer, oracle_of(mixer, conv), tokens(2, *grid, 5))


@pytest.mark.parametrize(
    ("arguments", "grid"),
    [
        ({"rank": 1, "kernel_size": 4}, (7,)),
        ({"rank": 1, "kernel_size": 3, "dilation": 3, "bias": False}, (9,)),
        ({"rank": 1, "kernel_size": 1}, (3,)),
        ({"kernel_size": (2, 3), "dilation": 2}, (4, 7)),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_causal_is_torch_convolution_of_what_comes_before(build, check, tokens, arguments, grid, masked):
    """Padded at both ends by all that a kernel reaches, the first outputs are those that read no later token."""
    mixer = build(spec_of({**arguments, "causal": True}), 5)
    kernel, dilation = mixer.weight.shape[2:], arguments.get("dilation", 1)
    conv = (nn.Conv1d, nn.Conv2d)[len(grid) - 1]
    reach = tuple(dilation * (k - 1) for k in kernel)
    conv = conv(5, 5, kernel, 1, reach, dilation, groups=5, bias=arguments.get("bias", True)).double()
    every = oracle_of(mixer, conv)

    def oracle(x, valid=None):
        return every(x, valid)[(slice(None), *(slice(n) for n in grid))]

    call = {"valid": torch.rand(2, *grid) < 0.6} if masked else {}
    check(mixer, oracle, tokens(2, *grid, 5), **call)


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_a_cache_keeps_what_the_taps_reach(build, tokens, impl):
    mixer = build(spec_of({"rank": 1, "kernel_size": 3, "dilation": 2, "causal": True}), 5)
    mixer.impl = impl
    x, cache = tokens(2, 9, 5), glocal.Cache()
    mixer(x[:, :7], cache=cache)
    assert cache.recall("values", 2).shape == (2, 4, 5, 1) and len(cache) == 7
    looked = mixer.weights(x[:, 7:], cache=cache)
    assert looked.source_positions.flatten().tolist() == [3, 4, 5, 6, 7, 8]
    assert looked.index[0, 0].tolist() == [[0, 2, 4], [1, 3, 5]]
    torch.testing.assert_close(mixer(x[:, 7:], cache=cache), mixer(x)[:, 7:])


def test_a_stride_leaves_tokens_without_an_output_to_decode():
    with pytest.raises(ValueError, match="stride: 2, must be 1 with causal=True"):
        glocal.build("DepthwiseConv(causal=True, stride=2, rank=1)", 5)
    with pytest.raises(ValueError, match="kernel_size: 4, must be odd with dilation 2"):
        glocal.build("DepthwiseConv(kernel_size=4, dilation=2, rank=1)", 5)


@pytest.mark.parametrize(
    ("arguments", "grid"),
    [
        ({"kernel_size": 3, "num_groups": 2}, (4, 5)),
        ({"kernel_size": (4, 3), "num_groups": 3, "stride": 2}, (5, 6)),
        ({"kernel_size": 3, "num_groups": 1, "bias": False, "rank": 1, "dilation": 2}, (9,)),
        ({"kernel_size": 4, "num_groups": 3, "rank": 1, "causal": True}, (7,)),
    ],
)
def test_channels_share_kernels(build, check, tokens, arguments, grid):
    """As with a kernel for each channel, of which those of a group are the same."""
    mixer = build(spec_of(arguments), 6)
    assert mixer.weight.shape[:2] == (arguments["num_groups"], 1)
    of_each = {name: value for name, value in arguments.items() if name != "num_groups"}
    apart = build(spec_of(of_each), 6)

    def oracle(x):
        own = dict(mixer.named_parameters())
        own["weight"] = torch.stack([own["weight"][c * arguments["num_groups"] // 6] for c in range(6)])
        return functional_call(apart, own, (x,))

    check(mixer, oracle, tokens(2, *grid, 6))
    for groups in (4, 0):
        with pytest.raises(ValueError, match=f"num_groups: {groups}"):
            glocal.build(f"DepthwiseConv(num_groups={groups})", 6)


def test_a_cache_of_shared_kernels(build, tokens):
    mixer, x = build("DepthwiseConv(kernel_size=4, num_groups=2, causal=True, rank=1)", 6), tokens(2, 9, 6)
    for mixer.impl in ("reference", "fast"):
        cache = glocal.Cache()
        parts = [mixer(x[:, i : i + 3], cache=cache) for i in (0, 3, 6)]
        torch.testing.assert_close(torch.cat(parts, 1), mixer(x))


@pytest.mark.parametrize(("arguments", "grid"), [CASES[2], CASES[4], CASES[8]])
def test_invalid_tokens_count_as_zero_anywhere(build, check, tokens, arguments, grid):
    mixer = build(spec_of(arguments), 5)
    valid = torch.rand(2, *grid) < 0.6
    check(mixer, oracle_of(mixer, torch_convolution(**arguments)), tokens(2, *grid, 5), valid=valid)


@pytest.mark.parametrize(
    ("arguments", "extents"),
    [
        ({"kernel_size": (3, 5)}, [(4, 3), (2, 5)]),
        ({"kernel_size": 5, "stride": 2}, [(4, 3), (5, 6)]),
        ({"kernel_size": 3, "stride": 2, "dilation": 2}, [(3, 4), (6, 1)]),
        ({"rank": 1, "stride": 3}, [(4,), (8,)]),
        ({"rank": 1, "kernel_size": 4, "causal": True}, [(6,), (2,)]),
    ],
)
def test_padding_leaves_images_alone(build, check_padding, arguments, extents):
    check_padding(build(spec_of(arguments), 5), extents, 5)


def test_weights_are_the_kernel_shared_by_images_and_positions(build, tokens):
    mixer = build("DepthwiseConv(kernel_size=3)", 16)
    weights = mixer.weights(tokens(2, 8, 8, 16)).weights
    assert weights.shape == (1, 16, 1, 9)
    torch.testing.assert_close(weights[0, :, 0], mixer.weight.flatten(1))


# planted by scripts/mutate
FAULTS = (
    (
        "the kernel's axes are exchanged in the definition",
        "self.weight.flatten(1)[None, :, None]",
        "self.weight.transpose(-1, -2).flatten(1)[None, :, None]",
    ),
    (
        "the definition's taps are not dilated",
        "stride=self.stride, dilation=self.dilation, left=",
        "stride=self.stride, left=",
    ),
    ("a causal kernel ends one token late", "self.dilation * (k - 1) for k", "self.dilation * (k - 1) - 1 for k"),
    (
        "a causal kernel is centred",
        "causal=self.causal,\n            past",
        "past",
    ),
    ("kept tokens have outputs of their own", "past=kept", "past=0"),
    ("rows of kept tokens are the queries'", ")[self._kept(cache) :]", ")[: math.prod(out)]"),
    (
        "the fast path has no bias",
        "            self.weight,\n            self.bias,",
        "            self.weight,\n            None,",
    ),
    (
        "the sources of a strided convolution are placed in their own tokens",
        "grid_positions(grid, stride=self.stride, device=x.device)",
        "grid_positions(grid, device=x.device)",
    ),
)
