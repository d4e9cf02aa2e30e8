"""Fitted networks hold their budget; what is fitted is held against counts of the networks built from it."""

import pytest
import torch

import glocal
from glocal.analysis import cost
from glocal.backbone import default_dims
from glocal.budget import base_widths, fit, reference

DATA = {"in_chans": 1, "num_classes": 8, "img_size": 32}
LAYOUTS = ["C-C-C-C", "C-C-C-T", "C-C-T-T", "C-T-T-T", "T-T-T-T"]


def built(layout, fitted, **options):
    return glocal.Backbone(layout, dims=fitted.dims, mlp_ratio=fitted.mlp_ratio, **(DATA | options))


def image(size=(32, 32), chans=1):
    return torch.randn(1, chans, *size)


@pytest.mark.parametrize("of", ["macs", "params"])
def test_layouts_agree_with_the_reference(of, monkeypatch):
    target = reference(32, 1, 8, of=of)
    counts = []
    count = getattr(cost, of)
    monkeypatch.setattr(cost, of, lambda *arguments: counts.append(of) or count(*arguments))
    for layout in LAYOUTS:
        counts.clear()
        fitted = fit(layout, target, of, **DATA)
        assert len(counts) <= 6  # about 60 ms each; a comparison fits every candidate at every start
        net = built(layout, fitted)
        assert fitted.macs == cost.macs(net, image())
        assert fitted.params == sum(p.numel() for p in net.parameters())
        assert abs(getattr(fitted, of) / target - 1) < 0.005, layout
        assert 1 <= fitted.mlp_ratio <= 8


@pytest.mark.parametrize("of", ["macs", "params"])
def test_the_reference_is_the_standard_network(of):
    net = glocal.Backbone("C-C-T-T", dims=(32, 32, 96, 96), **DATA)
    expected = sum(p.numel() for p in net.parameters()) if of == "params" else cost.macs(net, image())
    target = reference(32, 1, 8, (32, 32, 96, 96), of)
    assert target == expected
    fitted = fit("C-C-T-T", target, of, base_dims=(32, 32, 96, 96), **DATA)
    assert (fitted.dims, fitted.mlp_ratio) == ((32, 32, 96, 96), 4)


@pytest.mark.parametrize("operator", glocal.available())
def test_every_operator_meets_the_budget_of_widths_that_it_takes(operator):
    target = reference(32, 1, 8)
    mixer = glocal.build(getattr(glocal.mixers, operator).examples[0], 32)
    if mixer.needs_source or mixer.rank == 1:  # no entry of a layout, or none for images
        with pytest.raises(ValueError, match=f"{operator}: (reads a source|works on grids of rank 1)"):
            fit(operator, target, **DATA)
        return
    try:
        layout = operator
        fitted = fit(layout, target, **DATA)
    except ValueError:  # heads of 32 channels are too coarse for a network of one stage, or there is no default
        layout = getattr(glocal.mixers, operator).examples[0]
        fitted = fit(layout, target, **DATA)
    assert abs(cost.macs(built(layout, fitted), image()) / target - 1) < 0.02


def test_widths_that_an_operator_refuses_are_passed_over():
    fitted = fit("C-SelfAttention(head_dim=48)", reference(32, 1, 8), **DATA)
    assert all(width % 48 == 0 for width in fitted.dims[1:])
    assert fitted.dims[1] == 2 * fitted.dims[0]  # one scale for all stages


def test_the_width_whose_standard_ratio_is_nearest_is_taken():
    def standard(width):
        dims = tuple(width * base // 64 for base in default_dims(4))
        with torch.device("meta"):
            return sum(p.numel() for p in glocal.Backbone("C-C-C-C", dims=dims, **DATA).parameters())

    for target in (60_000, 470_000, 2_000_000):
        fitted = fit("C-C-C-C", target, "params", **DATA)
        ratios = {width: max(standard(width) / target, target / standard(width)) for width in range(8, 200, 8)}
        assert fitted.dims[0] == min(ratios, key=ratios.get)


@pytest.mark.parametrize(
    "layout, size, chans",
    [
        ("C", (28, 28), 1),
        ("T", (200,), 2),
        ("T-C-T", (41, 30), 3),
        ("C-T-C-T", (200,), 2),
        ("C-C-C-C-T-T-T-T", (28, 28), 1),
    ],
)
def test_any_number_of_stages_and_any_input(layout, size, chans):
    data = {"in_chans": chans, "num_classes": 8, "img_size": size}
    target = reference(size, chans, 8)
    fitted = fit(layout, target, **data)
    assert abs(cost.macs(built(layout, fitted, **data), image(size, chans)) / target - 1) < 0.02


def test_other_numbers_of_stages_have_the_default_widths_at_the_same_first_width():
    assert base_widths(4) == (64, 64, 128, 128)
    assert base_widths(4, (48, 64, 96, 128)) == (48, 64, 96, 128)
    assert base_widths(2, (32, 32, 64, 64)) == (32, 64)
    assert base_widths(5, (96, 96, 192, 192)) == (96, 96, 96, 192, 192)


def test_options_of_the_network_count():
    target = reference(32, 1, 8)
    options = {"depths": (2, 1, 2, 1), "mlp": False}
    fitted = fit("C-C-T-T", target, **DATA, **options)
    assert abs(cost.macs(built("C-C-T-T", fitted, **options), image()) / target - 1) < 0.02


def test_two_percent_is_the_limit():
    """Without MLPs there are widths only, 32 apart."""
    at_64 = cost.macs(glocal.Backbone("T-T", dims=(64, 128), mlp=False, **DATA), image())
    assert fit("T-T", round(1.015 * at_64), **DATA, mlp=False).dims == (64, 128)
    with pytest.raises(ValueError, match="no width comes within 2%"):
        fit("T-T", round(1.05 * at_64), **DATA, mlp=False)


def test_an_operator_that_needs_values_as_it_is_built(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Mine(nn.Linear):\n"
        "    def __init__(self, dim):\n"
        "        super().__init__(dim, dim)\n"
        "        self.scale = float(torch.ones(3).sum())\n"
    )
    random = torch.get_rng_state()
    layout = f"C-'{tmp_path / 'mine.py'}:Mine'-C"
    target = reference(32, 1, 8)
    fitted = fit(layout, target, **DATA)
    assert torch.equal(torch.get_rng_state(), random)
    assert abs(cost.macs(built(layout, fitted), image()) / target - 1) < 0.02


def test_the_same_again_and_no_random_number_drawn():
    random = torch.get_rng_state()
    target = reference(32, 1, 8)
    first = fit("C-T", target, **DATA)
    torch.manual_seed(7)
    assert fit("C-T", target, **DATA) == first
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), random)


def test_what_cannot_be_met_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^layout 'C-T': no width comes within 2% of 1,000 macs; the nearest, .*$"):
        fit("C-T", 1000, **DATA)
    with pytest.raises(ValueError, match="the target is 0 params; it must be at least 1"):
        fit("C-T", 0, "params", **DATA)
    with pytest.raises(ValueError, match="SelfAttention has no argument 'heads'"):
        fit("C-SelfAttention(heads=3)", 10_000_000, **DATA)
    with pytest.raises(ValueError, match="num_heads: 7919 does not divide"):
        fit("C-SelfAttention(num_heads=7919)", 10_000_000, **DATA)


# planted by scripts/mutate
FAULTS = (
    (
        "the first width that is taken stays",
        "guess = min(near[0] + (math.sqrt(target) - roots[0]) / slope, 4 * near[0])",
        "break",
    ),
    ("the MLP ratio stays", "end = WIDEST if standard < target else NARROWEST", "return STANDARD"),
    (
        "networks off the budget are given out",
        "if abs(cost_at(step, ratio) / target - 1) <= TOLERANCE:",
        "if abs(cost_at(step, ratio) / target - 1) <= 4 * TOLERANCE:",
    ),
    ("a width that an operator refuses ends the search", "refusals.append(error)", "raise"),
)
