"""Focal Transformer against the released rules, window by window, by the release's names; its published sizes."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import glocal
from glocal.analysis import cost
from glocal.models.keys.focal import from_official, to_official

SMALL = {"dims": (8, 12), "num_heads": (2, 3), "depths": (2, 1), "window_size": 3, "expand_size": 1,
         "focal_windows": (5, 3), "num_classes": 5, "mlp_ratio": 2}  # fmt: skip

FAULTS = {
    "models/focal.py": (
        ("windows are as long as the longer side", "-(-min(per_axis(", "-(-max(per_axis("),
        ("windows are not cut to the image", "window_size=min(window_size, tokens),", "window_size=window_size,"),
        ("a window that is the image has a ring", "if tokens > window_size else", "if tokens >= window_size else"),
        ("no window has a ring", "expand_size=expand_size if", "expand_size=0 if"),
        ("tokens are not halved in each stage", "-(-shorter // 2**stage)", "shorter"),
        ("an odd side is cut", "-(-shorter // 2**stage)", "shorter // 2**stage"),
        ("all stages have the first one's focal windows", "focal_window=focal[stage]", "focal_window=focal[0]"),
        ("heads are those of the default", "num_heads=heads[stage],", "num_heads=None,"),
        ("queries always have biases", "qkv_bias=qkv_bias,", "qkv_bias=True,"),
        ("MLPs are always 4 times as wide", "mlp_ratio=mlp_ratio, drop", "mlp_ratio=4, drop"),
        ("tokens are merged as Swin's", "            merging=PatchDownsample,\n", ""),
        ("the paper's pooling starts at random", 'if mixer == "FocalAttention":', "if False:"),
        ("the released pooling starts as the mean", 'if mixer == "FocalAttention":', "if True:"),
        (
            "the plain name is the paper's",
            '"focal_tiny": partial(FocalTransformer, "Released',
            '"focal_tiny": partial(FocalTransformer, "',
        ),
        ("the base one is narrower", "(128, 256, 512, 1024)", "(96, 192, 384, 768)"),
    ),
    "models/parts.py": (
        ("coarser tokens never have a norm", "(dim, out_dim, 2, norm=norm)", "(dim, out_dim, 2, norm=False)"),
        ("all stages are merged as Swin's", "stages.append(Stage(merging(", "stages.append(Stage(PatchMerging("),
    ),
    "models/keys/focal.py": (
        ("coarser tokens stay where they were", 'f"layers.{i + 1}.downsample")', 'f"layers.{i}.downsample")'),
        ("pooling is looked for in the block", 'f"{_BLOCK}.attn.pool_layers"', 'f"{_BLOCK}.pool_layers"'),
        ("indices are weights", "relative_position_index(_\\d+)?|", "relative_position_index_\\d+|"),
        ("the ring's places are weights", "|valid_ind_rolled)", ")"),
        ("offsets count from the place", "place[:, None] - source + sources", "source - place[:, None] + window"),
        ("columns come before rows", "torch.arange(n), torch.arange(n))", "torch.arange(n), torch.arange(n)).flip(1)"),
        ("corners come in another order", "(end, start), (start, end)", "(start, end), (end, start)"),
        ("a ring is one token deep", "expand = window - math.isqrt(window**2 - count // 4)", "expand = 1"),
        ("the table of the window has the pooled windows' rows", '_rows(window, window)', '_rows(window, 1)'),
        ("files of the release are not known", 'Source("layers.0.blocks.0.pool', 'Source("layers.0.blocks.9.pool'),
    ),
}  # fmt: skip


def at_random(model):
    """A model whose every parameter says something, in double precision and evaluation."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("weight") and parameter.dim() == 1:
            noise = 1 + 0.3 * noise
        elif name.endswith("weight"):
            noise = noise * parameter[0].numel() ** -0.5
        parameter.data = noise
    return model.double().eval()


def small(name="focal_tiny", **arguments):
    return glocal.create_model(name, **{**SMALL, "img_size": (32, 44), **arguments})


# The released network, from its state dict alone


def released(state, image, depths, heads):
    """Scores, one window after the other."""

    def of(name, default=None):
        return state.get(name, default)

    def embedded(name, x, patch):
        """Patches, completed by zeros, and their norm: [B, H, W, C]."""
        x = F.pad(x, (0, -x.shape[3] % patch, 0, -x.shape[2] % patch))
        x = F.conv2d(x, of(f"{name}.proj.weight"), of(f"{name}.proj.bias"), stride=patch).permute(0, 2, 3, 1)
        return normed(f"{name}.norm", x)

    def normed(name, x):
        return F.layer_norm(x, x.shape[-1:], of(f"{name}.weight"), of(f"{name}.bias"))

    x = embedded("patch_embed", image, 4)
    for i, depth in enumerate(depths):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            x = x + focal(of, block, normed(f"{block}.norm1", x), heads[i])
            hidden = F.linear(normed(f"{block}.norm2", x), of(f"{block}.mlp.fc1.weight"), of(f"{block}.mlp.fc1.bias"))
            x = x + F.linear(F.gelu(hidden), of(f"{block}.mlp.fc2.weight"), of(f"{block}.mlp.fc2.bias"))
        if i + 1 < len(depths):
            x = embedded(f"layers.{i}.downsample", x.permute(0, 3, 1, 2), 2)
    return F.linear(normed("norm", x).mean((1, 2)), of("head.weight"), of("head.bias"))


def focal(of, block, x, heads):
    """Attention of a block: windows, a ring that wraps around, pooled windows."""
    attn, (height, width), dim = f"{block}.attn", x.shape[1:3], x.shape[3]
    places = of(f"{attn}.relative_position_index").shape[0]
    w = int(places**0.5)
    x = F.pad(x, (0, 0, 0, -width % w, 0, -height % w))
    rows, columns = x.shape[1] // w, x.shape[2] // w
    project, bias_of = of(f"{attn}.qkv.weight"), of(f"{attn}.qkv.bias")
    q, k, v = F.linear(x, project, bias_of).chunk(3, -1)
    table = of(f"{attn}.relative_position_bias_table")
    own_bias = table[of(f"{attn}.relative_position_index").flatten()].view(places, places, heads).permute(2, 0, 1)
    ring, ring_bias = of(f"{attn}.valid_ind_rolled"), of(f"{attn}.relative_position_bias_table_to_neighbors")
    to_pooled = of(f"{attn}.relative_position_index_0")
    far_bias = of(f"{attn}.relative_position_bias_table_to_windows.0")[:, to_pooled.flatten()].view(heads, places, -1)
    f = int(to_pooled.shape[1] ** 0.5)
    if ring is not None:
        e = next(e for e in range(1, w) if 4 * (w * w - (w - e) ** 2) == len(ring))

    def pooled(r, c):
        """Keys and values of a whole window: one weight for each place."""
        inside = x[:, r * w : (r + 1) * w, c * w : (c + 1) * w].flatten(1, 2)
        token = torch.einsum("bpc,p->bc", inside, of(f"{block}.pool_layers.0.weight")[0])
        token = token + of(f"{block}.pool_layers.0.bias")
        return F.linear(token, project, bias_of).chunk(3, -1)[1:]

    out = torch.zeros_like(x)
    for r in range(rows):
        for c in range(columns):
            at = [(r * w + a, c * w + b) for a in range(w) for b in range(w)]
            seen, bias = list(at), [own_bias]
            if ring is not None:
                corners = [(e, e), (e, -e), (-e, e), (-e, -e)]
                moved = [((y + up) % (rows * w), (z + left) % (columns * w)) for up, left in corners for y, z in at]
                seen += [moved[i] for i in ring.tolist()]
                bias.append(ring_bias[0])
            keys = [k[:, y, z] for y, z in seen]
            values = [v[:, y, z] for y, z in seen]
            far = far_bias.clone()
            for slot in range(f * f):
                y, z = r + slot // f - f // 2, c + slot % f - f // 2
                if 0 <= y < rows and 0 <= z < columns:
                    key, value = pooled(y, z)
                else:
                    key = value = torch.zeros_like(keys[0])
                    far[:, :, slot] = far[:, :, slot] - 100
                keys.append(key)
                values.append(value)
            bias.append(far)
            queries = torch.stack([q[:, y, z] for y, z in at], 1)
            parts = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in
                     (queries, torch.stack(keys, 1), torch.stack(values, 1)))  # fmt: skip
            mine, keys, values = parts
            scores = mine @ keys.mT * (dim // heads) ** -0.5 + torch.cat(bias, -1)
            mixed = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
            out[:, r * w : (r + 1) * w, c * w : (c + 1) * w] = mixed.unflatten(1, (w, w))
    out = out[:, :height, :width]
    return F.linear(out, of(f"{attn}.proj.weight"), of(f"{attn}.proj.bias"))


@pytest.mark.parametrize(
    ("native", "size", "arguments"),
    [
        ((32, 44), (32, 44), {}),
        ((24, 24), (24, 24), {}),  # the second stage is one window, without a ring
        ((48, 24), (48, 24), {"qkv_bias": False}),  # one window wide
        ((16, 24), (16, 24), {"depths": (1, 1)}),  # windows of the second stage are cut to two tokens
        ((20, 28), (20, 28), {"depths": (1, 1)}),  # the second stage has an odd side
        ((36, 40), (61, 35), {"depths": (1, 1)}),  # another size than it is made for
        ((60, 60), (60, 60), {"window_size": 5, "expand_size": 2, "depths": (1, 1), "focal_windows": (3, 1)}),
    ],
)
def test_is_the_released_network(native, size, arguments):
    options = {**SMALL, "img_size": native, **arguments}
    ours = at_random(glocal.create_model("focal_tiny", **options))
    state = to_official({**ours.state_dict(keep_vars=True)})
    image, found = torch.randn(2, 3, *size, dtype=torch.float64), []
    for network in (ours, lambda x: released(state, x, options["depths"], options["num_heads"])):
        ours.zero_grad()
        x = image.clone().requires_grad_()
        scores = network(x)
        (scores * torch.linspace(-1, 2, scores.numel(), dtype=torch.float64).view(scores.shape)).sum().backward()
        found.append((scores.detach(), x.grad, {name: p.grad.clone() for name, p in ours.named_parameters()}))
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        assert (one - other).abs().max() <= 1e-9 * other.abs().max()
    for name, grad in found[1][2].items():
        assert (found[0][2][name] - grad).abs().max() <= 1e-9 * max(grad.abs().max(), 1), name
    single = ours.float()(image.float())
    assert (single - found[1][0]).abs().max() <= 1e-4 * found[1][0].abs().max()


@pytest.mark.parametrize(
    ("native", "windows"),
    [
        (32, [(3, 1), (3, 1)]),
        ((48, 24), [(3, 1), (3, 0)]),  # one window wide
        ((24, 48), [(3, 1), (3, 0)]),
        ((16, 24), [(3, 1), (2, 0)]),
        ((20, 28), [(3, 1), (3, 0)]),  # 5 tokens, then 3
        (8, [(2, 0), (1, 0)]),
    ],
)
def test_windows_are_made_for_a_size(native, windows):
    """Sides and rings: as in the release, of the shorter side alone, and never longer than it."""
    model = small(img_size=native)
    assert [(s.blocks[0].attn.window_size, s.blocks[0].attn.expand_size) for s in model.layers] == windows
    assert [s.blocks[0].attn.focal_window for s in model.layers] == [5, 3]
    assert [s.blocks[0].attn.num_heads for s in model.layers] == [2, 3]


def test_options():
    block = small(mlp_ratio=3, qkv_bias=False, patch_size=2, in_chans=1).layers[1].blocks[0]
    assert block.mlp.fc1.out_features == 36 and block.attn.qkv.bias is None
    named = glocal.create_model("focal_tiny", dims=(64, 96), depths=(1, 1), focal_windows=(3, 1))
    assert [stage.blocks[0].attn.num_heads for stage in named.layers] == [2, 3]


def test_the_papers_variant():
    """The same parameters; its attention is the paper's, and its pooling starts as the mean."""
    ours, paper = at_random(small()), small("focal_tiny_paper")
    for stage in paper.layers:
        for block in stage.blocks:
            pooling = block.attn.pool_layers[0]
            assert torch.equal(pooling.weight, torch.full_like(pooling.weight, 1 / pooling.in_features))
    paper.double().eval().load_state_dict(ours.state_dict())
    image = torch.randn(2, 3, 32, 44, dtype=torch.float64)
    expected = ours(image)
    assert (paper(image) - expected).abs().max() > 1e-3
    for stage in ours.layers:
        for block in stage.blocks:
            spec = repr(block.attn).removeprefix("Released")
            attention = glocal.build(spec, block.attn.dim).double()
            attention.load_state_dict(block.attn.state_dict())
            block.attn = attention
    assert_close(paper(image), ours(image))


@pytest.mark.parametrize("size", [(200, 312), (224, 160), (97, 131), (448, 448)])
@pytest.mark.parametrize("name", ["focal_tiny", "focal_tiny_paper"])
def test_any_size(name, size):
    model = glocal.create_model(name, dims=(8, 16), depths=(1, 1), num_heads=(1, 1), focal_windows=(3, 1)).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    fine = tuple(-(-side // 4) for side in size)
    assert [tuple(m.shape[2:]) for m in maps] == [fine, tuple(-(-side // 2) for side in fine)]
    assert all(m.isfinite().all() for m in maps)


# Published sizes and weights


@pytest.mark.parametrize(
    ("name", "parameters"), [("focal_tiny", 28_880_380), ("focal_small", 51_141_940), ("focal_base", 89_815_400)]
)
def test_parameters(name, parameters):
    with torch.device("meta"):
        model, paper = glocal.create_model(name), glocal.create_model(f"{name}_paper")
    for each in (model, paper):
        assert all(p.is_meta for p in each.parameters())
        assert sum(p.numel() for p in each.parameters()) == parameters
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in paper.state_dict().items()}
    for each, attention in ((model, "ReleasedFocalAttention"), (paper, "FocalAttention")):
        assert type(each.layers[3].blocks[1].attn).__name__ == attention


@pytest.mark.parametrize(
    ("name", "giga"),
    [
        ("focal_tiny", 4.953),
        pytest.param("focal_small", 9.480, marks=pytest.mark.slow),
        pytest.param("focal_base", 16.436, marks=pytest.mark.slow),
    ],
)
def test_multiply_adds(name, giga):
    with torch.device("meta"):
        macs = cost.macs(glocal.create_model(name), torch.zeros(1, 3, 224, 224))
    assert macs == pytest.approx(giga * 1e9, rel=0.005)


def official_shapes():
    """Names and shapes of the released Focal-T, written down from its four stages."""
    shapes = {"norm.weight": (768,), "norm.bias": (768,), "head.weight": (1000, 768), "head.bias": (1000,)}
    below = ("patch_embed", (96, 3, 4, 4))
    for i, (dim, depth, heads, pooled) in enumerate([(96, 2, 3, 7), (192, 2, 6, 5), (384, 6, 12, 3), (768, 2, 24, 1)]):
        name, weight = below
        shapes |= {f"{name}.proj.weight": weight, f"{name}.proj.bias": (dim,)}
        shapes |= {f"{name}.norm.weight": (dim,), f"{name}.norm.bias": (dim,)}
        below = (f"layers.{i}.downsample", (2 * dim, dim, 2, 2))
        for j in range(depth):
            block, attn = f"layers.{i}.blocks.{j}", f"layers.{i}.blocks.{j}.attn"
            for part, shape in (("qkv", (3 * dim, dim)), ("proj", (dim, dim))):
                shapes |= {f"{attn}.{part}.weight": shape, f"{attn}.{part}.bias": shape[:1]}
            for part, shape in (("fc1", (4 * dim, dim)), ("fc2", (dim, 4 * dim))):
                shapes |= {f"{block}.mlp.{part}.weight": shape, f"{block}.mlp.{part}.bias": shape[:1]}
            for part in ("norm1", "norm2"):
                shapes |= {f"{block}.{part}.weight": (dim,), f"{block}.{part}.bias": (dim,)}
            shapes |= {f"{block}.pool_layers.0.weight": (1, 49), f"{block}.pool_layers.0.bias": (1,)}
            shapes |= {
                f"{attn}.relative_position_bias_table": (169, heads),
                f"{attn}.relative_position_index": (49, 49),
                f"{attn}.relative_position_index_0": (49, pooled**2),
                f"{attn}.relative_position_bias_table_to_windows.0": (heads, (6 + pooled) ** 2),
            }
            if i < 3:
                shapes[f"{attn}.relative_position_bias_table_to_neighbors"] = (1, heads, 49, 132)
                shapes[f"{attn}.valid_ind_rolled"] = (132,)
    return shapes


def test_official_names(tmp_path):
    model = glocal.create_model("focal_tiny")
    state = model.state_dict()
    there = to_official(state)
    assert {name: tuple(tensor.shape) for name, tensor in there.items()} == official_shapes()
    index, rolled = (there[f"layers.0.blocks.1.attn.{n}"] for n in ("relative_position_index", "valid_ind_rolled"))
    pooled = there["layers.1.blocks.0.attn.relative_position_index_0"]
    assert index.dtype == rolled.dtype == pooled.dtype == torch.int64
    assert index[0, 48] == 0 and index[48, 0] == 168 and index[0, 1] == 6 * 13 + 5
    assert pooled[0, 0] == 4 * 11 + 4 and pooled[0, 24] == 0 and pooled[8, 1] == 5 * 11 + 4
    # rows and columns of 7 of which 3 have left: those behind the last 3 ones, or before
    assert rolled[:5].tolist() == [4, 5, 6, 11, 12] and rolled[33:37].tolist() == [49, 50, 51, 56]
    assert rolled[66] == 98 and rolled[-1] == 3 * 49 + 6 * 7 + 2 and len(rolled.unique()) == 132
    back = from_official(there)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    torch.save({"model": there}, tmp_path / "focal-tiny.pth")
    read = glocal.create_model("focal_tiny", tmp_path / "focal-tiny.pth").state_dict()
    assert all(torch.equal(read[key], state[key]) for key in state)
    with pytest.raises(ValueError, match=r"^stem\.bias is not one of this family$"):
        from_official({**there, "stem.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"weights of another network: .* is missing"):  # it has rings in all stages
        glocal.create_model("focal_tiny", tmp_path / "focal-tiny.pth", img_size=448)


def test_first_values():
    block = glocal.create_model("focal_tiny", depths=(1, 1), dims=(96, 192), focal_windows=(7, 5)).layers[0].blocks[0]
    assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.03) and not block.attn.qkv.bias.any()
    assert 0.01 < block.attn.pool_layers[0].weight.std() < 0.03 and not block.attn.relative_position_bias_table.any()


# What users of timm know


def test_maps_of_stages_and_heads():
    model = at_random(small())
    image = torch.randn(2, 3, 40, 36, dtype=torch.float64)
    tokens, maps = model.forward_intermediates(image, norm=True)
    assert_close(tokens, model.forward_features(image))
    assert_close(maps[1].movedim(1, -1), tokens)
    features = small(features_only=True, out_indices=(0,)).double().eval()
    kept = features.state_dict()
    assert not any(name.startswith(("model.layers.1", "model.norm", "model.head")) for name in kept)
    features.load_state_dict({f"model.{n}": t for n, t in model.state_dict().items() if f"model.{n}" in kept})
    assert_close(features(image), maps[:1])
    assert features.feature_info == [{"num_chs": 8, "reduction": 4, "module": "layers.0"}]
    assert_close(model.forward_head(tokens, pre_logits=True), tokens.mean((1, 2)))
    model.reset_classifier(3)
    assert model(image).shape == (2, 3) and small(num_classes=0, in_chans=1)(image[:, :1].float()).shape == (2, 12)


def test_what_decay_leaves_alone():
    """The names that the release exempts by a part of them."""
    model = small()
    tables = {name for name, _ in model.named_parameters() if "relative_position_bias_table" in name}
    assert model.no_weight_decay() == tables and len(tables) == 3 * 3


def test_blocks_may_be_skipped():
    model = small(drop_path_rate=0.4)
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert [(b.drop_path1.rate, b.drop_path2.rate) for b in blocks] == [(pytest.approx(r),) * 2 for r in (0, 0.2, 0.4)]


@pytest.mark.parametrize("drop_path_rate", [0, 0.5])
def test_checkpoints_change_nothing(drop_path_rate):
    image, found = torch.randn(3, 3, 40, 36, dtype=torch.float64), []
    for checkpointed in (False, True):
        model = at_random(small(drop_path_rate=drop_path_rate)).train()
        model.set_grad_checkpointing(checkpointed)
        calls = []
        model.layers[1].blocks[0].norm1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        model(image).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
        assert len(calls) == 1 + checkpointed
    assert_close(found[0], found[1])


def test_compiles_as_one_graph():
    model = small(dims=(8,), depths=(1,), num_heads=(2,), focal_windows=(3,))
    image = torch.randn(2, 3, 40, 36)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-5)
    compiled(image).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_blocks_can_be_looked_into():
    model = small().eval()
    with glocal.inspect(model) as seen:
        model(torch.randn(1, 3, 40, 36))
    assert [call.name for call in seen] == [f"layers.{i}.blocks.{j}.attn" for i, j in ((0, 0), (0, 1), (1, 0))]
    assert all(call.rebuild_error() < 1e-5 for call in seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (2, 2, 2)}, r"^focal_tiny: depths: .* of the 2 stages"),
        ({"focal_windows": (7, 5, 3)}, r"^focal_tiny: focal_windows: .* of the 2 stages"),
        ({"focal_windows": (4, 1)}, r"^focal_tiny: .*focal_window: 4, must be 0 .* or odd"),
        ({"num_heads": (3, 3)}, "^focal_tiny: .*num_heads: 3 does not divide 8"),
        ({"window_size": 0}, "^focal_tiny: window_size: 0, must be a positive"),
        ({"window_size": (7, 7)}, "^focal_tiny: window_size: "),
        ({"expand_size": 2}, "^focal_tiny: .*expand_size: 2, must be a whole number from 0 .* to half the window, 1"),
        ({"expand_size": -1}, "^focal_tiny: .*expand_size: -1"),
        ({"patch_size": 0}, "^focal_tiny: patch_size: 0"),
        ({"img_size": 0}, "^focal_tiny: img_size: 0"),
        ({"drop_path_rate": 1}, "^focal_tiny: drop_path_rate: 1"),
        ({"mixer": "FocalAttention"}, "^focal_tiny: has no argument 'mixer'"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)
    with pytest.raises(ValueError, match=r"this network takes images \[B, 3, H, W\]"):
        small()(torch.zeros(1, 1, 32, 32))
