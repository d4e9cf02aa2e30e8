"""Other libraries' attention seen as ours: its weights are those that the libraries compute, at the right places."""

import sys
import types

import pytest
import timm
import torch
from torch import nn

import glocal

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}


def seen_in(model, x):
    with torch.no_grad(), glocal.inspect(model.eval()) as seen:
        model(x)
    return seen


def noisy(model):
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def softmaxes(run):
    """What every softmax over a last axis gives while a model runs that composes its attention itself."""
    kept, real = [], torch.Tensor.softmax

    def softmax(self, *args, **kwargs):
        kept.append(real(self, *args, **kwargs))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", softmax)
        with torch.no_grad():
            run()
    return kept


@pytest.mark.parametrize(("registers", "prefix"), [(0, 1), (3, 4)])
def test_timm_vit(registers, prefix):
    torch.manual_seed(0)
    model = noisy(timm.models.VisionTransformer(**SMALL, reg_tokens=registers))
    x = torch.randn(2, 3, 32, 32)
    seen = seen_in(model, x)
    assert [call.name for call in seen] == ["blocks.0.attn", "blocks.1.attn"] and not seen.refused
    for block in model.blocks:
        block.attn.fused_attn = False
    expected = softmaxes(lambda: model(x))
    for call, weights in zip(seen, expected, strict=True):
        found = call.weights()
        torch.testing.assert_close(found.weights, weights, atol=1e-5, rtol=1e-4)
        assert found.query_positions[:prefix].isnan().all()
        assert found.query_positions[prefix + 5].tolist() == [1, 1] and found.source_grid == (4, 4)
        assert call.rebuild_error() < 1e-5
        assert call.mixer.qkv.weight.data_ptr() in {p.data_ptr() for p in model.parameters()}  # no copy


def test_a_vit_at_another_size_has_another_grid():
    model = timm.models.VisionTransformer(**SMALL, dynamic_img_size=True)
    seen = seen_in(model, torch.randn(1, 3, 24, 48))
    assert seen.calls[0].weights().source_grid == (3, 6)


def reads(layer, grid, size):
    """Which tokens each token of a layer depends on, [N, N]: found by changing one token after the other."""
    torch.manual_seed(1)
    tokens = torch.randn(1, *grid, size)
    depends = []
    with torch.no_grad():
        out = layer(tokens).flatten(0, 2)
        for i in range(grid[0] * grid[1]):
            other = tokens.clone()
            other.view(-1, size)[i] += torch.randn(size)
            depends.append((layer(other).flatten(0, 2) - out).abs().amax(-1) > 1e-6)
    return torch.stack(depends, 1)


@pytest.mark.parametrize("grid", [(8, 8), (6, 8), (7, 9)])
@pytest.mark.parametrize("index", [0, 1])
def test_timm_swin_is_seen_by_blocks(grid, index):
    torch.manual_seed(0)
    model = noisy(
        timm.models.SwinTransformer(
            img_size=tuple(4 * n for n in grid), embed_dim=8, depths=(2,), num_heads=(2,), window_size=4, num_classes=3
        )
    ).eval()
    x = torch.randn(2, 3, *(4 * n for n in grid))
    seen = seen_in(model, x)
    assert [call.name for call in seen] == ["layers.0.blocks.0.attn", "layers.0.blocks.1.attn"]
    call, block = seen.calls[index], model.layers[0].blocks[index]
    assert call.rebuild_error() < 1e-5 and call.x.shape == (2, *grid, 8)
    if grid != (8, 8):  # padding takes part in timm's windows: places are those of the padded grid
        assert call.weights().source_grid == tuple(-(-n // 4) * 4 for n in grid)
        return
    dense = call.weights().dense().detach()
    assert torch.equal((dense > 1e-12).any(0).any(0), reads(block._attn, grid, 8))
    block.attn.fused_attn = False
    (windows,) = softmaxes(lambda: block._attn(call.x))
    ours, theirs = (
        w.detach().transpose(1, 2).flatten(0, 1) for w in (call.weights().weights, windows)
    )  # [rows, heads, 16]
    nearest = (ours.sort(-1).values[:, None] - theirs.sort(-1).values).abs().amax((2, 3)).amin(1)
    assert float(nearest.max()) < 1e-5  # each row is one of theirs, whatever the order


def test_what_ours_has_not_is_refused_by_name():
    model = timm.models.VisionTransformer(**SMALL, qk_norm=True)
    part = nn.Sequential(model, nn.Unflatten(1, (1, 5)), glocal.build("SelfAttention(num_heads=1)", 5))
    seen = seen_in(part, torch.randn(1, 3, 32, 32))
    assert list(seen.refused) == ["0.blocks.0.attn", "0.blocks.1.attn"]
    assert seen.refused["0.blocks.1.attn"] == "normalises queries and keys, which SelfAttention does not"
    assert [call.name for call in seen] == ["2"]


def test_dropped_patches_have_no_grid():
    model = timm.models.VisionTransformer(**SMALL, patch_drop_rate=0.5).train()
    part = nn.Sequential(model, nn.Unflatten(1, (1, 5)), glocal.build("SelfAttention(num_heads=1)", 5))
    with torch.no_grad(), glocal.inspect(part) as seen:
        part(torch.randn(1, 3, 32, 32))
    assert "no longer a token for each of the 4 x 4 patches" in seen.refused["0.blocks.0.attn"]


def test_dropout_in_training_is_not_shown():
    model = timm.models.VisionTransformer(**SMALL, attn_drop_rate=0.5).train()
    with torch.no_grad(), glocal.inspect(model) as seen:
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="does it draw random numbers"):
        seen.calls[0].weights()


def test_a_changed_parameter_is_noticed():
    model = timm.models.VisionTransformer(**SMALL)
    seen = seen_in(model, torch.randn(1, 3, 32, 32))
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(2)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn: its parameter qkv\.weight was changed in place"):
        seen.calls[0].weights()


def transformers_model(name, **config):
    library = pytest.importorskip("transformers")
    if not hasattr(library.models.vit.modeling_vit.ViTAttention, "forward") or int(library.__version__[0]) < 5:
        pytest.skip("attention has other parts before version 5")
    torch.manual_seed(0)
    return noisy(getattr(library, f"{name}ForImageClassification")(getattr(library, f"{name}Config")(**config))).eval()


@pytest.mark.parametrize(("name", "prefix"), [("ViT", 1), ("DeiT", 2), ("Dinov2", 1)])
def test_transformers_vit(name, prefix):
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers_model(name, **size, image_size=32, patch_size=8)
    model.set_attn_implementation("eager")
    x = torch.randn(2, 3, 32, 32)
    seen = seen_in(model, x)
    expected = model(x, output_attentions=True).attentions
    assert len(seen) == 2 and not seen.refused
    for call, weights in zip(seen, expected, strict=True):
        torch.testing.assert_close(call.weights().weights, weights, atol=1e-5, rtol=1e-4)
        assert int(call.weights().query_positions.isnan().any(-1).sum()) == prefix
        assert call.rebuild_error() < 1e-5


def test_transformers_swin():
    config = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    model = transformers_model("Swin", **config, window_size=4)
    model.set_attn_implementation("eager")
    x = torch.randn(2, 3, 32, 32)
    seen = seen_in(model, x)
    assert len(seen) == 4 and not seen.refused
    windows = model(x, output_attentions=True).attentions[0]  # of the last block of the first stage
    assert max(call.rebuild_error() for call in seen) < 1e-5
    shifted = seen.calls[1].weights()
    assert shifted.weights.shape == (2, 2, 64, 16) and shifted.query_positions[9].tolist() == [1, 1]
    # every row of a window of the library is one of ours, whatever the order of places
    ours = shifted.weights.transpose(1, 2).flatten(0, 1).sort(-1).values.sort(0).values
    theirs = windows.transpose(1, 2).flatten(0, 1).sort(-1).values.sort(0).values
    assert windows.shape[-1] == 16
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_torchvision():
    from torchvision.models import swin_transformer, vision_transformer

    torch.manual_seed(0)
    model = noisy(vision_transformer.VisionTransformer(32, 8, 2, 4, 48, 64, num_classes=5))
    x = torch.randn(2, 3, 32, 32)
    seen = seen_in(model, x)
    assert len(seen) == 2
    layer = model.encoder.layers[0]
    with torch.no_grad():
        tokens = seen.calls[0].x
        weights = layer.self_attention(tokens, tokens, tokens, average_attn_weights=False)[1]
    torch.testing.assert_close(seen.calls[0].weights().weights, weights, atol=1e-5, rtol=1e-4)
    swin = swin_transformer.SwinTransformer([4, 4], 8, [2], [2], [4, 4], num_classes=3)
    seen = seen_in(noisy(swin), torch.randn(1, 3, 32, 32))
    assert len(seen) == 2 and max(call.rebuild_error() for call in seen) < 1e-5
    seen = seen_in(swin, torch.randn(1, 3, 28, 28))
    assert len(seen) == 1 and "pads the grid (7, 7)" in seen.refused["features.1.1.attn"]


def test_a_version_that_is_built_otherwise_is_refused_in_a_sentence():
    class VisionTransformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed = nn.Module()
            self.patch_embed.proj = nn.Conv2d(3, 4, 2)
            self.attn = Attention()

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_norm = self.k_norm = nn.Identity()

    for kind, module in ((VisionTransformer, "timm.models.vision_transformer"), (Attention, "timm.layers.attention")):
        kind.__module__ = module
    with glocal.inspect(VisionTransformer()) as seen:
        pass
    assert "is built otherwise than this library knows it" in seen.refused["attn"]


def test_no_library_is_imported_for_models_of_ours(monkeypatch):
    for name in ("timm", "torchvision", "transformers"):
        monkeypatch.delitem(sys.modules, f"glocal.adapters.{name}", raising=False)
    seen_in(glocal.build("SelfAttention(num_heads=1)", 4), torch.randn(1, 3, 3, 4))
    assert not any(f"glocal.adapters.{name}" in sys.modules for name in ("timm", "torchvision", "transformers"))
    assert isinstance(sys.modules["glocal.adapters"], types.ModuleType)


# planted by scripts/mutate
FAULTS = {
    ("adapters/foreign.py", "test_adapters.py"): (
        ("rows and columns of windows change places", "rows, columns = (-(-n // w)", "columns, rows = (-(-n // w)"),
        ("windows are moved the wrong way", "tokens.roll(shift, (1, 2))", "tokens.roll([-s for s in shift], (1, 2))"),
        ("padding is kept", "[:, : grid[0], : grid[1]]", "[:, : grid[1], : grid[0]]"),
        ("lost patches are not noticed", "prefix < 0:", "prefix < -99:"),
        (
            "projections are joined the wrong way round",
            "for part in self.parts], -1)",
            "for part in list(self.parts)[::-1]], -1)",
        ),
        (
            "what another version lacks is an error",
            "except (AttributeError, TypeError, ValueError) as error:",
            "except KeyError as error:",
        ),
    ),
    ("adapters/timm.py", "test_adapters.py"): (
        ("normalised queries are passed over", 'for part in ("q_norm", "k_norm"))', "for part in ())"),
        (
            "the table of biases is another one",
            "    mixer.relative_position_bias_table = attention.relative_position_bias_table\n",
            "",
        ),
        ("windows do not move", "shift_size=max(shift)", "shift_size=0"),
        ("tokens are taken before their norm", 'watched={"tokens": block.norm1}', 'watched={"tokens": block.norm2}'),
        ("parameters are others", "mixer.qkv, mixer.proj = attention.qkv, attention.proj\n    return", "return"),
    ),
    ("adapters/transformers.py", "test_adapters.py"): (
        ("keys and queries change places", 'for part in "qkv"]\n', 'for part in "kqv"]\n'),
        ("windows do not move", "shift_size=shift,", "shift_size=0,"),
        ("the second output is taken", "lambda given, call: given[0]", "lambda given, call: given[1]"),
        (
            "Swin's keys and queries change places",
            "Joined(attention.q_proj, attention.k_proj,",
            "Joined(attention.k_proj, attention.q_proj,",
        ),
        (
            "the patches are another model's",
            'if isinstance(found := modules.get(f"{name}.{patches}" if name else patches), nn.Conv2d)',
            "if isinstance(found := None, nn.Conv2d)",
        ),
    ),
    ("adapters/torchvision.py", "test_adapters.py"): (
        (
            "another projection is used",
            "    mixer.qkv = _InProjection(attention)",
            "    mixer.k = _InProjection(attention)",
        ),
        ("padding before the move is not noticed", "if attention.shift_size[0] and any(", "if False and any("),
        ("windows do not move", "shift_size=attention.shift_size[0],", "shift_size=0,"),
        (
            "biases are forgotten",
            "return nn.functional.linear(x, self.weight, self.bias)",
            "return nn.functional.linear(x, self.weight)",
        ),
        ("the last projection is another one", "    mixer.proj = attention.out_proj\n", ""),
    ),
}
