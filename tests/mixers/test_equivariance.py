"""Which operators commute with moving the image: by any step, by multiples of a window or a stride, or never."""

import pytest
import torch
from torch.testing import assert_close

IMPLS = ("reference", "fast")
STEPS = [(1, 0), (0, 1), (3, 2), (-2, 3), (4, -1)]

ANY_STEP = [  # spec, how far a border reaches into the output
    ("DepthwiseConv(kernel_size=5)", 2),
    ("Convolution(kernel_size=(3, 5), dilation=2)", 4),
    ("DynamicDepthwiseConv(kernel_size=3)", 1),
    ("InhomogeneousDepthwiseConv(kernel_size=5, num_groups=4)", 2),
    ("NeighborhoodAttention(kernel_size=5, num_heads=2)", 2),
    ("NeighborhoodAttention(kernel_size=3, num_heads=2, border='shifted')", 2),
    ("MaxPooling(kernel_size=3)", 1),
    ("MaxPooling(kernel_size=4)", 2),
    ("MultiScaleConv(kernel_sizes=(1, 3, 5))", 2),
    ("Involution(kernel_size=3, group_channels=4)", 1),
]
STRIDED = [  # with a stride of 2
    ("DepthwiseConv(kernel_size=3, stride=2)", 1),
    ("MaxPooling(kernel_size=3, stride=2)", 1),
    ("MultiScaleConv(kernel_sizes=(1, 3), stride=2)", 1),
    ("Involution(kernel_size=3, group_channels=4, stride=2)", 1),
]
IN_WINDOWS = [
    "WindowAttention(window_size=4, num_heads=2)",
    "LocalMLP(window_size=4, num_heads=2)",
]


def moved(x, step):
    return torch.roll(x, step, (1, 2))


def inside(y, step, margin):
    """Rows and columns of y that neither a border nor the seam of a move by this step reaches, and where they go."""
    here, there = [slice(None)], [slice(None)]
    for n, s in zip(y.shape[1:-1], step, strict=True):
        first, last = margin + max(-s, 0), n - margin - max(s, 0)
        assert first < last
        here.append(slice(first, last))
        there.append(slice(first + s, last + s))
    return tuple(here), tuple(there)


def commutes(mixer, x, step, margin, stride=1):
    """The largest difference between moving before and after, away from borders."""
    before, after = mixer(x), mixer(moved(x, step))
    here, there = inside(before, [s // stride for s in step], margin)
    return (after[there] - before[here]).abs().max()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("spec", "margin"), ANY_STEP)
def test_commutes_with_any_step_away_from_borders(build, tokens, spec, margin, step, impl):
    mixer = build(spec, 8)
    mixer.impl = impl
    assert commutes(mixer, tokens(2, 13, 14, 8), step, margin) < 1e-10


@pytest.mark.parametrize("spec", [spec for spec, _ in ANY_STEP])
def test_borders_do_not_commute(build, tokens, spec):
    """So the margins above leave something out."""
    assert commutes(build(spec, 8), tokens(2, 13, 14, 8), (1, 0), 0) > 1e-3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("step", [(2, 0), (0, 4), (-2, 6)])
@pytest.mark.parametrize(("spec", "margin"), STRIDED)
def test_a_stride_commutes_with_its_multiples(build, tokens, spec, margin, step, impl):
    mixer = build(spec, 8)
    mixer.impl = impl
    assert commutes(mixer, tokens(2, 14, 18, 8), step, margin, stride=2) < 1e-10


@pytest.mark.parametrize(("spec", "margin"), STRIDED)
def test_a_stride_commutes_with_nothing_between(build, tokens, spec, margin):
    assert commutes(build(spec, 8), tokens(2, 14, 18, 8), (1, 0), margin, stride=2) > 1e-3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("step", [(4, 0), (0, 4), (8, -4)])
@pytest.mark.parametrize("spec", IN_WINDOWS)
def test_windows_commute_with_their_multiples_everywhere(build, tokens, spec, step, impl):
    mixer, x = build(spec, 8), tokens(2, 12, 8, 8)
    mixer.impl = impl
    assert_close(mixer(moved(x, step)), moved(mixer(x), step), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("step", [(1, 0), (0, 2), (3, 1)])
@pytest.mark.parametrize("spec", IN_WINDOWS)
def test_windows_commute_with_no_other_step(build, tokens, spec, step):
    assert commutes(build(spec, 8), tokens(2, 12, 12, 8), step, 4) > 1e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_attention_without_positions_commutes_with_any_step_everywhere(build, tokens, impl):
    mixer, x = build("SelfAttention(num_heads=2)", 8), tokens(2, 5, 6, 8)
    mixer.impl = impl
    assert_close(mixer(moved(x, (2, 3))), moved(mixer(x), (2, 3)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("step", STEPS)
def test_deformable_convolution_commutes_while_its_taps_stay_near(build, tokens, step, impl):
    mixer, x = build("DeformableConv(kernel_size=3)", 8), tokens(2, 13, 14, 8)
    with torch.no_grad():
        mixer.conv_offset.weight.mul_(0.05)
        mixer.conv_offset.bias.mul_(0.05)
    mixer.impl = impl
    moves, _ = mixer.offsets(x, None)
    assert 0.1 < moves.abs().max() < 2
    assert commutes(mixer, x, step, 3) < 1e-10


def test_linear_token_mixing_commutes_with_no_step(build, tokens):
    mixer, x = build("LinearTokenMixing(grid_size=(6, 7))", 8), tokens(2, 6, 7, 8)
    assert commutes(mixer, x, (1, 0), 1) > 1e-3
