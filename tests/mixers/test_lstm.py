"""LSTM against a loop over the gates' equations, and torch's own layer on each sequence alone."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import glocal
from glocal import contract

DIM = 6
LAYERS = [
    {},
    {"bidirectional": True},
    {"num_layers": 2, "hidden_dim": 5},
    {"num_layers": 2, "hidden_dim": 4, "bidirectional": True, "out_dim": 10},
    {"bias": False, "out_dim": 4, "hidden_dim": 2, "bidirectional": True},
]
ONE_WAY = [layers for layers in LAYERS if not layers.get("bidirectional")]


def spec_of(**arguments):
    return f"LSTM({', '.join(f'{k}={v}' for k, v in arguments.items())})"


def step(token, state, w, u, b, c):
    """Hochreiter and Schmidhuber's cell with a forget gate; rows of the matrices are i, f, g, o."""
    h, cell = state
    i, f, g, o = (w @ token + b + u @ h + c).chunk(4)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return torch.stack([o.sigmoid() * cell.tanh(), cell])


def by_loop(mixer):
    """Layer after layer, direction after direction, token after token; of each sequence its real tokens alone."""
    rnn = dict(mixer.rnn.named_parameters())
    hidden = mixer.rnn.hidden_size

    def run(tokens, name):
        w, u = rnn[f"weight_ih_{name}"], rnn[f"weight_hh_{name}"]
        zeros = torch.zeros(len(w), dtype=w.dtype)
        b, c = rnn.get(f"bias_ih_{name}", zeros), rnn.get(f"bias_hh_{name}", zeros)
        state, outputs = torch.zeros(2, hidden, dtype=w.dtype), []
        for token in tokens:
            state = step(token, state, w, u, b, c)
            outputs.append(state[0])
        return torch.stack(outputs)

    def one(tokens):
        for layer in range(mixer.num_layers):
            ahead = run(tokens, f"l{layer}")
            if mixer.bidirectional:
                back = run(tokens.flip(0), f"l{layer}_reverse").flip(0)
                ahead = torch.cat([ahead, back], -1)
            tokens = ahead
        return tokens if mixer.proj is None else mixer.proj(tokens)

    return lambda x, valid=None: torch.stack([one(tokens) for tokens in x])


def by_torch(mixer):
    rnn = mixer.rnn
    theirs = nn.LSTM(
        rnn.input_size, rnn.hidden_size, rnn.num_layers, bias=rnn.bias, bidirectional=rnn.bidirectional
    ).double()

    def oracle(x):
        out, _ = functional_call(theirs, dict(mixer.rnn.named_parameters()), (x.transpose(0, 1),))
        return out.transpose(0, 1) if mixer.proj is None else mixer.proj(out.transpose(0, 1))

    return oracle


@pytest.fixture
def same(tokens):
    """same(mixer, oracle): outputs and all gradients agree."""

    def same(mixer, oracle, record):
        x = tokens(2, 7, DIM).requires_grad_()
        leaves = [x, *mixer.parameters()]
        out, expected = mixer(x), oracle(x)
        upstream = torch.randn_like(expected)
        assert_close(out, expected, rtol=1e-9, atol=1e-10)
        pairs = zip(
            torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
        )
        largest = ((out - expected).abs().max() / expected.abs().max()).item()
        for got, wanted in pairs:
            assert_close(got, wanted, rtol=1e-9, atol=1e-10)
            largest = max(largest, ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)).item())
        record("oracle", oracle.__qualname__)
        record("difference", largest)

    return same


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("oracle", [by_loop, by_torch])
def test_is_the_recurrence(build, same, record_property, layers, oracle):
    mixer = build(spec_of(**layers), DIM)
    same(mixer, oracle(mixer), record_property)


@pytest.mark.parametrize("layers", LAYERS)
def test_torch_weights_load_by_their_names(layers):
    mixer = glocal.build(spec_of(**layers), DIM)
    rnn = mixer.rnn
    theirs = nn.LSTM(
        DIM,
        rnn.hidden_size,
        rnn.num_layers,
        bias=layers.get("bias", True),
        batch_first=True,
        bidirectional=rnn.bidirectional,
    )
    mixer.rnn.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 9, DIM)
    expected = theirs(x)[0] if mixer.proj is None else mixer.proj(theirs(x)[0])
    assert_close(mixer(x), expected)
    assert mixer(x).shape == (3, 9, mixer.out_dim)


@pytest.mark.parametrize("layers", LAYERS)
def test_each_sequence_of_a_padded_batch_is_as_if_alone(build, tokens, layers):
    mixer = build(spec_of(**layers), DIM)
    lengths = (5, 8, 1, 3)
    batch, valid = 100 * tokens(4, 8, DIM), torch.arange(8) < torch.tensor(lengths)[:, None]
    batch[~valid] = torch.tensor([float("nan"), float("inf"), 1, -1, 50, 0], dtype=torch.float64)
    batch.requires_grad_()
    out, oracle = mixer(batch, valid=valid), by_loop(mixer)
    alone = [batch.detach()[b, None, :n].clone().requires_grad_() for b, n in enumerate(lengths)]
    expected = [oracle(x) for x in alone]
    for b, n in enumerate(lengths):
        assert_close(out[b, None, :n], expected[b])
    upstream = [torch.randn_like(y) for y in expected]
    real = [out[b, None, :n] for b, n in enumerate(lengths)]
    weights = list(mixer.parameters())
    got = torch.autograd.grad(real, [batch, *weights], upstream)
    wanted = torch.autograd.grad(expected, [*alone, *weights], upstream)
    for b, n in enumerate(lengths):
        assert_close(got[0][b, None, :n], wanted[b])
        assert (got[0][b, n:] == 0).all()
    for one, other in zip(got[1:], wanted[len(lengths) :], strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("layers", LAYERS)
def test_padding_leaves_sequences_alone(build, check_padding, layers):
    mixer = build(spec_of(**layers), DIM)
    check_padding(mixer, [(4,), (7,)], DIM)


@pytest.mark.parametrize("layers", [{}, {"bidirectional": True}])
def test_padding_before_a_real_token_is_refused(build, tokens, layers):
    mixer = build(spec_of(**layers), DIM)
    for hole in ([False, True, True, True, True], [True, True, False, True, False]):
        valid = torch.ones(3, 5, dtype=torch.bool)
        valid[2] = torch.tensor(hole)
        place = hole.index(False) + 1
        with pytest.raises(ValueError, match=rf"padding before a real token \(sequence 2, token {place}\)"):
            mixer(tokens(3, 5, DIM), valid=valid)


@pytest.mark.parametrize("layers", ONE_WAY)
@pytest.mark.parametrize("steps", [[1] * 7, [3, 1, 2, 1], [7]])
def test_token_by_token_is_the_full_pass(build, tokens, layers, steps):
    mixer = build(spec_of(**layers), DIM)
    x, cache, rows, start = tokens(2, 7, DIM), glocal.Cache(), [], 0
    for step in steps:
        now = x[:, start : start + step]
        looked = mixer.mix(now, cache=cache)
        assert len(cache) == start
        rows.append(mixer(now, cache=cache))
        assert torch.equal(looked, rows[-1])
        start += step
        assert len(cache) == start
    assert_close(torch.cat(rows, 1), by_loop(mixer)(x))


def test_a_cache_of_sequences_that_end(build, tokens):
    mixer = build(spec_of(), DIM)
    x, cache, valid = tokens(2, 6, DIM), glocal.Cache(), torch.ones(2, 6, dtype=torch.bool)
    valid[1, 2:] = False
    first = mixer(x[:, :3], cache=cache, valid=valid[:, :3])
    copied = cache.copy()
    with pytest.raises(ValueError, match="valid is not given, a sequence of the cache has ended in padding"):
        mixer(x[:, 3:], cache=cache)
    rest = mixer(x[:, 3:], cache=cache, valid=valid)
    expected = by_loop(mixer)(x)
    assert_close(torch.cat([first, rest], 1)[0], expected[0])
    assert_close(first[1, :2], expected[1, :2])
    again = torch.ones(2, 6, dtype=torch.bool)
    again[1, 2] = False
    with pytest.raises(ValueError, match=r"padding before a real token \(sequence 1, token 3\)"):
        mixer(x[:, 3:], cache=copied, valid=again)
    with pytest.raises(ValueError, match="cache: remembers 2 sequences, x has 1"):
        mixer(x[:1, 3:], cache=copied)


def test_one_direction_reads_no_later_token(build, tokens):
    for layers in LAYERS:
        mixer = build(spec_of(**layers), DIM)
        x = tokens(1, 5, DIM)
        moved = torch.cat([x[:, :3], x[:, 3:] + 1], 1)
        assert torch.equal(mixer(x)[:, :3], mixer(moved)[:, :3]) == mixer.causal == (not layers.get("bidirectional"))


def test_what_it_refuses(build, tokens):
    mixer = build(spec_of(bidirectional=True), DIM)
    with pytest.raises(ValueError, match="LSTM: cache was given; it needs a causal operator"):
        mixer(tokens(1, 3, DIM), cache=glocal.Cache())
    with pytest.raises(ValueError, match="LSTM: built for rank 1, x has a grid of rank 2"):
        mixer(tokens(1, 3, 4, DIM))
    with pytest.raises(ValueError, match="out_dim: 7 channels cannot be shared by two directions; give hidden_dim"):
        build(spec_of(bidirectional=True), 7)
    for argument in ("hidden_dim", "num_layers", "out_dim"):
        with pytest.raises(ValueError, match=f"{argument}: 0, must be a positive whole number"):
            build(spec_of(**{argument: 0}), DIM)
    with pytest.raises(ValueError, match="bidirectional: 1, must be True or False"):
        build(spec_of(bidirectional=1), DIM)


@pytest.mark.parametrize("check", [contract.compiles, contract.exports])
def test_what_it_is_exempt_from_it_cannot_do(check):
    """And says so; the day it can, the exemption goes."""
    outcome = contract.run(spec_of(), check, (21,))
    assert outcome.state == "refused"
    assert outcome.sentence.startswith("LSTM: torch.")


def test_parameters_and_cost():
    mixer = glocal.build(spec_of(hidden_dim=5, bidirectional=True, num_layers=2), 8)
    gates = 4 * 5
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters() if "bias" not in name} == {
        "rnn.weight_ih_l0": (gates, 8),
        "rnn.weight_hh_l0": (gates, 5),
        "rnn.weight_ih_l0_reverse": (gates, 8),
        "rnn.weight_hh_l0_reverse": (gates, 5),
        "rnn.weight_ih_l1": (gates, 10),
        "rnn.weight_hh_l1": (gates, 5),
        "rnn.weight_ih_l1_reverse": (gates, 10),
        "rnn.weight_hh_l1_reverse": (gates, 5),
        "proj.weight": (8, 10),
    }
    assert mixer.macs((9,)) == 9 * (2 * gates * 13 + 2 * gates * 15 + 80)


def test_an_ended_sequence_does_not_go_on(build, tokens):
    mixer, x, cache = build("LSTM()", DIM), tokens(2, 6, DIM), glocal.Cache()
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 2:] = False
    mixer(x[:, :3], cache=cache, valid=valid[:, :3])
    with pytest.raises(ValueError, match="LSTM: valid is True behind the end of a sequence"):
        mixer(x[:, 3:], cache=cache, valid=torch.ones_like(valid))
    assert len(cache) == 3


# what the contract may hear
REFUSES = ("LSTM: torch",)

# planted by scripts/mutate
FAULTS = {
    "mixers/lstm.py": (
        ("padding is read on the way back", "return self.recur(x, valid, cache)", "return self.recur(x, None, cache)"),
        ("the state is forgotten", "return self.recur(x, valid, cache)", "return self.recur(x, valid, None)"),
        ("biases are left out", "out_dim=out_dim, bias=bias", "out_dim=out_dim, bias=False"),
        ("there is one layer only", "num_layers=num_layers", "num_layers=1"),
        ("another unit is held", "kind = nn.LSTM", "kind = nn.GRU"),
    ),
    ("mixers/_recurrent.py", "mixers/test_lstm.py", "mixers/test_gru.py"): (
        ("padding is read on the way back", "if valid is not None and self.bidirectional and len(x):", "if False:"),
        ("every call of a cache begins at zero", "zero if state is None else state", "zero"),
        ("padding may stand anywhere", "late = valid[:, 1:] & ~valid[:, :-1]", "late = valid[:, 1:] & ~valid[:, 1:]"),
        (
            "an ended sequence goes on from its padding",
            "ended is not None and valid is None and bool(ended.any())",
            "False",
        ),
        (
            "a batch of padding and sequences loses its length",
            "batch_first=True, total_length=x.shape[1])",
            "batch_first=True)",
        ),
        (
            "the map to the output's width is left out",
            "return out if self.proj is None else self.proj(out)",
            "return out[..., : self.out_dim]",
        ),
    ),
}
