"""What published networks share: scores, maps of stages, heads, checkpoints, on a small network of its own."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import glocal
from glocal.models.classifier import (
    Blocks,
    Classifier,
    FeatureMaps,
    chosen,
    drop_path_rates,
    linear_or_none,
    mlp_width,
    start_linear_maps,
)

FAULTS = {
    "models/classifier.py": (
        ("the head takes the first token", "x.flatten(1, -2).mean(1)", "x.flatten(1, -2)[:, 0]"),
        ("exempt parameters are decayed", "return undecayed_parts(self)", "return set()"),
        (
            "a new head has the old number of classes",
            "new = linear_or_none(self.num_features, num_classes)",
            "new = nn.Linear(self.num_features, self.get_classifier().out_features)",
        ),
        ("any word is a way to pool", "if global_pool is not None and global_pool not in", "if False and"),
        ("pooling stays as it was", "= global_pool or self.global_pool", "= self.global_pool"),
        ("pooling is forgotten", "= global_pool or self.global_pool", "= global_pool or self.pools[0]"),
        ("a new head is float32", "new.to(like.device, like.dtype)", "new.to(like.device)"),
        ("one head of two is new", "for name in self.classifiers:\n", "for name in self.classifiers[:1]:\n"),
        ("features are not normalised", "return self.finish(x)\n\n", "return x\n\n"),
        ("pre_logits are scores", "return x if pre_logits else", "return"),
        ("maps are always normalised", "self.finish(x) if norm and i == last", "self.finish(x) if i == last"),
        ("stages are told nothing", "needed = self.needed(self._images(x))", "self._images(x), (needed := {})"),
        ("stages that give maps are told nothing", "needed, x = self.needed(image)", "needed, x = {}"),
        (
            "stages are told nothing where they are checkpointed",
            "return checkpoint(block, x, use_reentrant=False, **needed)",
            "return checkpoint(block, x, use_reentrant=False)",
        ),
        ("class tokens are in maps", "found = self.map_of(", "found = (lambda x, image: x)("),
        ("maps have channels last", 'found.movedim(-1, 1) if output_fmt == "NCHW"', 'found if output_fmt == "NCHW"'),
        ("no stage is left out", "if stop_early and i == max(wanted):", "if False:"),
        (
            "features of an earlier stage are normalised",
            "return self.finish(x) if i == last else x, maps",
            "return self.finish(x), maps",
        ),
        ("nothing is checkpointed", "if not checkpointed or not", "if True or not"),
        (
            "a network's own blocks are not checkpointed",
            "checkpointed=self.grad_checkpointing)\n\n\nclass Blocks",
            "checkpointed=False)\n\n\nclass Blocks",
        ),
        ("statistics count a batch twice", "buffer.copy_(value)", "pass"),
        ("unused stages stay", "for name in [*unused, *model.after_stages]:", "for name in model.after_stages:"),
        ("the head stays", "for name in [*unused, *model.after_stages]:", "for name in unused:"),
        ("maps of all stages come out", "forward_intermediates(x, self.out_indices,", "forward_intermediates(x, None,"),
        ("removed parameters are named", ' if f"model.{name}" in self.state_dict()', ""),
        ("a number is a position", "range(count - indices, count) if isinstance", "[indices] if isinstance"),
        ("negative positions count from 0", "i + count if i < 0 else i", "abs(i)"),
        ("the last block is never left out", "(last * i / max(1, count - 1)", "(0 * i / max(1, count - 1)"),
        ("the last block is left out less than asked", "max(1, count - 1)", "count"),
        (
            "the first stage alone counts",
            'rate("drop_path_rate", last), sum(depths)',
            'rate("drop_path_rate", last), depths[0]',
        ),
        ("an MLP may have no channels", "not 1 <= dim * mlp_ratio < math.inf", "not 0 <= dim * mlp_ratio < math.inf"),
        ("hidden channels are cut off", "return round(dim * mlp_ratio)", "return int(dim * mlp_ratio)"),
        ("linear maps begin as PyTorch's", "trunc_normal_(part.weight, std=0.02)", "trunc_normal_(part.weight)"),
        ("biases begin at random", "nn.init.zeros_(part.bias)", "pass"),
    ),
}


class Widen(nn.Module):
    """Tokens behind a class token that doubles what it sees; counts its calls."""

    def __init__(self, dim, out_dim):
        super().__init__()
        self.fc, self.bn, self.calls = nn.Linear(dim, out_dim), nn.BatchNorm1d(out_dim), 0
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        self.calls += 1
        return self.dropout(self.bn(self.fc(x).transpose(1, 2)).transpose(1, 2).tanh())


class Small(Classifier):
    """Pixels as tokens behind a class token, three stages of which the middle one has two blocks, two heads."""

    classifiers = ("head.fc", "second")
    after_stages = ("norm", "head", "second")

    def __init__(self, num_classes=5, in_chans=2):
        super().__init__(in_chans=in_chans, num_classes=num_classes, num_features=6)
        self.first = Widen(in_chans, 3)
        self.layers = nn.ModuleList([Blocks(Widen(3, 4), Widen(4, 4)), Blocks(Widen(4, 6))])
        for dim, name in ((3, "first"), (4, "layers.0"), (6, "layers.1")):
            self.feature_info.append({"num_chs": dim, "reduction": 1, "module": name})
        self.attn = glocal.build("QuadraticAttention", 6)  # exempt from decay, and never called
        self.norm = nn.LayerNorm(6)
        self.head = nn.Sequential()
        self.head.fc = linear_or_none(6, num_classes)
        self.second = linear_or_none(6, num_classes)

    def stem(self, x):
        return torch.cat([x.new_ones(x.shape[0], 1, x.shape[1]), x.flatten(2).mT], 1)

    def stages(self):
        return [self.first, *self.layers]

    def finish(self, x):
        return self.norm(x)

    def map_of(self, x, image):
        return x[:, 1:].unflatten(1, image.shape[2:])


IMAGE = (4, 2, 3, 5)


@pytest.fixture
def model():
    torch.manual_seed(3)
    return Small().eval()


def by_hand(model, image):
    """Every stage's tokens."""
    x = torch.cat([torch.ones(len(image), 1, 2), image.flatten(2).transpose(1, 2)], 1)
    found = [model.first(x)]
    found.append(model.layers[0][1](model.layers[0][0](found[0])))
    return [*found, model.layers[1][0](found[1])]


def test_scores(model):
    image = torch.randn(IMAGE)
    tokens = model.norm(by_hand(model, image)[-1])
    pooled = sum(tokens[:, i] for i in range(16)) / 16
    assert_close(model.forward_features(image), tokens)
    assert_close(model.forward_head(tokens, pre_logits=True), pooled)
    assert_close(model(image), pooled @ model.head.fc.weight.T + model.head.fc.bias)
    assert_close(model.forward_head(model.forward_features(image)), model(image))
    assert model.get_classifier() is model.head.fc


@pytest.mark.parametrize(
    ("indices", "stages"), [(None, [0, 1, 2]), (2, [1, 2]), ([0], [0]), ((-1, 0), [0, 2]), ([1, 1], [1])]
)
def test_maps_of_stages(model, indices, stages):
    image = torch.randn(IMAGE)
    every = by_hand(model, image)
    maps = [t[:, 1:].reshape(4, 3, 5, -1).permute(0, 3, 1, 2) for t in every]
    features, found = model.forward_intermediates(image, indices)
    assert_close(features, model.norm(every[-1]))
    assert len(found) == len(stages) and all(torch.equal(a, maps[i]) for a, i in zip(found, stages, strict=True))
    last = model.forward_intermediates(image, indices, output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(a.movedim(-1, 1), maps[i]) for a, i in zip(last, stages, strict=True))
    normed = model.forward_intermediates(image, norm=True, intermediates_only=True)
    assert_close(normed[2], model.norm(every[2])[:, 1:].reshape(4, 3, 5, 6).permute(0, 3, 1, 2))
    assert_close(normed[1], maps[1])


class Scaled(nn.Module):
    def __init__(self, checkpoints=None):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        if checkpoints is not None:
            self.grad_checkpointing = checkpoints

    def forward(self, x, factor):
        return self.fc(x) * factor


class Told(Classifier):
    """Stages that ask how wide the image is: one that is a block, one of several blocks."""

    def __init__(self):
        super().__init__(in_chans=2, num_classes=3, num_features=2)
        self.one, self.two = Scaled(), Scaled(False)
        self.feature_info.extend({"num_chs": 2, "reduction": 1, "module": name} for name in ("one", "two"))
        self.head = linear_or_none(2, 3)

    def stem(self, x):
        return x.movedim(1, -1)

    def stages(self):
        return [self.one, self.two]

    def needed(self, image):
        return {"factor": image.shape[3]}


def test_stages_may_need_more_than_tokens():
    image, model = torch.randn(IMAGE), Told()
    one = 5 * model.one.fc(image.movedim(1, -1))
    two = 5 * model.two.fc(one)
    assert_close(model.forward_features(image), two)
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        features, maps = model.forward_intermediates(image, output_fmt="NHWC")
        assert_close(features, two)
        assert_close(maps, [one, two])
        assert_close(model(image), model.head(two.mean((1, 2))))


def test_stages_behind_the_last_are_left_out(model):
    image = torch.randn(IMAGE)
    every = by_hand(model, image)
    calls = model.layers[1][0].calls
    features, maps = model.forward_intermediates(image, [1], stop_early=True)
    assert model.layers[1][0].calls == calls
    assert_close(features, every[1])
    assert len(maps) == 1
    assert_close(model.forward_intermediates(image, [1])[0], model.norm(every[2]))


@pytest.mark.parametrize("indices", [0, 4, -1, [3], [-4], []])
def test_other_stages_are_refused(model, indices):
    with pytest.raises(ValueError, match=r"^indices: .* of 3 stages; must be a number of last ones, positions below 3"):
        model.forward_intermediates(torch.randn(IMAGE), indices)


def test_other_formats_are_refused(model):
    with pytest.raises(ValueError, match=r"^output_fmt: 'NLC', must be 'NCHW' or 'NHWC'$"):
        model.forward_intermediates(torch.randn(IMAGE), output_fmt="NLC")


@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 3, 3, 5), (4, 2, 0, 5), (4, 2, 3, 5, 1)])
def test_what_is_no_image_is_refused(model, shape):
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=r"x has shape .*; this network takes images \[B, 2, H, W\]"):
            call(torch.zeros(shape))


def test_a_new_head(model):
    image = torch.randn(IMAGE)
    pooled = model.forward_head(model.forward_features(image), pre_logits=True)
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(image).shape == (4, 7) and model.second.out_features == 7
    model.reset_classifier(0)
    assert model.num_classes == 0 and torch.equal(model(image), pooled)
    assert torch.equal(Small(num_classes=0).eval()(image).std(0) > 0, torch.ones(6, dtype=torch.bool))
    model.double().reset_classifier(2)
    assert model.head.fc.weight.dtype == torch.float64
    for wrong in (-1, 2.5, True, False):
        with pytest.raises(ValueError, match=f"^num_classes: {wrong}"):
            model.reset_classifier(wrong)


def test_another_pooling(model):
    """Those that a network has; others are refused and leave all as it was."""
    image = torch.randn(IMAGE)
    pooled = model.forward_head(model.forward_features(image), pre_logits=True)
    assert model.global_pool == "avg"
    model.reset_classifier(0, "avg")
    assert torch.equal(model(image), pooled)
    for wrong in ("token", "max", "", 3):
        with pytest.raises(ValueError, match=f"^global_pool: {wrong!r}, Small has 'avg'; for .* forward_features$"):
            model.reset_classifier(7, global_pool=wrong)
    assert model.num_classes == 0 and model.global_pool == "avg"
    model.pools = ("avg", "token")
    model.reset_classifier(0, global_pool="token")
    assert model.global_pool == "token"
    model.reset_classifier(0)
    assert model.global_pool == "token"


@pytest.mark.parametrize("reached", [(2,), (0, 2), 1])
def test_checkpoints_change_nothing(reached):
    """Same draws of dropout, same gradients; a batch moves statistics once; nothing is kept inside blocks."""
    image = torch.randn(IMAGE)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        model = Small()
        model.set_grad_checkpointing(checkpointed)
        x = image.clone().requires_grad_()
        torch.manual_seed(6)
        maps = model.forward_intermediates(x, reached, intermediates_only=True)
        sum(m.square().sum() for m in maps).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(
            (x.grad, grads, dict(model.named_buffers()), [p.calls for p in model.modules() if type(p) is Widen])
        )
    (x, grads, buffers, calls), (x2, grads2, buffers2, calls2) = found
    assert_close(x2, x)
    assert_close(grads2, grads)
    assert_close(buffers2, buffers)
    assert calls == [1, 1, 1, 1] and calls2 == [2, 2, 2, 2]
    model.eval()
    with torch.no_grad():
        model(image)
    assert model.first.calls == 3
    model.set_grad_checkpointing(False)
    model(image)
    assert [p.calls for p in model.modules() if type(p) is Widen] == [4, 4, 4, 4]


def test_maps_alone(model):
    image = torch.randn(IMAGE)
    maps = [t[:, 1:].reshape(4, 3, 5, -1).permute(0, 3, 1, 2) for t in by_hand(model, image)]
    features = FeatureMaps(model, [1, 0])
    found = features(image)
    assert len(found) == 2 and all(torch.equal(a, b) for a, b in zip(found, maps, strict=False))
    assert features.feature_info.channels() == [3, 4] and features.feature_info.reduction() == [1, 1]
    assert [info["module"] for info in features.feature_info] == ["first", "layers.0"]
    names = {name.split(".")[1] for name, _ in features.named_parameters()}
    assert names == {"first", "layers", "attn"} and not any("layers.1" in n for n, _ in features.named_parameters())
    assert features.no_weight_decay() == {"model.attn.attention_centers", "model.attn.attention_spreads"}
    features.set_grad_checkpointing()
    assert features.model.grad_checkpointing and features.model.layers[0].grad_checkpointing


def test_what_decay_leaves_alone(model):
    assert model.no_weight_decay() == {"attn.attention_centers", "attn.attention_spreads"}


def test_maps_by_name():
    features = glocal.create_model(
        "all_attention_quadratic(dim=8, depth=3, num_heads=2)", features_only=True, out_indices=(0, -1)
    )
    assert [tuple(m.shape) for m in features(torch.zeros(2, 3, 6, 8))] == [(2, 8, 3, 4)] * 2
    assert features.feature_info.reduction() == [2, 2]
    with pytest.raises(ValueError, match=r"^indices: \(5,\) of 3 stages"):
        glocal.create_model("all_attention_quadratic(dim=8, depth=3)", features_only=True, out_indices=(5,))
    with pytest.raises(ValueError, match=r"^all_attention_quadratic: out_indices is 2, and scores are of no stage"):
        glocal.create_model("all_attention_quadratic(dim=8)", out_indices=2)
    with pytest.raises(ValueError, match=r"^features_only: 'no', must be True or False"):
        glocal.create_model("all_attention_quadratic(dim=8)", features_only="no")


def test_positions_of_stages():
    assert chosen(3, 4) == [1, 2, 3] and chosen([-1, 1], 4) == [1, 3] and chosen(None, 2) == [0, 1]


def test_rates_of_stochastic_depth():
    assert list(drop_path_rates(0.4, (2, 3))) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert list(drop_path_rates(0, (1,))) == [0]
    with torch.device("meta"):
        assert list(drop_path_rates(0.5, (1, 1))) == [0, 0.5]
    for wrong in (1, -0.1, "0.1"):
        with pytest.raises(ValueError, match=r"^drop_path_rate: "):
            drop_path_rates(wrong, (2, 2))


def test_widths_of_mlps():
    assert mlp_width(400, 1.28) == 512 and mlp_width(3, 1.5) == 4 and mlp_width(5, 0.74) == 4
    for wrong in ("two", 0, -1, True, 1e999, 0.1):
        with pytest.raises(ValueError, match=f"^mlp_ratio: {wrong!r}, must be a number that makes dim 8 one channel"):
            mlp_width(8, wrong)


def test_first_values_of_linear_maps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100), nn.Sequential(nn.Linear(100, 100, bias=False)), nn.Conv2d(3, 3, 3))
    before = model[2].bias.clone()
    start_linear_maps(model)
    for part in (model[0], model[1][0]):
        assert abs(part.weight.std().item() - 0.02) < 5e-4 and abs(part.weight.mean().item()) < 5e-4
    assert not model[0].bias.any() and torch.equal(model[2].bias, before)
