"""Losses against sums by hand, mixing against its definition, networks by name, and what is said of wrong ones."""

import math

import pytest
import torch
import torch.nn.functional as F

import glocal
from glocal.backbone import Backbone
from glocal.config import ModelConfig, TrainConfig
from glocal.tasks.classification import Criterion, accuracy, build_model, normaliser, predict

CPU = torch.device("cpu")


def built(model, chans=1, classes=3, size=(8, 12), **options):
    return build_model(ModelConfig(model=model), in_chans=chans, num_classes=classes, img_size=size, **options)


def criterion(labels=(0, 1, 2), classes=3, **recipe):
    return Criterion(TrainConfig(**recipe), torch.tensor(labels), classes, CPU)


def by_hand(scores, target):
    """Minus the mean log-probability of every image under its target distribution."""
    p = scores.double().exp()
    return -(target * (p / p.sum(1, keepdim=True)).log()).sum(1)


def smoothed(labels, classes, amount):
    """The distribution that label smoothing makes of a class: Szegedy et al., arXiv 1512.00567."""
    return torch.eye(classes, dtype=torch.float64)[labels] * (1 - amount) + amount / classes


# The loss


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_the_loss_by_hand(smoothing):
    scores, labels = torch.randn(5, 3) * 3, torch.tensor([0, 2, 2, 1, 0])
    found = criterion(label_smoothing=smoothing)(scores.half(), labels)
    expected = by_hand(scores.half().float(), smoothed(labels, 3, smoothing)).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_balanced_classes_by_hand(smoothing):
    # 6 images of class 0, 3 of class 1, 1 of class 2: they count 10/18, 10/9, 10/3
    balanced = criterion([0] * 6 + [1] * 3 + [2], class_balanced=True, label_smoothing=smoothing)
    scores, labels = torch.randn(4, 3) * 2, torch.tensor([0, 2, 1, 0])
    counts = torch.tensor([10 / 18, 10 / 3, 10 / 9, 10 / 18], dtype=torch.float64)
    expected = (counts * by_hand(scores, smoothed(labels, 3, smoothing))).sum() / counts.sum()
    assert balanced(scores, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    if not smoothing:
        weight = torch.tensor([10 / 18, 10 / 9, 10 / 3])
        assert balanced(scores, labels).item() == pytest.approx(F.cross_entropy(scores, labels, weight=weight).item())


def test_balance_does_not_change_what_one_image_asks_for():
    # The loss of an image of the common class is least at its smoothed label, however rare the other class is.
    balanced = criterion([0] * 99 + [1], classes=2, class_balanced=True, label_smoothing=0.1)
    best = torch.tensor([[0.95, 0.05]]).log().requires_grad_()
    (gradient,) = torch.autograd.grad(balanced(best, torch.tensor([0])), best)
    assert gradient.abs().max() < 1e-6


def test_a_class_without_an_image_breaks_nothing():
    balanced = criterion([0, 0, 1], classes=4, class_balanced=True)
    assert math.isfinite(balanced(torch.randn(3, 4), torch.tensor([0, 1, 0])).item())


# Mixing


def batch(n=6, classes=3):
    return torch.rand(n, 2, 10, 12) + torch.arange(n).view(n, 1, 1, 1), torch.arange(n) % classes


def test_no_mixing_is_no_change():
    images, labels = batch()
    same, whole = criterion().mix(images, labels)
    assert same is images and whole is labels


def test_mixup_is_its_definition():
    images, labels = batch()
    other, hot = images.roll(1, 0), torch.eye(3)
    for _ in range(10):
        mixed, soft = criterion(mixup=0.4).mix(images, labels)
        share = ((mixed - other) / (images - other)).flatten()  # of the image itself, at every pixel
        assert share.std() < 1e-4
        share = share.mean()
        torch.testing.assert_close(mixed, share * images + (1 - share) * other, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(soft, share * hot[labels] + (1 - share) * hot[labels.roll(1)], rtol=1e-4, atol=1e-4)
        assert soft.shape == (6, 3) and (soft >= 0).all() and torch.allclose(soft.sum(1), torch.ones(6))


def test_mixup_draws_from_its_beta_distribution():
    mixer = criterion(labels=(0, 1), classes=2, mixup=0.4)
    images = torch.stack([torch.zeros(1, 1, 1), torch.ones(1, 1, 1)])
    shares = torch.stack([mixer.mix(images, torch.tensor([0, 1]))[1][0, 0] for _ in range(600)])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.06)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.02)  # of Beta(a, a)


def test_cutmix_is_its_definition():
    images, labels = batch()
    other, hot = images.roll(1, 0), torch.eye(3)
    areas = set()
    for _ in range(20):
        mixed, soft = criterion(cutmix=1.0).mix(images, labels)
        cut = (mixed != images).all(1)  # [6, 10, 12]
        assert (cut == cut[0]).all()  # the same box in every image
        assert torch.equal(mixed, torch.where(cut[:, None], other, images))
        rows, columns = cut[0].any(1), cut[0].any(0)
        assert cut[0].sum() == rows.sum() * columns.sum()  # a rectangle
        share = 1 - cut[0].float().mean()
        torch.testing.assert_close(soft, share * hot[labels] + (1 - share) * hot[labels.roll(1)])
        areas.add(share.item())
    assert len(areas) > 5


def test_with_both_a_batch_has_one_of_them():
    images, labels = batch()
    both = criterion(mixup=1.0, cutmix=1.0)
    kinds = [torch.isin(both.mix(images, labels)[0], images).float().mean().item() > 0.9 for _ in range(60)]
    assert 15 < sum(kinds) < 45  # cutmix makes no new pixel values


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_the_loss_of_a_mixed_batch_is_the_mixture_of_losses(smoothing):
    images, labels = batch()
    mixing = criterion(mixup=1.0, label_smoothing=smoothing)
    _, soft = mixing.mix(images, labels)
    share = soft[0, 0].double()  # image 0 has class 0, image 5 before it class 2
    scores = torch.randn(6, 3)
    own, other = (by_hand(scores, smoothed(each, 3, smoothing)) for each in (labels, labels.roll(1)))
    assert mixing(scores, soft).item() == pytest.approx((share * own + (1 - share) * other).mean().item(), rel=1e-5)


def test_a_mixed_image_counts_as_much_as_its_parts():
    balanced = criterion([0] * 6 + [1] * 3 + [2], class_balanced=True, label_smoothing=0, mixup=1.0)
    scores, soft = torch.randn(2, 3), torch.tensor([[0.25, 0.75, 0], [0, 0.5, 0.5]])
    counts = torch.tensor([0.25 * 10 / 18 + 0.75 * 10 / 9, 0.5 * 10 / 9 + 0.5 * 10 / 3], dtype=torch.float64)
    expected = (counts * by_hand(scores, soft)).sum() / counts.sum()
    assert balanced(scores, soft).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("recipe", [{"mixup": 0.3}, {"cutmix": 0.3}, {"mixup": 0.3, "cutmix": 0.3}])
def test_the_random_state_decides_the_mixing(recipe):
    images, labels = batch()

    def mixed(seed):
        torch.manual_seed(seed)
        return criterion(**recipe).mix(images, labels)

    assert all(torch.equal(a, b) for a, b in zip(mixed(1), mixed(1), strict=True))
    assert any(not torch.equal(mixed(1)[1], mixed(seed)[1]) for seed in (2, 3, 4))


# Predictions


class Mean(torch.nn.Module):
    """Scores of an image: its channels' means; in training mode nonsense."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return (x.mean((2, 3)) * self.scale) * (-1 if self.training else 1)


def test_predictions_and_losses_by_hand():
    images = torch.randint(0, 256, (300, 3, 2, 2), dtype=torch.uint8)
    labels = torch.arange(300) % 3
    mean, deviation = [10.0, 20.0, 30.0], [1.0, 2.0, 40.0]
    found = predict(Mean(), images, labels, normaliser(mean, deviation, CPU))
    x = images.double().mean((2, 3))
    scores = (x - torch.tensor(mean)) / torch.tensor(deviation)
    log_p = scores - scores.logsumexp(1, keepdim=True)
    assert torch.equal(found.predicted, scores.argmax(1)) and found.predicted.dtype == torch.int64
    torch.testing.assert_close(found.loss.double(), -log_p[torch.arange(300), labels], rtol=1e-4, atol=1e-3)
    assert accuracy(torch.tensor([1, 2, 0, 1]), torch.tensor([1, 0, 0, 0])) == 50


# Networks


def test_a_layout_is_built_as_configured():
    config = ModelConfig("C-SelfAttention", dims=(32, 64), depths=(1, 2), mlp_ratio=2, layer_scale=0.5, positions=False)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    model = build_model(config, in_chans=3, num_classes=4, img_size=(16, 16), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    same = Backbone(
        "C-SelfAttention",
        **{"in_chans": 3, "num_classes": 4, "img_size": (16, 16), "dims": (32, 64), "depths": (1, 2), "mlp_ratio": 2},
        layer_scale=0.5,
        positions=False,
    )
    ours, theirs = model.state_dict(), same.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


USERS = """
import torch
from torch import nn

class Full(nn.Module):
    def __init__(self, num_classes, in_chans, img_size, width=4):
        super().__init__()
        self.fixed = nn.Dropout(0.5).eval()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(in_chans * img_size[0] * img_size[1], width),
                                 nn.BatchNorm1d(width), nn.Linear(width, num_classes))
    def forward(self, x):
        return self.net(x)

class Lazy(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.LazyLinear(num_classes)
    def forward(self, x):
        return self.head(x.flatten(1))

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 5)
    def forward(self, x):
        return self.head(x.mean((1, 2, 3)).unsqueeze(1))

class Noisy(Full):
    def forward(self, x):
        return self.net(x) + torch.rand(())

class Tuple(Full):
    def forward(self, x):
        return self.net(x), x

class Dict(Full):
    def forward(self, x):
        return {"logits": self.net(x)}

class Pixels(Full):
    def forward(self, x):
        return x

class Breaks(Full):
    def forward(self, x):
        raise KeyError("no such\\nthing")
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)


def test_a_users_network_takes_what_its_constructor_has(users):
    full = built("nets.py:Full(width=8)", chans=3)
    assert full.training and not full.fixed.training  # trying it has left no trace
    assert full.net[2].num_batches_tracked == 0 and torch.equal(full.net[2].running_mean, torch.zeros(8))
    assert full(torch.zeros(5, 3, 8, 12)).shape == (5, 3) and full.net[1].out_features == 8
    assert built("nets.py:Own", classes=5)(torch.zeros(2, 1, 8, 12)).shape == (2, 5)


def test_lazy_layers_are_ready_to_train(users):
    model = built("nets.py:Lazy")
    model(torch.ones(2, 1, 8, 12)).sum().backward()
    assert model.head.weight.grad.shape == (3, 96)


def test_the_seed_decides_a_users_first_weights(users):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, same, other = (built("nets.py:Full()", seed=seed).net[1].weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    built("nets.py:Noisy()")
    after = torch.get_rng_state()
    torch.manual_seed(1)
    torch.nn.Linear(96, 4), torch.nn.Linear(4, 3)
    assert torch.equal(torch.get_rng_state(), after)  # trying it draws nothing


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nets.py:Tuple", r"^nets.py:Tuple: gives tuple for one image; it must give scores \(1, 3\)$"),
        ("nets.py:Dict", r"^nets.py:Dict: gives dict for one image"),
        ("nets.py:Pixels", r"^nets.py:Pixels: gives \(1, 1, 8, 12\) for one image"),
        ("nets.py:Own", r"^nets.py:Own: gives \(1, 5\) for one image; it must give scores \(1, 3\)$"),
        ("nets.py:Breaks", r"^nets.py:Breaks: cannot run on images \(1, 1, 8, 12\): "),
        ("nets.py:Ful", r"did you mean 'Full'\?"),
        ("nets.py:Full(widht=8)", r"did you mean 'width'\?"),
        ("none.py:Net", r"no file 'none.py'"),
        ("resnet10t", r"^model: 'resnet10t' is none; .* or write 'timm:NAME' or 'path/to/file.py:Class\(...\)'$"),
        ("SelfAttention(num_heads=2)", r"^model: 'SelfAttention' is none; .*Valid: all_attention_generalized, all_"),
        (
            "all_atention_learned(dim=8)",
            r"^model: 'all_atention_learned' is none; did you mean 'all_attention_learned'",
        ),
        ("all_attention_learned(dims=8)", r"^all_attention_learned: has no argument 'dims'; did you mean 'dim'\?"),
        ("all_attention_learned(dim=8, num_classes=5)", r"gives \(1, 5\) for one image; it must give scores \(1, 3\)"),
        ("all_attention_learned(dim=8, in_chans=3)", r"cannot run on images .*takes images \[B, 3, H, W\]$"),
    ],
)
def test_networks_that_cannot_be_used(users, model, message):
    with pytest.raises(ValueError, match=message) as error:
        built(model)
    assert "\n" not in str(error.value)


def test_networks_of_ours_by_name():
    """Made for the data; what the text says counts more, so that tables may be larger."""
    net = built("all_attention_learned(dim=8, depth=2, num_heads=2)", chans=1, classes=7, size=(9, 12), seed=5)
    torch.manual_seed(5)
    same = glocal.create_model(
        "all_attention_learned", dim=8, depth=2, num_heads=2, in_chans=1, num_classes=7, img_size=(9, 12)
    ).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in net.state_dict().items())
    assert net(torch.zeros(2, 1, 9, 12)).shape == (2, 7) and net.training
    wide = built("all_attention_learned(dim=8, depth=1, num_heads=2, img_size=64)", size=(8, 8))
    assert len(wide.blocks[0].attn.row_embeddings.weight) == 2 * 32 - 1


def test_timm_networks_by_name():
    timm = pytest.importorskip("timm")
    net = built("timm:resnet10t", chans=1, classes=7, size=(32, 32), seed=5)
    torch.manual_seed(5)
    same = timm.create_model("resnet10t", num_classes=7, in_chans=1).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in net.state_dict().items())
    assert net(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    vit = built("timm:vit_tiny_patch16_224", chans=3, classes=4, size=(32, 48), seed=0)
    assert vit.pos_embed.shape[1] == 2 * 3 + 1 and vit(torch.zeros(2, 3, 32, 48)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet10x", r"^timm:resnet10x: timm has no such model; did you mean 'timm:resnet10t'\?$"),
        ("hf-hub:timm/resnet10t", "timm has no such model"),  # nothing is fetched
        ("", "timm has no such model; timm.list_models"),
        ("crossvit_tiny_240", r"^timm:crossvit_tiny_240: cannot (run on|be built for)"),  # for squares of 240 pixels
    ],
)
def test_timm_networks_that_cannot_be_used(name, message):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message) as error:
        built(f"timm:{name}", size=(32, 32))
    assert "\n" not in str(error.value)


# planted by scripts/mutate
FAULTS = (
    (
        "smoothed labels are weighted by their classes",
        'labels, label_smoothing=self._smoothing, reduction="none")',
        'labels, self._weight, label_smoothing=self._smoothing, reduction="none") / self._weight[labels]',
    ),
    (
        "a mixed image counts as much as one of its parts",
        "labels @ self._weight if",
        "self._weight[labels.argmax(1)] if",
    ),
    ("with mixup and cutmix there is only mixup", "torch.randint(len(self._mixers), ())", "0"),
    ("trying a network leaves it in evaluation mode", "module.training = before", "pass"),
    ("models of ours are not made for the data", "create_model(text, **made_for)", "create_model(text)"),
    ("names of ours say what timm has", "if name not in list_models():", "if False:"),
    ("trying a network draws random numbers", "with torch.random.fork_rng(), torch.no_grad()", "with torch.no_grad()"),
)
