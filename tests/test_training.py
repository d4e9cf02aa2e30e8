"""The loop: deterministic, with the recipe it states, loud when a loss is not finite."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file

from glocal import training
from glocal.backbone import Backbone
from glocal.checkpoint import CheckpointError
from glocal.optimizer import parameter_groups, rate

from .small_run import StopAt, easy, numbers, run, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_learns():
    result = training.train(run(epochs=6), easy(chans=3))
    assert result.epochs[-1].test_accuracy == result.test_accuracy == 100 and result.train_accuracy == 100
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss
    assert [epoch.epoch for epoch in result.epochs] == [1, 2, 3, 4, 5, 6]
    assert all(epoch.seconds > 0 and epoch.images_per_second > 0 for epoch in result.epochs)
    net = Backbone("C-T", in_chans=3, num_classes=2, img_size=8, dims=(32, 32))
    assert result.params == sum(p.numel() for p in net.parameters())
    assert result.images_per_second_forward > 0
    assert result.peak_memory > 4 * 3 * result.params  # gradients and two averages of them, and activations


def test_small_sets_are_tested_less_often():
    tested = {
        (train, test): [
            epoch.epoch
            for epoch in training.train(run(epochs=5, batch_size=4), easy(train, test)).epochs
            if epoch.test_accuracy is not None
        ]
        for train, test in ((8, 20), (8, 16), (20, 20), (8, 100))
    }
    # By hand: after 24 and 40 images (of 20, 40); after every second epoch and the last; every one; the last alone.
    assert tested == {(8, 20): [3, 5], (8, 16): [2, 4, 5], (20, 20): [1, 2, 3, 4, 5], (8, 100): [5]}


def test_the_seed_decides_everything():
    config = run(crop_padding=1, flip=True, randaugment=1, mixup=0.2, cutmix=1.0)
    torch.manual_seed(1)
    one = training.train(config, easy())
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert numbers(training.train(config, easy())) == numbers(one)
    assert numbers(training.train(dataclasses.replace(config, seed=1), easy())) != numbers(one)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # what is outside is left as it was


class Sgd:
    """Momentum 0.9 in two lines: v = 0.9 v + g + decay w, then w = w - lr v."""

    def __init__(self, groups):
        self.param_groups = groups
        self.velocity = {p: torch.zeros_like(p) for group in groups for p in group["params"]}

    def zero_grad(self):
        for p in self.velocity:
            p.grad = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.velocity[p] = 0.9 * self.velocity[p] + p.grad + group["weight_decay"] * p
                p -= group["lr"] * self.velocity[p]


def by_hand(config, data, steps):
    """The first steps of a run, written out: the recipe in plain PyTorch. The order of images is the run's own."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = Backbone(config.model.layout, in_chans=1, num_classes=2, img_size=8, dims=config.model.dims).train()
    recipe = config.train
    pixels = data.train_images.double()
    x = ((pixels - pixels.mean()) / pixels.std(correction=0)).float()
    free = [name for name, p in model.named_parameters() if p.ndim == 1 or name.endswith("position_bias_table")]
    groups = [[p for name, p in model.named_parameters() if (name in free) == is_free] for is_free in (False, True)]
    decays = (recipe.weight_decay, 0.0)
    groups = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=True)]
    optimizer = torch.optim.AdamW(groups) if recipe.optimizer == "adamw" else Sgd(groups)
    per_epoch = len(x) // recipe.batch_size
    total, losses, averaged = per_epoch * recipe.epochs, [], None
    for step in range(steps):
        if step % per_epoch == 0:
            batches = order_of(config.seed, step // per_epoch, len(x)).split(recipe.batch_size)
        chosen = batches[step % per_epoch]
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * rate(step, total, recipe.warmup)
        log_p = model(x[chosen]).log_softmax(1)
        right = log_p.gather(1, data.train_labels[chosen, None])[:, 0]
        loss = -((1 - recipe.label_smoothing) * right + recipe.label_smoothing * log_p.mean(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= min(1.0, (recipe.max_grad_norm or math.inf) / (norm.item() + 1e-6))
        optimizer.step()
        losses.append(loss.item())
        state = {name: value.clone() for name, value in model.state_dict().items()}
        if averaged is None:
            averaged = state
        else:
            for name, value in state.items():
                mixed = recipe.ema * averaged[name] + (1 - recipe.ema) * value
                averaged[name] = mixed if value.is_floating_point() else value  # counts are no averages
    return losses, state, averaged


def order_of(seed, epoch, count):
    """The images of an epoch in order, seen through the only way they leave the loop."""
    seen = []
    data = easy()
    marked = dataclasses.replace(data, train_images=torch.arange(count).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).byte())

    class Seen(Exception):
        pass

    original = training.normaliser

    def spy(*_):
        return lambda images: seen.append(images[:, 0, 0, 0].long()) or torch.randn(len(images), 1, 8, 8)

    training.normaliser = spy
    try:
        training.train(dataclasses.replace(run(epochs=epoch + 1), seed=seed), marked)
    finally:
        training.normaliser = original
    flat = [batch for batch in seen if len(batch) == 16]
    return torch.cat(flat[4 * epoch : 4 * epoch + 4])


def test_the_steps_are_those_of_the_recipe(tmp_path):
    config = run(epochs=2, ema=0.6)
    data = easy()
    result = training.train(config, data, tmp_path / "run")
    losses, _, averaged = by_hand(config, data, 8)
    assert result.epochs[0].train_loss == pytest.approx(sum(losses[:4]) / 4, rel=1e-4)
    assert result.epochs[1].train_loss == pytest.approx(sum(losses[4:]) / 4, rel=1e-3)
    assert_close_in_nearly_all(weights(tmp_path / "run"), averaged)
    plain = training.train(run(epochs=2), data, tmp_path / "plain")
    _, state, _ = by_hand(run(epochs=2), data, 8)
    assert numbers(plain)[0][0] == numbers(result)[0][0]  # the average changes what is tested, not what is trained
    assert_close_in_nearly_all(weights(tmp_path / "plain"), state)


def assert_close_in_nearly_all(found, expected):
    """Adam turns a gradient of rounding errors into a whole step, so that a few entries may differ by one."""
    off = torch.cat([(found[name] - value).abs().flatten() for name, value in expected.items()])
    assert (off > 1e-5).float().mean() < 0.03 and off.max() < 0.02


def test_every_epoch_has_every_image_once_in_another_order():
    orders = [order_of(0, epoch, 64) for epoch in (0, 1)]
    assert all(sorted(order.tolist()) == list(range(64)) for order in orders)
    assert not torch.equal(*orders) and not torch.equal(orders[0], order_of(1, 0, 64))


def test_a_loss_that_is_not_finite_stops_with_step_and_rate(tmp_path):
    with pytest.raises(
        training.NotFinite, match=r"C-T, seed 0: the loss is (nan|inf) at step \d+ of 12, learning rate"
    ) as error:
        training.train(run(lr=1e30), easy(), tmp_path / "run", checkpoint_seconds=0)
    assert "lower the learning rate" in str(error.value) and str(tmp_path) in str(error.value)
    [kept] = (tmp_path / "run" / "checkpoints").iterdir()  # the last good one
    assert all(value.isfinite().all() for value in load_file(kept / "weights.safetensors").values())


def losses(monkeypatch, change=lambda number, loss: loss):
    """Of every step, from the first on, as the criterion gives them."""
    seen, criterion = [], training.Criterion.__call__

    def changed(self, *given):
        seen.append(change(len(seen) + 1, criterion(self, *given)))
        return seen[-1]

    monkeypatch.setattr(training.Criterion, "__call__", changed)
    return seen


def test_every_loss_is_noted_with_its_step_and_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_STEPS_PER_LINE", 1)
    seen, config = losses(monkeypatch), run(epochs=2)
    training.train(config, easy(), tmp_path / "run", checkpoint_seconds=1e9)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if "lr" in line] == [
        {"step": i + 1, "loss": loss.item(), "lr": config.train.lr * rate(i, 8, config.train.warmup)}
        for i, loss in enumerate(seen)
    ]
    assert [line["step"] for line in lines if "epoch" in line] == [4, 8]


@pytest.mark.parametrize("seconds", [0, 1e9])
def test_the_step_whose_loss_is_not_finite_is_named(seconds, tmp_path, monkeypatch):
    losses(monkeypatch, lambda number, loss: loss * (math.nan if number == 3 else 1))
    with pytest.raises(training.NotFinite, match="the loss is nan at step 3 of 12"):
        training.train(run(), easy(), tmp_path / "run", checkpoint_seconds=seconds)


def test_what_a_loss_that_is_not_finite_leads_to_does_not_hide_it(monkeypatch):
    def check(number, loss):
        if not loss.isfinite():
            raise RuntimeError("weights are not finite")
        return loss * (math.inf if number == 2 else 1)

    losses(monkeypatch, check)
    with pytest.raises(training.NotFinite, match="the loss is inf at step 2 of 12"):
        training.train(run(), easy())


def test_progress_is_told():
    listener = StopAt(None)
    training.train(run(epochs=2), easy(train=70), listener=listener)
    assert listener.steps == [(i, 8) for i in range(1, 9)]  # 70 images: four whole batches of 16 an epoch
    assert len(listener.epochs) == 2


@pytest.mark.parametrize("limit", [0.05, 0])
def test_the_steps_of_sgd(tmp_path, limit):
    config = run(epochs=2, optimizer="sgd", lr=0.05, weight_decay=0.1, max_grad_norm=limit)
    result = training.train(config, easy(), tmp_path / "run")
    losses, state, _ = by_hand(config, easy(), 8)
    assert result.epochs[0].train_loss == pytest.approx(sum(losses[:4]) / 4, rel=1e-4)
    found = weights(tmp_path / "run")
    for name in state:
        torch.testing.assert_close(found[name], state[name], rtol=1e-3, atol=1e-4)


def test_fewer_images_than_a_batch():
    assert len(training.train(run(epochs=1, batch_size=1000), easy(train=10)).epochs) == 1


# What a run leaves behind


def test_a_runs_folder(tmp_path):
    data = easy()
    config = run(epochs=2)
    result = training.train(config, data, tmp_path / "run", tensorboard=True)
    names = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith("events.")}
    expected = ("config.yaml", "metrics.jsonl", "predictions.safetensors", "result.json", "weights.safetensors")
    assert names == set(expected)
    assert len(list((tmp_path / "run").glob("events.*"))) == 1
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["train"]["lr"] == 3e-3 and kept["model"]["dims"] == [32, 32] and len(kept["images"]) == 16
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8]
    assert [line["test_accuracy"] for line in lines] == [epoch.test_accuracy for epoch in result.epochs]
    # the final weights give the predictions that are kept, and the losses of the result
    model = Backbone("C-T", in_chans=1, num_classes=2, img_size=8, dims=(32, 32)).eval()
    model.load_state_dict(weights(tmp_path / "run"))
    pixels = data.train_images.double()
    x = ((data.test_images.double() - pixels.mean()) / pixels.std(correction=0)).float()
    with torch.no_grad():
        scores = model(x)
    kept = load_file(tmp_path / "run" / "predictions.safetensors")
    assert torch.equal(kept["predicted"].long(), scores.argmax(1)) and torch.equal(
        kept["label"].long(), data.test_labels
    )
    torch.testing.assert_close(kept["loss"], F.cross_entropy(scores, data.test_labels, reduction="none"))
    assert result.test_loss == pytest.approx(kept["loss"].mean().item())


# Where a run starts from, and on what


def test_a_run_starts_from_weights_with_a_new_head(tmp_path):
    training.train(run(), easy(), tmp_path / "first")
    three = dataclasses.replace(
        easy(), train_labels=torch.arange(64) % 3, test_labels=torch.arange(20) % 3, classes=tuple("abc")
    )
    two = Backbone("C-T", in_chans=1, num_classes=2, img_size=8, dims=(32, 32))
    new = two.head.fc.weight.clone()
    training.start_from(two, tmp_path / "first" / "weights.safetensors", new_head=True)
    assert torch.equal(two.head.fc.weight, new)  # though the other would fit
    model = Backbone("C-T", in_chans=1, num_classes=3, img_size=8, dims=(32, 32))
    head = model.head.fc.weight.clone()
    training.start_from(model, tmp_path / "first" / "weights.safetensors")
    first = weights(tmp_path / "first")
    for name, value in model.state_dict().items():
        assert (
            torch.equal(value, head if name == "head.fc.weight" else first.get(name, value)) or name == "head.fc.bias"
        )
    config = dataclasses.replace(run(lr=1e-12), weights=str(tmp_path / "first" / "weights.safetensors"))
    training.train(config, three, tmp_path / "second")
    torch.testing.assert_close(weights(tmp_path / "second")["stem.conv1.weight"], first["stem.conv1.weight"])
    assert weights(tmp_path / "second")["head.fc.weight"].shape == (3, 32)
    again = training.train(dataclasses.replace(config, train=run(lr=1e-12).train), easy())  # the same head: kept
    assert again.epochs[0].test_accuracy == training.train(run(), easy()).epochs[-1].test_accuracy


def test_weights_of_another_network_are_refused(tmp_path):
    model = Backbone("C-T", in_chans=1, num_classes=2, img_size=8, dims=(32, 32))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for changed, message in [
        ({"stem.conv1.weight": torch.zeros(3, 3)}, r"stem.conv1.weight has shape \(3, 3\), this network's"),
        ({"extra": torch.zeros(1)}, "extra is not one of this network"),
        ({"stem.norm1.bias": None}, "stem.norm1.bias is missing"),
    ]:
        made = {name: value for name, value in (state | changed).items() if value is not None}
        save_file(made, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match=message):
            training.start_from(model, tmp_path / "other.safetensors")


def test_fp16_needs_a_gpu():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="fp16 needs a GPU; on a CPU use bf16"):
            training.train(run(precision="fp16"), easy())


def test_the_rate_rises_and_falls():
    rates = [rate(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1 and all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.5) and 0 < rates[99] < 0.001
    assert rate(0, 1, 0.1) == 1


def test_one_axis_is_not_decayed():
    model = Backbone("C-SelfAttention(num_heads=2)", in_chans=1, num_classes=2, img_size=8)
    decayed, free = parameter_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and free["weight_decay"] == 0
    assert {p.ndim for p in free["params"]} == {1} and min(p.ndim for p in decayed["params"]) == 2
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


# planted by scripts/mutate
FAULTS = {
    "training.py": [
        (
            "dropout depends on what was drawn before",
            "        torch.manual_seed(generator.initial_seed())  # dropout, stochastic depth, mixing\n",
            "",
        ),
        (
            "a step has the rate of the next one",
            "        lr = self._lr(self.step)\n",
            "        lr = self._lr(self.step + 1)\n",
        ),
        ("gradients are not clipped", "if recipe.max_grad_norm:", "if False:"),
        ("without a limit all gradients are cut to nothing", "if recipe.max_grad_norm:", "if True:"),
        ("every epoch has the same order", 'self._seeded(f"epoch {number}")', 'self._seeded("epoch")'),
        (
            "the weights that are tested are not the averaged ones",
            "return self._plain() if self.average is None else self.average.module",
            "return self._plain()",
        ),
        ("large tests follow every epoch of few images", "return self.step == self.steps or ", "return True or "),
        (
            "a loss has the next one's rate",
            "self.unread(), self._lr(self.step - 1)",
            "self.unread(), self._lr(self.step)",
        ),
        (
            "a loss has the next one's number",
            '_note({"step": self.step, "loss"',
            '_note({"step": self.step + 1, "loss"',
        ),
        (
            "an error of the next step hides the loss that led to it",
            "            finally:\n                # of",
            "            except ZeroDivisionError:\n                pass\n            else:\n                # of",
        ),
        ("a loss that is not finite is stepped on", "if not math.isfinite(loss):", "if False:"),
        ("whole numbers are averaged, cut off", "if not value.is_floating_point():", "if False:"),
        (
            "the last loss of an epoch is lost",
            "        self._read()\n        trained",
            "        self.unread = None\n        trained",
        ),
        (
            "a state is kept before its loss is known",
            "                self._read()\n                self.seconds",
            "                self.seconds",
        ),
    ],
    "optimizer.py": [
        (
            "scales and biases are decayed",
            '{"params": free, "weight_decay": 0.0}',
            '{"params": free, "weight_decay": weight_decay}',
        ),
        ("every recipe has AdamW", 'if recipe.optimizer == "sgd":', "if False:"),
        ("SGD has no momentum", "momentum=0.9, fused=True", "fused=True"),
        ("the rate rises from zero", "return (step + 1) / rising", "return step / rising"),
    ],
}
