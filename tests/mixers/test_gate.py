"""Gate against a loop over tokens and channels, and at its limits."""

import math

import pytest
import torch
from torch.testing import assert_close

import glocal


def by_loop(mixer):
    """y_c = x_c / (1 + exp(-(sum_d W_cd x_d + b_c))), one number at a time."""

    def oracle(x):
        y = []
        for token in x.flatten(0, -2):
            for c in range(len(token)):
                score = sum(mixer.gate.weight[c, d] * token[d] for d in range(len(token)))
                score = score + (0 if mixer.gate.bias is None else mixer.gate.bias[c])
                y.append(token[c] / (1 + (-score).exp()))
        return torch.stack(y).view(x.shape)

    return oracle


@pytest.mark.parametrize("spec", ["Gate()", "Gate(bias=False)"])
@pytest.mark.parametrize("grid", [(2, 3), (4,)])
def test_is_the_loop(build, check, tokens, spec, grid):
    mixer = build(spec, 3)
    check(mixer, by_loop(mixer), tokens(2, *grid, 3))


def test_padding_leaves_images_alone(build, check_padding):
    check_padding(build("Gate()", 4), [(3, 2), (1, 4)], 4)


@pytest.mark.parametrize(("bias", "share"), [(0.0, 0.5), (math.log(3), 0.75), (100.0, 1.0), (-100.0, 0.0)])
def test_without_weights_the_bias_says_how_much_passes(build, tokens, bias, share):
    mixer = build("Gate()", 4)
    with torch.no_grad():
        mixer.gate.weight.zero_()
        mixer.gate.bias.fill_(bias)
    x = tokens(2, 3, 5, 4)
    assert_close(mixer(x), share * x)


def test_what_a_token_becomes_depends_on_it_alone(build, tokens):
    mixer, x = build("Gate()", 4), tokens(1, 3, 5, 4)
    changed = x.clone()
    changed[0, 1, 2] += 1
    differs = (mixer(changed) != mixer(x)).any(-1)[0]
    assert differs.nonzero().tolist() == [[1, 2]]


def test_parameters():
    shapes = {k: tuple(v.shape) for k, v in glocal.build("Gate()", 6).named_parameters()}
    assert shapes == {"gate.weight": (6, 6), "gate.bias": (6,)}
    assert [k for k, _ in glocal.build("Gate(bias=False)", 6).named_parameters()] == ["gate.weight"]
    with pytest.raises(ValueError, match="bias: 1, must be True or False"):
        glocal.build("Gate(bias=1)", 6)


# planted by scripts/mutate
FAULTS = (
    ("the gate passes what is not salient", "torch.sigmoid(self.gate(x))", "torch.sigmoid(-self.gate(x))"),
    ("the gate is a value of its own, and x is lost", "return x * torch.sigmoid", "return torch.sigmoid"),
    ("no gradient reaches what the gate reads", "self.gate(x))", "self.gate(x.detach()))"),
    ("the bias is there whatever is asked for", "nn.Linear(dim, dim, bias=bias)", "nn.Linear(dim, dim)"),
    ("the gate normalises over channels", "torch.sigmoid(self.gate(x))", "self.gate(x).softmax(-1)"),
)
