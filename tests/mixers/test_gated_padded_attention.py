"""GatedPaddedAttention against a loop over the places of a grid that torch has padded, and against ConViT's layer."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import glocal

from .padded_loop import CASES, MODES, spec_of

DIM = 4
NAME = "GatedPaddedAttention"

FAULTS = (
    ("the gate is that of positions", '"position": (1 - share, position)', '"position": (share, position)'),
    ("the fast path adds content to all of the position", "position.value * (1 - share)", "position.value"),
    ("content is let in ungated", "position.valued(by_content, position.value * share)",
     "position.valued(by_content, position.value)"),
    ("a shut gate has no gradient", "torch.where(self.gate < 0, -self.gate, self.gate).tanh()",
     "self.gate.abs().tanh()"),
    ("a step below 0 shuts a gate for good", "torch.where(self.gate < 0, -self.gate, self.gate).tanh()",
     "self.gate.clamp(min=0).tanh()"),
    ("a gate below 0 takes content away", "torch.where(self.gate < 0, -self.gate, self.gate).tanh()",
     "self.gate.tanh()"),
    ("a gate may go beyond 1", "-self.gate, self.gate).tanh()", "-self.gate, self.gate)"),
    ("gates start open", "nn.Parameter(torch.zeros(self.num_heads))", "nn.Parameter(torch.ones(self.num_heads))"),
    ("zero padding has content weight", "seen = index >= 0 if seen is None", "seen = None if seen is None"),
    ("padded images have content beyond their ends", "else seen & (index >= 0)", "else index >= -1"),
    ("queries are not scaled", "(self.num_heads, -1)) * self.scale", "(self.num_heads, -1))"),
    ("every query asks with the first source", "pick_or_zero(x.flatten(1, -2), index if",
     "pick_or_zero(x.flatten(1, -2), 0 * index if"),
    ("content of other paddings is read once", 'if self.padding_mode != "zeros":', "if False:"),
    ("only one encoding", "ENCODINGS[encoding](", "ENCODINGS['quadratic']("),
    ("content is left out where gates are open", "and not self.gate.any()", ""),
    ("gates are waited for", 'or x.device.type != "cpu":', "or x.is_meta:"),
    ("shut gates do not learn", "return not (learning and torch.is_grad_enabled()) and", "return"),
    ("all weights are formed", "more = self.dim - self.head_dim", "more = 0"),
    ("keys and queries start large", "std=0.02", "std=2.0"),
)  # fmt: skip


def loop_of(mixer, kernel, stride, dilation, padding, groups, mode):
    """Head by head, query by query: what stands at a place is what torch's padding puts there."""

    def score(head, place, query):
        position = mixer.position
        if mixer.encoding == "quadratic":
            apart = zip(place, query, position.centers[head], strict=True)
            return -sum((position.spreads[head] * (p - q - c)) ** 2 for p, q, c in apart) / 2
        total = 0
        for table, p, q, side, k, d in zip(position.tables, place, query, padding, kernel, dilation, strict=True):
            tap, last = p - q + side, d * (k - 1)
            total = total + table[head, 0 if tap < 0 else last + 2 if tap > last else tap + 1]
        return total

    def oracle(x, pos_embed=0):
        sides = [p for p in reversed(padding) for _ in range(2)]

        def padded(tokens, how):
            return F.pad(tokens.movedim(-1, 1), sides, how).movedim(1, -1)

        read, asked = padded(x, MODES[mode]), padded(x + pos_embed, MODES[mode])
        there = padded(torch.ones_like(x[:1]), "constant" if mode == "zeros" else MODES[mode])[0, ..., 0].flatten() > 0
        grid, extended = x.shape[1:-1], read.shape[1:-1]
        places = [[e - p for e, p in zip(each, padding, strict=True)] for each in product(*map(range, extended))]
        read, keys = read.flatten(1, -2).unflatten(-1, (groups, -1)), asked.flatten(1, -2) @ mixer.k.weight.T
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        axes = zip(grid, padding, reach, stride, strict=True)
        out = [(n + 2 * p - r - 1) // s + 1 for n, p, r, s in axes]
        width, gates, rows = mixer.head_dim, mixer.gate.abs().tanh(), []
        for number in product(*map(range, out)):
            query = [i * s for i, s in zip(number, stride, strict=True)]
            middle = [i + r // 2 for i, r in zip(query, reach, strict=True)]  # among the padded places
            asking = asked[(slice(None), *middle)] @ mixer.q.weight.T
            total = 0
            for head in range(mixer.num_heads):
                own = slice(head * width, (head + 1) * width)
                compared = (keys[..., own] @ asking[:, own, None])[..., 0] / width**0.5
                content = compared.masked_fill(~there, -torch.inf).softmax(-1)
                position = torch.stack([score(head, place, query) for place in places]).softmax(0)
                shares = (1 - gates[head]) * position + gates[head] * content
                mixed = (shares[:, :, None, None] * read).sum(1)
                total = total + (mixed[..., None] * mixer.position.value[head]).sum(2).flatten(1)
            rows.append(total if mixer.bias is None else total + mixer.bias)
        return torch.stack(rows, 1).view(len(x), *out, -1)

    return oracle


@pytest.mark.parametrize("head_dim", [2, 6])  # fewer and more than channels
@pytest.mark.parametrize(("grid", "kernel", "stride", "dilation", "padding", "groups", "out_dim", "mode"), CASES)
def test_is_the_loop(build, check, tokens, grid, kernel, stride, dilation, padding, groups, out_dim, mode, head_dim):
    given = (kernel, stride, dilation, padding, groups, out_dim, mode)
    encoding = "quadratic" if head_dim == 2 else "learned"
    mixer = build(spec_of(NAME, *given, head_dim=head_dim, encoding=encoding), DIM)
    with torch.no_grad():
        mixer.gate[0].abs_().neg_()
        mixer.gate[1:].abs_()
    check(mixer, loop_of(mixer, kernel, stride, dilation, padding, groups, mode), tokens(2, *grid, DIM))


def test_positions_are_for_queries_and_keys_only(build, check, tokens):
    mixer = build(f"{NAME}(padding=1, head_dim=3)", DIM)
    oracle = loop_of(mixer, (3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    check(mixer, oracle, tokens(2, 3, 4, DIM), pos_embed=tokens(3, 4, DIM))


def test_is_convits_layer_where_that_has_one_head(build, tokens):
    """One tap, the values of all channels, the gate the other way round."""
    mixer = build(f"{NAME}(kernel_size=1, head_dim={DIM})", DIM)
    convit = glocal.build("GatedPositionalAttention(num_heads=1)", DIM).double()
    with torch.no_grad():
        centre, square = mixer.position.centers[0], mixer.position.spreads[0] ** 2 / 2
        convit.pos_proj.weight.copy_(torch.stack([2 * square * centre[1], 2 * square * centre[0], -square])[None])
        convit.qk.weight.copy_(torch.cat([mixer.q.weight, mixer.k.weight]))
        convit.v.weight.copy_(torch.eye(DIM))
        convit.proj.weight.copy_(mixer.position.value[0, 0].T)
        convit.proj.bias.copy_(mixer.bias)
        convit.gating_param.copy_(torch.logit(1 - mixer.gate.abs().tanh()))
    x = tokens(2, 5, 6, DIM)
    for impl in ("reference", "fast"):
        mixer.impl = impl
        assert_close(mixer(x), convit(x))
    assert_close(mixer.weights(x).weights, convit.weights(x).weights)


@pytest.mark.parametrize("encoding", ["quadratic", "learned"])
def test_starts_as_its_position_exactly(encoding, tokens):
    mixer = glocal.build(f"{NAME}(kernel_size=(3, 2), padding=1, encoding={encoding!r})", DIM).double()
    x = tokens(2, 5, 6, DIM)
    assert mixer.gates().tolist() == [0.0] * 6
    assert_close(mixer(x), mixer.position(x), rtol=0, atol=1e-15)
    assert torch.equal(mixer.weights(x).weights, mixer.position.weights(x).weights.expand(2, -1, -1, -1))
    with torch.no_grad():
        assert torch.equal(mixer(x), mixer.position(x))
    assert mixer.q.weight.abs().max() < 0.1


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_a_shut_gate_learns(impl, tokens):
    """Its gradient is what opening it a little would do; queries and keys follow once it is open."""
    torch.manual_seed(0)
    mixer = glocal.build(f"{NAME}(padding=1, head_dim=4)", DIM).double()
    mixer.impl = impl
    x, upstream = tokens(1, 4, 5, DIM), tokens(1, 4, 5, DIM)
    grads = torch.autograd.grad((mixer(x) * upstream).sum(), [mixer.gate, mixer.q.weight, mixer.k.weight])
    assert grads[0].abs().min() > 1e-3 and not grads[1].any() and not grads[2].any()
    shut = (mixer(x) * upstream).sum().item()
    for head in range(9):
        for step in (1e-6, -1e-6):  # to either side
            with torch.no_grad():
                mixer.gate.zero_()[head] = step
                slope = ((mixer(x) * upstream).sum().item() - shut) / 1e-6
            assert slope == pytest.approx(grads[0][head].item(), rel=1e-3, abs=1e-6)
    for value in (0.3, -0.3):
        with torch.no_grad():
            mixer.gate.fill_(value)
        assert all(g.any() for g in torch.autograd.grad(mixer(x).sum(), [mixer.gate, mixer.q.weight, mixer.k.weight]))
    with torch.no_grad():
        mixer.gate.copy_(torch.linspace(-30, 30, 9))
        assert mixer.gates().min() >= 0 and mixer.gates().max() <= 1


def test_content_is_computed_where_it_counts(tokens):
    """Not where every gate is shut and no gradients are asked for."""
    mixer = glocal.build(f"{NAME}(padding=1)", DIM).double()
    called = []
    mixer.k.register_forward_hook(lambda *_: called.append(1))
    x = tokens(1, 4, 5, DIM)
    with torch.no_grad():
        mixer(x)
        assert not called
        mixer.gate[3] = -0.1
        mixer(x)
        assert len(called) == 1
        mixer.gate[3] = 0.0
    mixer(x)
    assert len(called) == 2
    mixer.gate.requires_grad_(False)
    mixer(x)
    assert len(called) == 3  # keys have gradients, zero ones
    mixer.requires_grad_(False)
    mixer(x)
    assert len(called) == 3


def test_gates_on_a_gpu_are_not_waited_for(tokens):
    """The host would stand still until the device has answered."""
    mixer = glocal.build(f"{NAME}(padding=1)", DIM).double()
    with torch.no_grad():
        assert mixer._shut(tokens(1, 4, 5, DIM))
        mixer.gate = None  # nobody may look at it
        for device in ("cuda", "mps", "meta"):
            assert not mixer._shut(SimpleNamespace(device=torch.device(device), is_meta=device == "meta"))


@pytest.mark.parametrize("mode", MODES)
def test_rows_sum_to_one_and_nothing_stands_in_zero_padding(build, mode, tokens):
    mixer = build(f"{NAME}(padding=1, padding_mode={mode!r})", DIM)
    x = tokens(2, 5, 6, DIM)
    with torch.no_grad():
        mixer.gate.fill_(30.0)  # content alone
        content = mixer.weights(x)
        mixer.gate.fill_(0.5)
        both = mixer.weights(x)
    for found in (content, both):
        assert found.weights.shape == (2, 9, 30, 7 * 8)
        assert_close(found.weights.sum(-1), torch.ones(2, 9, 30, dtype=torch.float64))
    outside = content.index[0, 0, 0] < 0
    assert outside.sum() == (26 if mode == "zeros" else 0)
    assert not content.weights[..., outside].any() and content.weights[..., ~outside].min() > 0
    assert_close(content.dense().sum(-1), torch.ones(2, 9, 30, dtype=torch.float64))
    assert (both.dense().sum(-1) < 1 - 1e-3).any() == (mode == "zeros")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extents", [[(4, 3), (2, 5)], [(4,), (7,)]])
def test_padded_batches_leave_images_alone(build, mode, extents, tokens):
    """Each image has a border of its own, with what its padding reads and asks."""
    rank = len(extents[0])
    mixer = build(f"{NAME}(kernel_size={(2, 3)[:rank]}, padding=2, padding_mode={mode!r}, rank={rank})", DIM)
    grid = [max(lengths) + 1 for lengths in zip(*extents, strict=True)]
    batch = 100 * tokens(len(extents), *grid, DIM)
    valid = torch.zeros(batch.shape[:-1], dtype=torch.bool)
    for b, extent in enumerate(extents):
        batch[(b, *map(slice, extent))] /= 100
        valid[(b, *map(slice, extent))] = True
    out = mixer(batch, valid=valid)
    for b, extent in enumerate(extents):
        alone = mixer(batch[(slice(b, b + 1), *map(slice, extent))])
        assert_close(out[(slice(b, b + 1), *map(slice, alone.shape[1:-1]))], alone)


@pytest.mark.parametrize("head_dim", [4, 32])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_no_matrix_of_all_pairs_is_formed(largest, mode, head_dim):
    mixer = glocal.build(f"{NAME}(padding=1, alpha=2.0, padding_mode={mode!r}, head_dim={head_dim})", 16)
    x = torch.randn(1, 32, 32, 16, requires_grad=True)
    with largest() as found:
        mixer(x).sum().backward()
    assert found.entries <= 9 * 34 * 34 * 32  # heads, places, channels; all pairs would be 9 * 1024 * 1156


def test_places_and_tables_are_not_decayed():
    assert glocal.build(f"{NAME}()", DIM).no_weight_decay() == {"position.centers", "position.spreads"}
    learned = glocal.build(f"{NAME}(encoding='learned')", DIM)
    assert learned.no_weight_decay() == {"position.tables.0", "position.tables.1"}
    assert repr(learned) == f"{NAME}(encoding='learned')" and "head_dim=5" in repr(
        glocal.build(f"{NAME}(head_dim=5)", 4)
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("encoding='cubic'", "encoding: 'cubic', must be 'quadratic' or 'learned'"),
        ("head_dim=0", "head_dim: 0, must be a positive whole number"),
        ("padding='same', stride=2", r"padding: 'same' with stride \(2, 2\)"),
        ("groups=3", "groups: 3 must divide dim 4 and out_dim 4"),
        ("alpha=-1", "alpha: -1, must be a positive number"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        glocal.build(f"{NAME}({options})", DIM)
