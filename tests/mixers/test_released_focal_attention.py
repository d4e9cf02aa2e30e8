"""ReleasedFocalAttention against maps rolled and unfolded by torch, and against FocalAttention where both agree."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import glocal

HEADS, DIM = 2, 4


def spec_of(window, expand, focal, **arguments):
    options = {"window_size": window, "expand_size": expand, "focal_window": focal, "num_heads": HEADS, **arguments}
    return f"ReleasedFocalAttention({', '.join(f'{k}={v}' for k, v in options.items())})"


def cut(maps, w):
    """[B, H, W, C] -> [B * windows, heads, w * w, C / heads]."""
    batch, height, width, dim = maps.shape
    maps = maps.view(batch, height // w, w, width // w, w, HEADS, dim // HEADS)
    return maps.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, HEADS, w * w, dim // HEADS)


def offset_rows(queries, keys):
    """[queries^2, keys^2]: row of a table of (queries + keys - 1)^2 for query - key."""
    q = torch.cartesian_prod(torch.arange(queries), torch.arange(queries))
    k = torch.cartesian_prod(torch.arange(keys), torch.arange(keys))
    apart = q[:, None] - k + keys - 1
    return apart[..., 0] * (queries + keys - 1) + apart[..., 1]


def by_rolling(mixer, w, e, f):
    """Whole maps of keys and values, rolled towards the four corners; pooled ones unfolded."""

    def oracle(x):
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % w, 0, -height % w))
        batch, rows, columns, _ = x.shape
        q, k, v = mixer.qkv(x).chunk(3, -1)
        keys, values, biases = [cut(k, w)], [cut(v, w)], [mixer.relative_position_bias_table[offset_rows(w, w)]]
        biases[0] = biases[0].permute(2, 0, 1)
        if e:
            low, high = torch.arange(w) < e, torch.arange(w) >= w - e  # places that a roll fills from outside
            rolled_keys, rolled_values = [], []
            for up, left in ((-e, -e), (-e, e), (e, -e), (e, e)):
                new = ((high if up < 0 else low)[:, None] | (high if left < 0 else low)).flatten()
                rolled_keys.append(cut(k.roll((up, left), (1, 2)), w)[:, :, new])
                rolled_values.append(cut(v.roll((up, left), (1, 2)), w)[:, :, new])
            keys += rolled_keys
            values += rolled_values
            biases.append(mixer.relative_position_bias_table_to_neighbors[0])
        biases = [b.expand(batch * rows * columns // w**2, -1, -1, -1) for b in biases]
        if f:
            blocks = x.view(batch, rows // w, w, columns // w, w, DIM).permute(0, 1, 3, 5, 2, 4).flatten(-2)
            pooled = blocks @ mixer.pool_layers[0].weight[0] + mixer.pool_layers[0].bias  # [B, windows, windows, C]
            _, k, v = mixer.qkv(pooled).chunk(3, -1)
            for into, maps in ((keys, k), (values, v)):
                around = F.unfold(maps.permute(0, 3, 1, 2), f, padding=f // 2)  # [B, C * f * f, windows]
                around = around.view(batch, HEADS, DIM // HEADS, f * f, -1).permute(0, 4, 1, 3, 2)
                into.append(around.flatten(0, 1))
            there = F.unfold(torch.ones(batch, 1, rows // w, columns // w).double(), f, padding=f // 2)
            mask = torch.where(there > 0, 0.0, -100.0).transpose(1, 2).reshape(-1, 1, 1, f * f)
            biases.append(mixer.relative_position_bias_table_to_windows[0][:, offset_rows(w, f)] + mask)
        keys, values, bias = torch.cat(keys, 2), torch.cat(values, 2), torch.cat(biases, -1)
        scores = cut(q, w) @ keys.mT / (DIM // HEADS) ** 0.5 + bias
        out = scores.softmax(-1) @ values
        out = out.view(batch, rows // w, columns // w, HEADS, w, w, -1).permute(0, 1, 4, 2, 5, 3, 6)
        return mixer.proj(out.reshape(batch, rows, columns, DIM))[:, :height, :width]

    return oracle


@pytest.mark.parametrize(
    ("grid", "window", "expand", "focal"),
    [
        ((12, 8), 4, 2, 3),
        ((6, 9), 3, 1, 5),
        ((9, 13), 4, 1, 3),
        ((5, 7), 3, 1, 1),
        ((7, 5), 4, 2, 0),
        ((8, 6), 2, 0, 3),
        ((2, 3), 4, 1, 3),
        ((14, 21), 7, 3, 7),
    ],
)
def test_is_rolled_and_unfolded_maps(build, check, tokens, grid, window, expand, focal):
    mixer = build(spec_of(window, expand, focal), DIM)
    check(mixer, by_rolling(mixer, window, expand, focal), tokens(2, *grid, DIM))


def test_without_biases_of_q_k_and_v(build, check, tokens):
    mixer = build(spec_of(3, 1, 3, qkv_bias=False), DIM)
    check(mixer, by_rolling(mixer, 3, 1, 3), tokens(2, 7, 5, DIM))


@pytest.mark.parametrize(("length", "window", "expand", "focal"), [(13, 4, 2, 3), (10, 5, 1, 1), (3, 4, 2, 3)])
def test_a_sequence_is_the_loop_by_the_same_rules(build, check, tokens, length, window, expand, focal):
    mixer = build(spec_of(window, expand, focal, rank=1), DIM)
    ends = [*range(window, window + expand), *range(-expand, 0)]  # moved to the end, then to the start

    def oracle(x):
        whole = F.pad(x, (0, 0, 0, -length % window))
        count = whole.shape[1] // window
        qkv = mixer.qkv(whole).unflatten(-1, (3, HEADS, -1))
        pooled = torch.einsum("bwpc,p->bwc", whole.unflatten(1, (count, window)), mixer.pool_layers[0].weight[0])
        of_pooled = mixer.qkv(pooled + mixer.pool_layers[0].bias).unflatten(-1, (3, HEADS, -1))
        of_pooled = F.pad(of_pooled, (0, 0, 0, 0, 0, 0, focal // 2, focal // 2))  # zeros, not biases
        rows = []
        for i in range(length):
            home, place = divmod(i, window)
            near = [home * window + p for p in range(window)] + [(home * window + p) % (count * window) for p in ends]
            seen = torch.cat([qkv[:, near], of_pooled[:, home : home + focal]], 1)
            bias = [mixer.relative_position_bias_table[place - p + window - 1] for p in range(window)]
            bias += mixer.relative_position_bias_table_to_neighbors[0, :, place].T.unbind(0)
            for slot in range(focal):
                inside = 0 <= home + slot - focal // 2 < count
                row = mixer.relative_position_bias_table_to_windows[0][:, place - slot + focal - 1]
                bias.append(row if inside else row - 100)
            scores = (qkv[:, None, i, 0] * seen[:, :, 1]).sum(-1) / (DIM // HEADS) ** 0.5 + torch.stack(bias)
            rows.append((scores.softmax(1)[..., None] * seen[:, :, 2]).sum(1).flatten(1))
        return mixer.proj(torch.stack(rows, 1))

    check(mixer, oracle, tokens(2, length, DIM))


def test_the_mask_leaves_a_trace(build, check, tokens):
    """It is -100, not minus infinity: a bias of 100 lets a pooled window outside the grid dilute all others."""
    mixer = build(spec_of(2, 0, 3), DIM)
    with torch.no_grad():
        mixer.relative_position_bias_table_to_windows[0][:, -1].add_(100)  # seen from the last place to the first slot
    x = tokens(1, 4, 4, DIM)
    check(mixer, by_rolling(mixer, 2, 0, 3), x)
    found = mixer.weights(x)
    assert found.weights[(found.index < 0).expand_as(found.weights)].max() > 0.01


def test_far_from_the_border_is_focal_attention_with_one_entry_for_double_tokens(build, tokens):
    released = build(spec_of(7, 3, 3), DIM)
    masked = build(spec_of(7, 3, 3).removeprefix("Released"), DIM)
    masked.load_state_dict(released.state_dict())
    x, middle = tokens(1, 35, 35, DIM), slice(7, 28)
    once, twice = masked(x), released(x)
    assert (once - twice)[:, middle, middle].abs().max() > 1e-3
    index = released.weights(x, queries=torch.tensor([17 * 35 + 17])).index[0, 0, 0, 49 : 49 + 132].tolist()
    second = [i for i, source in enumerate(index) if source in index[:i]]
    assert len(second) == 12
    with torch.no_grad():
        released.relative_position_bias_table_to_neighbors[..., second] = -1e4
    assert_close(masked(x)[:, middle, middle], released(x)[:, middle, middle], rtol=0, atol=1e-9)
    assert (masked(x) - released(x))[:, 0].abs().max() > 1e-3  # at the border the released ring wraps around


def test_without_ring_and_pooled_windows_is_window_attention_with_zero_tokens(build, check, tokens):
    mixer = build(spec_of(3, 0, 0), DIM)
    plain = build("WindowAttention(window_size=3, num_heads=2, mask_padding=False)", DIM)
    plain.impl = "reference"
    check(
        mixer,
        lambda x: torch.func.functional_call(plain, dict(mixer.named_parameters()), (x,)),
        tokens(2, 7, 5, DIM),
    )


@pytest.mark.parametrize("impl", ["auto", "fast", "reference"])
def test_padded_images_are_refused(build, tokens, impl):
    mixer = build(spec_of(2, 1, 1), DIM)
    mixer.impl = impl
    valid = torch.ones(2, 4, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"ReleasedFocalAttention: valid was given, .* use FocalAttention"):
        mixer(tokens(2, 4, 6, DIM), valid=valid)
    with pytest.raises(ValueError, match="use FocalAttention"):
        mixer.weights(tokens(2, 4, 6, DIM), valid=valid)


def test_cost():
    """117 tokens, 150 with the zero ones, in 6 windows of 25 places; 25 + 36 + 9 slots."""
    mixer = glocal.build(spec_of(5, 1, 3), DIM)
    assert mixer.macs((9, 13)) == 2 * 117 * 16 + 2 * (150 + 6) * 16 + 2 * 6 * 25 * 4 + 2 * 117 * 70 * 4


def test_parameters_are_those_of_focal_attention():
    released, masked = (glocal.build(f"{name}FocalAttention(focal_window=5)", 64) for name in ("Released", ""))
    shapes = {k: v.shape for k, v in released.state_dict().items()}
    assert shapes == {k: v.shape for k, v in masked.state_dict().items()}
    assert (released.relative_position_bias_table == 0).all()
    assert 0.01 < released.pool_layers[0].weight.std() < 0.03  # no mean: overwritten at the end of the construction


# what the contract may hear
REFUSES = ("ReleasedFocalAttention: valid was given, the released code lets padding be seen",)

# planted by scripts/mutate
FAULTS = (
    ("the ring does not wrap around", "wrap=True", "wrap=False"),
    ("tokens of the ring count once", "ring_once=False", "ring_once=True"),
    ("pooled windows outside the grid are masked with minus infinity", "OUTSIDE = -100.0", "OUTSIDE = -1e9"),
    ("zero tokens stand in front", "for m in (0, end))", "for m in (end, 0))"),
    ("padding is taken without a word", "if valid is not None:", "if False:"),
    (
        "the definition has no mask",
        '"outside": _outside(index, x.dtype)[:, None]',
        '"outside": 0 * _outside(index, x.dtype)[:, None]',
    ),
    ("pooling starts as the mean", "nn.init.trunc_normal_(self.pool_layers[0].weight, std=0.02)", "pass"),
    (
        "the cost leaves out the zero tokens",
        "math.prod(self._whole(grid)), math.prod(self.counts(grid))",
        "math.prod(grid), math.prod(self.counts(grid))",
    ),
)
