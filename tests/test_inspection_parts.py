"""What is shown of an operator that adds parts (LocallyEnhancedAttention) is held to what it computed."""

import dataclasses

import pytest
import torch

import glocal
from glocal.analysis.maps import maps

from .stored_maps import assert_near, recorded, row_of


@pytest.mark.parametrize(("position", "stride"), [("classification", 1), ("detection", 2)])
def test_locally_enhanced_attention_shows_its_attention_and_how_much_is_unary(position, stride):
    torch.manual_seed(0)
    spec = f"LocallyEnhancedAttention(grid_size=(4, 5), num_groups=2, position={position!r}, stride={stride})"
    mixer, x = glocal.build(spec, 16).eval(), torch.randn(2, 4, 5, 16)
    calls = recorded(mixer, x)
    assert calls[0].rebuild_error() < 1e-6
    for budget in (10**6, 2 * 2 * 20 * 5):
        ((found,), refused) = maps(calls, budget=budget)
        assert not refused and found.queries.grid == (4, 5) and found.queries.prefix == 0 and found.kind == "weights"
        assert found.stride == (1 if budget == 10**6 else 2)
    ((found,), _) = maps(calls)
    weights = mixer.weights(x).weights.detach().double().numpy()
    assert_near(row_of(found, 1, 1, 7), weights[1, 1, 7])
    gate = mixer.terms(x)["gate"].detach()
    by_hand = [(1 / (1 + gate[..., 8 * g : 8 * g + 8])).mean().item() for g in range(2)]
    assert found.shares["unary share"] == pytest.approx(by_hand, rel=1e-5)
    with torch.no_grad():
        mixer.reasoning[1].weight.mul_(2)
    with pytest.raises(ValueError, match=r"its parameter reasoning\.1\.weight was changed in place"):
        maps(calls)
    with pytest.raises(ValueError, match=r"its parameter reasoning\.1\.weight was changed in place"):
        calls[0].shares()


@pytest.mark.parametrize("position", ["classification", "detection"])
def test_weights_that_are_not_those_of_the_locally_enhanced_sums_are_refused(position, monkeypatch):
    """Running it again gives the same output, whatever its weights are said to be."""
    torch.manual_seed(0)
    spec = f"LocallyEnhancedAttention(grid_size=(4, 5), num_groups=2, position={position!r})"
    mixer, x = glocal.build(spec, 16).eval(), torch.randn(2, 4, 5, 16)
    for parameter in mixer.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    calls, real = recorded(mixer, x), mixer.weights
    calls[0].weights(torch.tensor([7, 3]))
    monkeypatch.setattr(
        mixer, "weights", lambda *a, **k: dataclasses.replace(w := real(*a, **k), weights=w.weights.flip(-1))
    )
    for queries in (None, torch.tensor([7, 3])):
        with pytest.raises(ValueError, match="rebuild the recorded output with a relative error"):
            calls[0].weights(queries)
    monkeypatch.undo()
    assert recorded(mixer, x[:0])[0].rebuild_error() == 0
    calls[0].output.data.mul_(1.5)
    with pytest.raises(ValueError, match="rebuild the recorded output with a relative error"):
        calls[0].weights()


def test_weights_of_locally_enhanced_attention_on_padding_are_refused():
    mixer, x = glocal.build("LocallyEnhancedAttention(grid_size=4, num_groups=2)", 16).eval(), torch.randn(1, 4, 4, 16)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    for last, refused in ((True, False), (False, True)):
        valid[:, 3] = last
        with torch.no_grad(), glocal.inspect(mixer) as seen:
            mixer(x, valid=valid.clone())
        if not refused:
            torch.testing.assert_close(seen.calls[0].weights().weights, mixer.weights(x).weights)
            continue
        with pytest.raises(ValueError, match=r"was called with padding \(valid\), and LocallyEnhancedAttention shows"):
            seen.calls[0].weights()


# planted by scripts/mutate
FAULTS = {
    ("inspection.py", "test_inspection_parts.py"): (
        (
            "nothing ties what is shown to the sums of the run",
            "max(_error(output, self.output), _error(rebuilt, sums if queries is None else sums[:, queries]))",
            "_error(output, self.output)",
        ),
        ("its output may be another", "max(_error(output, self.output), _error(rebuilt,", "max(0, _error(rebuilt,"),
        ("padding is not noticed", "if valid is not None and not bool(valid.all()):", "if False:"),
        ("a share of what is not unary", "share = (1 / (1 + gate))", "share = (gate / (1 + gate))"),
        ("shares of another call", "gate = self.mixer.terms(**self._call)", "gate = self.mixer.terms(2 * self.x)"),
        (
            "shares of what was changed",
            "        self._check_unchanged()\n        with self._as_it_was(), torch.no_grad():\n            gate",
            "        with self._as_it_was(), torch.no_grad():\n            gate",
        ),
        ("strided outputs count as the queries", "math.prod(self.query_grid)", "math.prod(self.output.shape[1:-1])"),
        (
            "parts are taken for weights of the whole",
            "kind = PartsCall if _shows_parts(mixer) else Call",
            "kind = Call",
        ),
    ),
}
