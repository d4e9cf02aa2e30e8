"""Causal operators decode: with a cache, piece by piece, they give what they give at once."""

import inspect

import pytest
import torch
from torch.testing import assert_close

import glocal
from glocal import Cache, TokenMixer, contract, mixers

FAULTS = {
    "mixer.py": (
        ("what is kept is what came first", "max(joined.shape[1] - limit, 0) :]", ": min(joined.shape[1], limit)]"),
        ("a cache keeps everything", "joined if limit is None else", "joined if True else"),
        ("a copy does not know how many tokens were seen", "dict(self._past), self._length,", "dict(self._past), 0,"),
        ("a beam search goes on with the first", "index_select(0, sequences)", "narrow(0, 0, len(sequences))"),
        ("running sums are forgotten", "        self._next[name] = state", "        pass"),
    ),
    "operator.py": (
        ("a cache without an order is taken", 'if not getattr(self, "causal", False) or x.dim() != 3:', "if False:"),
        ("a mask begins with the first token", "valid[:, past - self._kept(call.get(\"cache\")) :]", "valid"),
        ("a cache beside another source is taken", 'call.keys() & {"source", "grid"}', "()"),
        ("more is kept than is remembered", "else min(past, self.remembers)", "else past"),
    ),
    "mixers/_grid.py": (
        ("positions start again with every piece", "offset=kept - len(cache), ", ""),
        ("queries stand where the kept tokens are", "return sources, places[kept:], places", "return sources, places[: grid[0]], places"),  # noqa: E501
    ),
}  # fmt: skip

LENGTH = 17
ENDS = {"token by token": range(1, LENGTH + 1), "in pieces": (1, 6, 7, 9, 17), "at once": (17,)}
CAUSAL = [s for s in contract.examples() if getattr(glocal.build(s, contract.DIM), "causal", False)]
ORDERS = {"causal", "bidirectional"}  # arguments that decide whether tokens have an order
ORDERED = [n for n in glocal.available() if ORDERS & inspect.signature(getattr(mixers, n)).parameters.keys()]


@pytest.fixture(params=CAUSAL)
def mixer(request):
    mixer = glocal.build(request.param, contract.DIM).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


@pytest.fixture
def weighted(mixer):
    if not isinstance(mixer, TokenMixer):
        pytest.skip("an ordinary module: it has no weights")
    return mixer


@pytest.fixture(params=["definition", "fast path"])
def path(request, mixer):
    return mixer.reference if request.param == "definition" else mixer


def tokens(length=LENGTH):
    return torch.randn(2, length, contract.DIM, dtype=torch.float64)


def padding(mixer):
    """A sequence without any, and one that begins and ends with it and has holes; a recurrence goes to its end only."""
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[1, [0, 1, 5, 8, 9, 15, 16] if isinstance(mixer, TokenMixer) else slice(8, None)] = False
    return valid


def in_pieces(path, x, ends, **whole):
    """The pieces' outputs; `valid` is cut to what was seen so far, positions to the piece."""
    cache, out, start = Cache(), [], 0
    for end in ends:
        call = {k: v[:, :end] if k == "valid" else v[:, start:end] for k, v in whole.items()}
        out.append(path(x[:, start:end], cache=cache, **call))
        start = end
    assert len(cache) == start
    return torch.cat(out, 1)


def test_every_operator_with_an_order_has_an_example_that_decodes():
    """No causal operator may be left out in silence."""
    covered = {spec.partition("(")[0] for spec in CAUSAL}
    assert covered == {*ORDERED} and len(covered) >= 6
    for spec in CAUSAL:
        assert contract.fits(spec, (LENGTH,)), spec


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize("masked", [False, True])
def test_pieces_equal_the_whole(mixer, path, ends, masked, record_property):
    x, valid = tokens(), padding(mixer)
    call = {"valid": valid} if masked else {}
    real = valid if masked else torch.ones_like(valid)
    whole, pieces = path(x, **call)[real], in_pieces(path, x, ends, **call)[real]
    record_property("difference", ((whole - pieces).abs().max() / whole.abs().max()).item())
    assert_close(pieces, whole, rtol=1e-10, atol=1e-10)


def test_what_stands_in_padding_is_not_remembered(mixer, path):
    x, valid = tokens(), padding(mixer)
    rubbish = torch.where(valid[..., None], x, torch.full_like(x, torch.nan))
    one, other = (in_pieces(path, t, ENDS["in pieces"], valid=valid)[valid] for t in (x, rubbish))
    assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_gradients_go_back_through_the_cache(mixer, path):
    x, parameters = tokens().requires_grad_(), list(mixer.parameters())
    upstream = tokens()
    whole = torch.autograd.grad(path(x), [x, *parameters], upstream)
    pieces = torch.autograd.grad(in_pieces(path, x, ENDS["in pieces"]), [x, *parameters], upstream)
    for one, other in zip(pieces, whole, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_no_output_depends_on_a_later_token(mixer, path):
    x = tokens().requires_grad_()
    y = path(x)
    for t in (0, 5, LENGTH - 1):
        (grad,) = torch.autograd.grad(y[:, t].square().sum(), x, retain_graph=True)
        assert (grad[:, t + 1 :] == 0).all() and (grad[:, t] != 0).any()


def test_weights_of_a_piece_are_rows_of_the_whole(mixer, weighted):
    """By the positions of its sources; what has none, or is no longer kept, weighs what is missing."""
    x, cache, seen = tokens(), Cache(), 7
    whole = mixer.weights(x[:, : seen + 3]).dense().expand(2, -1, -1, -1)[:, :, seen:]
    mixer(x[:, :seen], cache=cache)
    found = mixer.weights(x[:, seen : seen + 3], cache=cache)
    assert found.query_positions.tolist() == [[7], [8], [9]] and found.out_grid == (3,)
    assert len(found.source_positions) == found.num_sources
    rows, at = found.dense().expand(2, -1, -1, -1), found.source_positions[:, 0]
    known = ~at.isnan()
    assert at[known].tolist() == list(range(10))[-int(known.sum()) :]
    assert_close(rows[..., known], whole[..., at[known].long()])
    assert_close(rows.sum(-1), whole.sum(-1))
    # the same for some of the piece's queries
    some = mixer.weights(x[:, seen : seen + 3], cache=cache, queries=torch.tensor([2, 0]))
    assert_close(some.dense().expand_as(rows[:, :, :2]), rows[:, :, [2, 0]])
    assert some.query_positions.tolist() == [[9], [7]]
    y = mixer(x[:, seen : seen + 3], cache=cache.copy())
    assert_close(mixer(x[:, seen : seen + 3], cache=cache.copy(), queries=torch.tensor([2, 0])), y[:, [2, 0]])


def test_looking_and_copies_leave_a_cache_as_it_was(mixer, path):
    x, cache = tokens(), Cache()
    whole = path(x)
    path(x[:, :9], cache=cache)
    (mixer.weights if isinstance(mixer, TokenMixer) else mixer.mix)(tokens(4), cache=cache)
    path(tokens(3), cache=cache.copy())
    assert len(cache) == 9
    assert_close(path(x[:, 9:], cache=cache), whole[:, 9:], rtol=1e-10, atol=1e-10)


def test_a_beam_search_keeps_some_sequences_and_doubles_others(mixer, path):
    x, cache, beams = torch.cat([tokens(), tokens()]), Cache(), torch.tensor([3, 0, 3])
    path(x[:, :9], cache=cache)
    before = cache.copy()
    cache.reorder(beams)
    whole = path(torch.cat([x[beams, :9], x[:3, 9:]], 1))
    assert_close(path(x[:3, 9:], cache=cache), whole[:, 9:], rtol=1e-10, atol=1e-10)
    assert_close(path(x[:, 9:], cache=before), path(x)[:, 9:], rtol=1e-10, atol=1e-10)


def test_what_is_kept_does_not_grow_where_it_need_not(mixer):
    """Convolutions and neighborhoods keep what their taps reach, linear attention its sums, recurrent layers their
    states, attention everything."""
    cache, sizes, x = Cache(), [], tokens()
    for end in (1, 16, 17):
        mixer(x[:, len(cache) : end], cache=cache)
        sizes.append(sum(t.numel() for t in cache._past.values()))
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in cache._past.values())
    if type(mixer).__name__ in ("MultiScaleAttention", "RotaryAttention", "SelfAttention"):
        assert sizes == [2 * 64 * n for n in (1, 16, 17)] and mixer.remembers is None
    else:
        assert sizes[1] == sizes[2]
        assert not isinstance(mixer, TokenMixer) or mixer.remembers < 16


def test_a_cache_takes_the_same_sequences_in_one_dimension(mixer):
    name, x, cache = type(mixer).__name__, tokens(), Cache()
    mixer(x[:, :5], cache=cache)
    with pytest.raises(ValueError, match="cache: remembers 2 sequences, x has 1"):
        mixer(x[:1, 5:], cache=cache)
    with pytest.raises(ValueError, match=rf"{name}: valid has shape \(2, 12\).* needs \(2, 17\)"):
        mixer(x[:, 5:], cache=cache, valid=torch.ones(2, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"{name}: grid was given with a cache"):
        mixer(x[:, 5:], cache=cache, grid=(12,))
    assert_close(mixer(x[:, 5:], cache=cache), mixer(x)[:, 5:])  # nothing refused was remembered


@pytest.mark.parametrize("name", glocal.available())
def test_operators_that_cannot_decode_say_so(name):
    """All that have no order, and those that could have one but are built without, or for images."""
    for spec in getattr(mixers, name).examples:
        mixer = glocal.build(spec, contract.DIM)
        for grid in ((8, 8), (9,)):
            if mixer.needs_source:
                continue  # its cache remembers the source: tests/mixers/test_cross_attention.py
            if contract.fits(spec, grid) and not (spec in CAUSAL and len(grid) == 1):
                said = "cache was given; it needs a causal operator" if name in ORDERED else "does not take cache"
                with pytest.raises(ValueError, match=f"{name}: {said}"):
                    mixer(torch.zeros(2, *grid, contract.DIM), cache=Cache())


@pytest.mark.parametrize("spec", ["SelfAttention(causal=True)", "LinearAttention(causal=True)"])
def test_positions_are_those_of_the_new_tokens(spec):
    mixer, x, places = glocal.build(spec, 32).double(), tokens(), tokens()
    for path in (mixer, mixer.reference):
        for ends in ENDS.values():
            assert_close(in_pieces(path, x, ends, pos_embed=places), path(x, pos_embed=places))
    with pytest.raises(ValueError, match="source was given with a cache"):
        mixer(x, x, cache=Cache())
