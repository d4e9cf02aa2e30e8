"""The all-attention model against the released one, written out from its definition, and its published sizes."""

import math

import pytest
import torch
from torch.testing import assert_close

import glocal
from glocal.analysis import cost
from glocal.analysis.memory import peak_memory
from glocal.models.keys.all_attention import from_official, to_official

NAMES = {
    "all_attention_quadratic": "quadratic",
    "all_attention_generalized": "generalized",
    "all_attention_learned": "learned",
    "all_attention_learned_content": "content",
}
DIM, HEADS, HIDDEN, DEPTH, CLASSES = 10, 4, 13, 2, 3
SMALL = {"dim": DIM, "num_heads": HEADS, "depth": DEPTH, "num_classes": CLASSES, "mlp_ratio": HIDDEN / DIM}

FAULTS = {
    "models/all_attention.py": (
        ("columns of a token's pixels count before rows", "permute(0, 2, 4, 3, 5, 1)", "permute(0, 2, 4, 5, 3, 1)"),
        ("channels of a token's pixels count first", "permute(0, 2, 4, 3, 5, 1)", "permute(0, 2, 4, 1, 3, 5)"),
        (
            "height and width are completed for each other",
            "(0, w * p - x.shape[3], 0, h * p - x.shape[2])",
            "(0, h * p - x.shape[2], 0, w * p - x.shape[3])",
        ),
        (
            "the border is completed above and on the left",
            "(0, w * p - x.shape[3], 0, h * p - x.shape[2])",
            "(w * p - x.shape[3], 0, h * p - x.shape[2], 0)",
        ),
        ("norms have PyTorch's eps", "self.norm1 = nn.LayerNorm(dim, eps=1e-12)", "self.norm1 = nn.LayerNorm(dim)"),
        (
            "the second norm has PyTorch's eps",
            "self.norm2 = nn.LayerNorm(dim, eps=1e-12)",
            "self.norm2 = nn.LayerNorm(dim)",
        ),
        ("the MLP reads what is not normalised", "x = self.norm1(x + self.drop_path", "x = (x + self.drop_path"),
        ("there is no second skip path", "self.norm2(x + self.drop_path(", "self.norm2(self.drop_path("),
        ("the map after the heads is left out", "self.drop(self.proj(self.attn(x)))", "self.drop(self.attn(x))"),
        ("there is no dropout after attention", "self.drop(self.proj(self.attn(x)))", "self.proj(self.attn(x))"),
        ("there is no dropout after the MLP", "self.drop(self.mlp(x))", "self.mlp(x)"),
        ("no layer is ever skipped", "drop_path=drop_path,", "drop_path=0,"),
        (
            "sizes are said as torch.export cannot follow",
            "h, w = ((n + p - 1) // p for",
            "h, w = ((n + -n % p) // p for",
        ),
        (
            "tables are made for pixels",
            'grid = tuple(-(-n // positive("patch_size", patch_size))',
            'grid = tuple(n + 0 * positive("patch_size", patch_size)',
        ),
        ("larger images are refused", "grid_size=grid, clip_offsets=True)", "grid_size=grid)"),
        ("keys have no bias", "content=True, key_bias=True", "content=True"),
    ),
    "models/keys/all_attention.py": (
        (
            "the layers' maps change places",
            '(f"{_LAYER}.attention.output.dense", "blocks.{i}.proj")',
            '(f"{_LAYER}.attention.output.dense", "blocks.{i}.projection")',
        ),
        (
            "the norms change places",
            '.attention.output.LayerNorm", "blocks.{i}.norm1"',
            '.attention.output.LayerNorm", "blocks.{i}.norm2"',
        ),
        ("constants are taken for weights", r".self\.(R|relative_indices)", r".self\.(R|relative)"),
        ("the mask is not given back", 'found["attention_mask"]', 'found["mask"]'),
        ("offsets are query minus source", "place - place[:, None] + size - 1", "place[:, None] - place + size - 1"),
        ("offsets begin below 0", "place[:, None] + size - 1", "place[:, None] + size - 2"),
    ),
    "models/keys/__init__.py": (
        (
            "names beyond the family are kept",
            'raise ValueError(f"{name} is not one of this family")',
            "found[name] = tensor\n            continue",
        ),
        ("a beginning may end within a word", '+ r"(?=\\.|$)"', '+ ""'),
        ("layers are counted by one digit", r"(?P<\1>\\d+)", r"(?P<\1>\\d)"),
    ),
}


# The released model, from its definition


def official_state(variant, *, dim=DIM, heads=HEADS, hidden=HIDDEN, depth=DEPTH, classes=CLASSES, chans=3, size=5):
    """Random weights under the release's names and in its order; `size`: tokens along a side that tables are for."""
    shapes = {"attention_mask": (), "features_upscale.weight": (dim, 4 * chans), "features_upscale.bias": (dim,)}
    for i in range(depth):
        layer = f"encoder.layer.{i}"
        own = f"{layer}.attention.self"
        if variant in ("quadratic", "generalized"):
            shapes[f"{own}.attention_centers"] = (heads, 2)
            shapes[f"{own}.attention_spreads"] = (heads,) if variant == "quadratic" else (heads, 2, 2)
        else:
            shapes |= {f"{own}.{axis}_embeddings.weight": (2 * size - 1, dim) for axis in ("row", "col")}
            shapes |= {f"{own}.head_keys_{axis}.weight": (heads, dim) for axis in ("row", "col")}
            shapes[f"{own}.relative_indices"] = (size, size)
        for part in ("query", "key") if variant == "content" else ():
            shapes |= {f"{own}.{part}.weight": (heads * dim, dim), f"{own}.{part}.bias": (heads * dim,)}
        shapes |= {f"{own}.value.weight": (dim, heads * dim), f"{own}.value.bias": (dim,)}
        for name, width, out in (
            ("attention.output.dense", dim, dim),
            ("intermediate.dense", dim, hidden),
            ("output.dense", hidden, dim),
        ):
            shapes |= {f"{layer}.{name}.weight": (out, width), f"{layer}.{name}.bias": (out,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{layer}.{name}.weight": (dim,), f"{layer}.{name}.bias": (dim,)}
    shapes |= {"classifier.weight": (classes, dim), "classifier.bias": (classes,)}
    state = {name: 0.5 * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for name in state:
        if name.endswith("LayerNorm.weight") or name.endswith("spreads"):
            state[name] += 1
        if name.endswith("centers"):
            state[name] *= 3
        if name.endswith("relative_indices"):
            state[name] = torch.tensor([[source - query + size - 1 for source in range(size)] for query in range(size)])
    state["attention_mask"] = torch.tensor(1.0)
    return state


def released(state, images, heads=HEADS):
    """Logits [B, classes] of images [B, C, H, W]; dropout is off."""

    def linear(name, x):
        out = x @ state[f"{name}.weight"].T
        return out + state[f"{name}.bias"] if f"{name}.bias" in state else out

    def norm(name, x):
        middle = x.mean(-1, keepdim=True)
        variance = (x - middle).square().mean(-1, keepdim=True)
        return (x - middle) / (variance + 1e-12).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    batch, chans, height, width = images.shape
    rows, columns = height // 2, width // 2
    pixels = [images[:, c, row::2, column::2] for row in range(2) for column in range(2) for c in range(chans)]
    x = linear("features_upscale", torch.stack(pixels, -1))
    dim = x.shape[-1]
    for i in range(len({name.split(".")[2] for name in state if name.startswith("encoder")})):
        layer = f"encoder.layer.{i}"
        own = f"{layer}.attention.self"
        if f"{own}.attention_centers" in state:
            scores = quadratic_scores(state, own, rows, columns)[None]
        else:
            scores = learned_scores(state, own, rows, columns, heads)[None]
        if f"{own}.query.weight" in state:
            q, k = (linear(f"{own}.{part}", x).view(batch, rows, columns, heads, dim) for part in ("query", "key"))
            scores = scores + torch.einsum("nyxhc,nvuhc->nyxhvu", q, k) / math.sqrt(dim)
        e = (scores - scores.amax((-2, -1), keepdim=True)).exp()
        weights = (e / e.sum((-2, -1), keepdim=True)).expand(batch, -1, -1, -1, -1, -1)
        mixed = torch.einsum("nyxhvu,nvuc->nyxhc", weights, x).reshape(batch, rows, columns, heads * dim)
        x = norm(
            f"{layer}.attention.output.LayerNorm",
            linear(f"{layer}.attention.output.dense", linear(f"{own}.value", mixed)) + x,
        )
        inner = linear(f"{layer}.intermediate.dense", x)
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", inner) + x)
    return linear("classifier", x.reshape(batch, -1, dim).mean(1))


def quadratic_scores(state, own, rows, columns):
    """[rows, columns, heads, rows, columns]: an encoding of every offset times a vector for every head."""
    encoding = torch.zeros(rows, columns, rows, columns, 5, dtype=torch.float64)
    for y in range(rows):
        for x in range(columns):
            for v in range(rows):
                for u in range(columns):
                    d1, d2 = v - y, u - x
                    encoding[y, x, v, u] = torch.tensor([d1, d2, d1**2, d2**2, d1 * d2], dtype=torch.float64)
    spreads = state[f"{own}.attention_spreads"]
    if spreads.dim() == 1:
        a = c = spreads**2
        b = 0 * spreads
    else:
        a = spreads[:, 0, 0] ** 2 + spreads[:, 0, 1] ** 2
        b = spreads[:, 0, 0] * spreads[:, 1, 0] + spreads[:, 0, 1] * spreads[:, 1, 1]
        c = spreads[:, 1, 0] ** 2 + spreads[:, 1, 1] ** 2
    m1, m2 = state[f"{own}.attention_centers"].T
    vector = -0.5 * torch.stack([-2 * (a * m1 + b * m2), -2 * (c * m2 + b * m1), a, c, 2 * b], -1)
    return torch.einsum("yxvur,hr->yxhvu", encoding, vector)


def learned_scores(state, own, rows, columns, heads):
    size = (len(state[f"{own}.row_embeddings.weight"]) + 1) // 2
    along_row = state[f"{own}.row_embeddings.weight"] @ state[f"{own}.head_keys_row.weight"].T
    along_column = state[f"{own}.col_embeddings.weight"] @ state[f"{own}.head_keys_col.weight"].T
    scores = []
    for y in range(rows):
        for x in range(columns):
            for v in range(rows):
                for u in range(columns):
                    scores.append(along_row[u - x + size - 1] + along_column[v - y + size - 1])
    return torch.stack(scores).view(rows, columns, rows, columns, heads).permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_is_the_released_model(name, impl):
    """Logits and every gradient; weights go over by the map of names, gradients come back by it."""
    state = official_state(NAMES[name])
    height, width = (8, 12) if "quadratic" in name or "generalized" in name else (10, 10)
    model = glocal.create_model(name, img_size=10, **SMALL).double().eval()
    for block in model.blocks:
        block.attn.impl = impl
    model.load_state_dict(from_official(state))
    ours, theirs = (torch.randn(2, 3, height, width, dtype=torch.float64) for _ in range(2))
    theirs = ours.clone().requires_grad_()
    ours.requires_grad_()
    leaves = {k: v.requires_grad_() for k, v in state.items() if v.dtype == torch.float64}
    expected = released(state, theirs)
    upstream = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, [theirs, *leaves.values()], upstream)
    found = model(ours)
    found.backward(upstream)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert_close(ours.grad, expected_grads[0], rtol=1e-8, atol=1e-9)
    grads = to_official({k: p.grad for k, p in model.named_parameters()})
    for key, grad in zip(leaves, expected_grads[1:], strict=True):
        assert_close(grads[key], grad, rtol=1e-8, atol=1e-9, msg=lambda text, key=key: f"{key}\n{text}")


@pytest.mark.parametrize("name", NAMES)
def test_weights_go_there_and_back(name):
    state = official_state(NAMES[name], depth=11)  # layers of one digit and of two
    model = glocal.create_model(name, img_size=10, **{**SMALL, "depth": 11}).double()
    large = {f"encoder.layer.{i}.attention.self.R": torch.zeros(1) for i in range(11) if "learned" not in name}
    model.load_state_dict(from_official(state | large))
    back = to_official(model.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) and back[key].dtype == state[key].dtype for key in state)


def test_names_beyond_the_family_are_refused():
    state = official_state("quadratic")
    with pytest.raises(ValueError, match=r"^pixelizer.weight is not one of this family$"):
        from_official({**state, "pixelizer.weight": torch.zeros(3, DIM)})
    with pytest.raises(ValueError, match=r"classifiers.weight is not one"):
        from_official({"classifiers.weight": torch.zeros(1)})


# Published sizes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("all_attention_quadratic", 12_086_844),
        ("all_attention_generalized", 12_087_006),
        ("all_attention_learned", 12_278_682),
        ("all_attention_learned_content", 29_601_882),
        ("all_attention_quadratic(num_heads=16)", 18_806_970),
    ],
)
def test_parameters(name, parameters):
    with torch.device("meta"):
        model = glocal.create_model(name)
    assert all(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_parameters_of_a_layer():
    with torch.device("meta"):
        model = glocal.create_model("all_attention_quadratic")
    found = {}
    for name, parameter in model.blocks[3].named_parameters():
        part = name.rpartition(".")[0]
        found[part] = found.get(part, 0) + parameter.numel()
    assert found == {
        "attn": 27, "attn.value": 1_440_400, "proj": 160_400, "norm1": 800, "mlp.fc1": 205_312, "mlp.fc2": 205_200,
        "norm2": 800,
    }  # fmt: skip
    assert sum(found.values()) == 2_012_939


def test_multiply_adds():
    image = torch.zeros(1, 3, 32, 32, device="meta")
    linear, gathered = 3_087_978_400, 1_415_577_600  # linear maps; weights times tokens
    tables = 6 * 2 * 31 * 400 * 9  # every learned offset with every head's vector
    known = {
        "all_attention_quadratic": linear + gathered,
        "all_attention_generalized": linear + gathered,
        "all_attention_learned": linear + gathered + tables,
        "all_attention_learned_content": linear + gathered + tables + 4_423_680_000 + 1_415_577_600,
    }
    for name, macs in known.items():
        with torch.device("meta"):
            assert cost.macs(glocal.create_model(name), image) == macs


@pytest.mark.parametrize("name", ["all_attention_quadratic", "all_attention_learned"])
def test_memory_is_linear_in_the_map(name):
    """Weights of all pairs would grow 16-fold, and the released constants of all pairs with them."""
    peaks = []
    for side in (32, 64):
        model = glocal.create_model(name, dim=8, depth=1, num_heads=4, img_size=side)
        image = torch.randn(1, 3, side, side)
        peaks.append(peak_memory(lambda model=model, image=image: model(image).sum().backward(), image.device)[1])
    assert peaks[1] < 5 * peaks[0]


# Any image, any head


@pytest.mark.parametrize(("height", "width"), [(33, 31), (6, 9), (9, 6)])
@pytest.mark.parametrize("name", NAMES)
def test_odd_images_are_completed_by_zeros(name, height, width):
    model = glocal.create_model(name, dim=8, depth=2).double().eval()
    image = torch.randn(2, 3, height, width, dtype=torch.float64)
    rows, columns = math.ceil(height / 2), math.ceil(width / 2)
    whole = torch.zeros(2, 3, 2 * rows, 2 * columns, dtype=torch.float64)
    whole[:, :, :height, :width] = image
    assert model.forward_features(image).shape == (2, rows, columns, 8)
    assert_close(model(image), model(whole))


@pytest.mark.parametrize("name", NAMES)
def test_larger_images(name):
    """Made for 6 x 6 pixels; learned offsets beyond 2 tokens count as 2, as if the tables ended in copies."""
    model = glocal.create_model(name, img_size=6, **SMALL).double().eval()
    wide = glocal.create_model(name, img_size=(40, 56), **SMALL).double().eval()
    state = model.state_dict()
    for key, table in state.items():
        if "_embeddings" in key:
            more = (20 if "col" in key else 28) - 3
            state[key] = torch.cat([table[:1].expand(more, -1), table, table[-1:].expand(more, -1)])
    wide.load_state_dict(state)
    image = torch.randn(1, 3, 40, 56, dtype=torch.float64)
    assert_close(model(image), wide(image))


def test_one_pixel_is_an_image():
    assert glocal.create_model("all_attention_quadratic", **SMALL)(torch.randn(2, 3, 1, 1)).shape == (2, CLASSES)


def test_other_images_are_refused():
    model = glocal.create_model("all_attention_quadratic", in_chans=1, **SMALL)
    assert model(torch.randn(1, 1, 4, 4)).shape == (1, CLASSES)
    for shape in ((1, 3, 4, 4), (1, 4, 4), (4, 4, 1)):
        with pytest.raises(ValueError, match=r"x has shape .*; this network takes images \[B, 1, H, W\]"):
            model(torch.randn(shape))


def test_dropout_in_training_alone():
    model = glocal.create_model("all_attention_quadratic", **{**SMALL, "depth": 1}).eval()
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(model(image), model(image))
    assert not torch.equal(model.train()(image), model(image))
    for silent in ("proj", "mlp.fc2"):  # the other branch alone
        part = model.blocks[0].get_submodule(silent)
        kept = part.weight.detach().clone()
        torch.nn.init.zeros_(part.weight), torch.nn.init.zeros_(part.bias)
        assert not torch.equal(model(image), model(image))
        part.weight.data.copy_(kept)
    steady = glocal.create_model("all_attention_quadratic", drop_rate=0.0, **SMALL)
    assert torch.equal(steady(image), steady(image))


def test_layers_may_be_skipped():
    model = glocal.create_model("all_attention_quadratic", drop_path_rate=0.999, drop_rate=0.0, **SMALL)
    x = torch.randn(4, 5, 5, DIM)
    norms = torch.nn.functional.layer_norm(x, (DIM,), eps=1e-12)
    assert_close(model.blocks[1](x), norms)  # a norm of a norm is that norm
    assert not torch.allclose(model.blocks[0](x), norms)


def test_layers_are_skipped_more_often_further_on():
    model = glocal.create_model("all_attention_quadratic", drop_path_rate=0.2, **{**SMALL, "depth": 3})
    assert [block.drop_path.rate for block in model.blocks] == [0, 0.1, 0.2]
    one = glocal.create_model("all_attention_quadratic", drop_path_rate=0.2, **{**SMALL, "depth": 1})
    assert one.blocks[0].drop_path.rate == 0


@pytest.mark.parametrize("name", ["all_attention_quadratic", "all_attention_learned_content"])
def test_is_exported_for_any_image(name):
    """Odd sizes, too, which zeros complete: one program for all."""
    model = glocal.create_model(name, img_size=10, **{**SMALL, "depth": 1}).eval()
    sides = {2: torch.export.Dim("height", min=4, max=512), 3: torch.export.Dim("width", min=4, max=512)}
    program = torch.export.export(model, (torch.randn(2, 3, 30, 26),), dynamic_shapes=(sides,)).module()
    for height, width in ((32, 32), (31, 14), (20, 33), (7, 9)):
        image = torch.randn(2, 3, height, width)
        assert_close(program(image), model(image))


def test_is_compiled_whole():
    model = glocal.create_model("all_attention_generalized", **{**SMALL, "depth": 1}).eval()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for height, width in ((8, 6), (7, 9)):
        image = torch.randn(2, 3, height, width)
        assert_close(whole(image), model(image))


def test_methods_that_users_of_timm_know():
    model = glocal.create_model("all_attention_learned", **SMALL).eval()
    image = torch.randn(2, 3, 8, 8)
    tokens = model.forward_features(image)
    assert_close(model.forward_head(tokens, pre_logits=True), tokens.mean((1, 2)))
    assert_close(model.forward_head(tokens), model(image))
    model.reset_classifier(7)
    assert model(image).shape == (2, 7) and model.num_classes == 7
    with pytest.raises(ValueError, match="num_classes"):
        model.reset_classifier(-1)


def test_centres_and_spreads_are_not_decayed():
    for name, quadratic in (("all_attention_quadratic", True), ("all_attention_learned", False)):
        model = glocal.create_model(name, **SMALL)
        own = {f"blocks.{i}.attn.attention_{what}" for i in range(DEPTH) for what in ("centers", "spreads")}
        assert model.no_weight_decay() == (own if quadratic else set())


def test_layers_can_be_looked_into():
    model = glocal.create_model("all_attention_learned_content", **SMALL).eval()
    with glocal.inspect(model) as seen:
        model(torch.randn(1, 3, 8, 6))
    assert [call.name for call in seen] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(call.rebuild_error() < 1e-5 for call in seen)
