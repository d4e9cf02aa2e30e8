"""The loop: deterministic, with the recipe it states, exact after an interruption, loud when a loss is not finite."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file

import glocal
from glocal import checkpoint, training
from glocal.backbone import Backbone
from glocal.checkpoint import CheckpointError
from glocal.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from glocal.data import ImageData
from glocal.data.splits import fold, fraction, hold_out
from glocal.runs import identity, images_of


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def easy(train=64, test=20, chans=1):
    """Two classes told apart by which half is bright."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 60, (train + test, chans, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(train + test) % 2
    images[labels == 1, :, :, :4] += 150
    images[labels == 0, :, :, 4:] += 150
    return ImageData("easy", images[:train], labels[:train], images[train:], labels[train:], ("right", "left"), "probe")


def run(**recipe):
    config = {"epochs": 3, "batch_size": 16, "lr": 3e-3} | recipe
    return RunConfig(DataConfig("easy"), ModelConfig("C-T", dims=(32, 32)), TrainConfig(**config))


def numbers(result):
    return [(epoch.train_loss, epoch.test_accuracy) for epoch in result.epochs]


def weights(folder):
    return load_file(folder / "weights.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Stop(Exception):
    """Ends a run from outside."""


class StopAt:
    """A listener that ends the run after a step."""

    def __init__(self, step):
        self.at = step
        self.steps, self.epochs = [], []

    def step(self, done, steps):
        self.steps.append((done, steps))
        if done == self.at:
            raise Stop

    def epoch(self, result):
        self.epochs.append(result)


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


def by_hand(config, data, steps):
    """The first steps of a run, written out: the recipe in plain PyTorch. The order of images is the run's own."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = Backbone(config.model.layout, in_chans=1, num_classes=2, img_size=8, dims=config.model.dims).train()
    recipe = config.train
    pixels = data.train_images.double()
    x = ((pixels - pixels.mean()) / pixels.std(correction=0)).float()
    groups = [[p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]]
    decays = (recipe.weight_decay, 0.0)
    optimizer = torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=True)]
    )
    per_epoch = len(x) // recipe.batch_size
    total, losses, averaged = per_epoch * recipe.epochs, [], None
    for step in range(steps):
        if step % per_epoch == 0:
            batches = order_of(config.seed, step // per_epoch, len(x)).split(recipe.batch_size)
        chosen = batches[step % per_epoch]
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * training.rate(step, total, recipe.warmup)
        log_p = model(x[chosen]).log_softmax(1)
        right = log_p.gather(1, data.train_labels[chosen, None])[:, 0]
        loss = -((1 - recipe.label_smoothing) * right + recipe.label_smoothing * log_p.mean(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= min(1.0, recipe.max_grad_norm / (norm.item() + 1e-6))
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


def test_progress_is_told():
    listener = StopAt(None)
    training.train(run(epochs=2), easy(train=70), listener=listener)
    assert listener.steps == [(i, 8) for i in range(1, 9)]  # 70 images: four whole batches of 16 an epoch
    assert len(listener.epochs) == 2


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


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch):
    first = training.train(run(), easy(), tmp_path / "run")
    monkeypatch.setattr(training, "build_model", None)
    assert training.train(run(), easy(), tmp_path / "run") == first
    moved = dataclasses.replace(run(), data=DataConfig("elsewhere"))
    assert training.train(moved, easy(), tmp_path / "run") == first  # the images count, not where they lie


@pytest.mark.parametrize("of", ["config", "images"])
def test_a_folder_of_another_run_is_refused(tmp_path, of):
    training.train(run(epochs=1), easy(), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    config, data = (run(epochs=2), easy()) if of == "config" else (run(epochs=1), easy(test=24))
    said = "train.epochs is 1 there, 2 here" if of == "config" else "images is"
    with pytest.raises(CheckpointError, match=rf"holds another run \({said}"):
        training.train(config, data, tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


RECIPES = {
    "plain": {},
    "everything": {
        "ema": 0.9, "mixup": 0.2, "cutmix": 1.0, "randaugment": 1, "crop_padding": 1, "flip": True,
        "class_balanced": True,
    },
    "bf16": {"precision": "bf16"},
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stop", [1, 3, 4, 6, 12])
def test_an_interrupted_run_goes_on_exactly(tmp_path, recipe, stop):
    config = run(epochs=3, **RECIPES[recipe])
    whole = training.train(config, easy(), tmp_path / "whole")
    with pytest.raises(Stop):
        training.train(config, easy(), tmp_path / "cut", listener=StopAt(stop), checkpoint_seconds=0)
    state = torch.get_rng_state()
    listener = StopAt(None)
    cut = training.train(config, easy(), tmp_path / "cut", listener=listener)
    assert torch.equal(torch.get_rng_state(), state)
    # the state after an epoch is kept when its test is done, which here it was not
    assert [done for done, _ in listener.steps] == list(range(stop + (stop % 4 != 0), 13))
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert numbers(cut) == numbers(whole) and cut.peak_memory == whole.peak_memory
    assert (cut.train_loss, cut.test_loss) == (whole.train_loss, whole.test_loss)
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_stochastic_depth_goes_on_exactly(tmp_path):
    config = run(epochs=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, drop_path=0.5, layer_scale=1e-3))
    training.train(config, easy(), tmp_path / "whole")
    with pytest.raises(Stop):
        training.train(config, easy(), tmp_path / "cut", listener=StopAt(3), checkpoint_seconds=0)
    training.train(config, easy(), tmp_path / "cut")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_metrics_of_steps_that_are_done_again_are_taken_back(tmp_path):
    config = run(epochs=3)
    with pytest.raises(Stop):
        training.train(config, easy(), tmp_path / "run", listener=StopAt(6), checkpoint_seconds=0)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 7, "loss": 1.0}\n{"step": 8, "los')
    training.train(config, easy(), tmp_path / "run")
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [4, 8, 12]


def test_a_full_disk_keeps_the_last_state(tmp_path, monkeypatch):
    config = run(epochs=3)
    whole = training.train(config, easy(), tmp_path / "whole")
    saved = checkpoint.write_whole

    def full(path, content):
        if path.name == "state.pt" and "step-00000004" not in path.parent.name:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device", str(path))
        saved(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_whole", full)
        with pytest.raises(OSError, match="No space left"):
            training.train(config, easy(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    listener = StopAt(None)
    assert numbers(training.train(config, easy(), tmp_path / "run", listener=listener)) == numbers(whole)
    assert listener.steps[0] == (5, 12) and same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


# Forked from one warm process: importing PyTorch twenty times would take a minute.
KILLED = """
import os, random, signal, sys, time, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_training import easy, run
from glocal import training
torch.set_num_threads(1)
folder = Path(sys.argv[2])

def go(name):
    training.train(run(epochs=EPOCHS), easy(), folder / name, checkpoint_seconds=0.02)

def forked(name):
    pid = os.fork()
    if pid == 0:
        go(name)
        os._exit(0)
    return pid

EPOCHS = 2
began = time.monotonic()
go("warm")  # and imports what training imports
moments = random.Random(int(sys.argv[3]))
EPOCHS = 70
began = time.monotonic()
go("whole")
usual = time.monotonic() - began
kills = 0
while kills < 20 and not (folder / "killed" / "result.json").exists():
    pid = forked("killed")
    time.sleep(moments.random() * usual / 25)
    os.kill(pid, signal.SIGKILL)
    kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
print(kills)
go("killed")
"""


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path):
    source = os.pathsep.join([str(Path(glocal.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), "0"],
        env=os.environ | {"PYTHONPATH": source}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 20  # it was not finished before
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    lines = [
        [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in path.read_text().splitlines()]
        for path in (tmp_path / "killed" / "metrics.jsonl", tmp_path / "whole" / "metrics.jsonl")
    ]
    assert lines[0] == lines[1] and len(lines[0]) > 50


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


def test_which_images_a_run_sees():
    data = easy()
    assert images_of(run(), data) is data

    def of(**options):
        return images_of(dataclasses.replace(run(), data=DataConfig("easy", **options), seed=3), data)

    def equal(one, other):
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)

    assert equal(of(fraction=0.5), fraction(data, 0.5, 3))
    assert equal(of(folds=4, fold=1), fold(data, 1, 4))
    assert equal(of(validation=True), hold_out(data))
    assert equal(of(fraction=0.5, folds=4, fold=1, validation=True), hold_out(fraction(fold(data, 1, 4), 0.5, 3)))
    assert of(in_chans=3, img_size=(10, 12)).train_images.shape == (64, 3, 10, 12)


def test_what_images_are():
    data = easy()
    name = identity(data)
    assert identity(dataclasses.replace(data, name="elsewhere", train_images=data.train_images.clone())) == name
    others = [
        dataclasses.replace(data, train_images=data.train_images + 1),
        dataclasses.replace(data, train_labels=1 - data.train_labels),
        dataclasses.replace(data, test_labels=1 - data.test_labels),
        dataclasses.replace(data, classes=("left", "right")),
        dataclasses.replace(data, val_images=data.test_images, val_labels=data.test_labels),
    ]
    assert len({name, *map(identity, others)}) == 6


def test_fp16_needs_a_gpu():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="fp16 needs a GPU; on a CPU use bf16"):
            training.train(run(precision="fp16"), easy())


def test_the_rate_rises_and_falls():
    rates = [training.rate(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1 and all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.5) and 0 < rates[99] < 0.001
    assert training.rate(0, 1, 0.1) == 1


def test_one_axis_is_not_decayed():
    model = Backbone("C-T", in_chans=1, num_classes=2, img_size=8)
    decayed, free = training._groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and free["weight_decay"] == 0
    assert {p.ndim for p in free["params"]} == {1} and min(p.ndim for p in decayed["params"]) == 2
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


# planted by scripts/mutate
FAULTS = {
    "training.py": (
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
        (
            "a resumed run forgets the optimizer's state",
            '        self.optimizer.load_state_dict(state["optimizer"])\n',
            "",
        ),
        (
            "a resumed run forgets the averaged weights",
            '            self.average.load_state_dict(state["average"])',
            "            pass",
        ),
        (
            "scales and biases are decayed",
            '{"params": free, "weight_decay": 0.0}',
            '{"params": free, "weight_decay": weight_decay}',
        ),
        (
            "gradients are not clipped",
            "        self.accelerator.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)\n",
            "",
        ),
        ("every epoch has the same order", 'self._seeded(f"epoch {number}")', 'self._seeded("epoch")'),
        ("lines of steps that are done again stay", '["step"] <= self.step:', '["step"] <= self.steps:'),
        (
            "the weights that are tested are not the averaged ones",
            "return self._plain() if self.average is None else self.average.module",
            "return self._plain()",
        ),
        ("large tests follow every epoch of few images", "return self.step == self.steps or ", "return True or "),
        ("the rate rises from zero", "return (step + 1) / rising", "return step / rising"),
        ("a loss that is not finite is stepped on", "if not math.isfinite(value):", "if False:"),
        ("whole numbers are averaged, cut off", "if not value.is_floating_point():", "if False:"),
        (
            "losses of an epoch forget what was before the interruption",
            '"step", "loss_sum", "loss_count", "seconds", "peak_memory"',
            '"step", "seconds", "peak_memory"',
        ),
    ),
    "runs.py": (
        (
            "every seed learns from the same share",
            "fraction(data, asked.fraction, config.seed)",
            "fraction(data, asked.fraction, 0)",
        ),
        ("settings are chosen on test images", "return hold_out(data) if asked.validation else data", "return data"),
        (
            "labels do not count for what images are",
            "if isinstance(value, Tensor):",
            "if isinstance(value, Tensor) and value.ndim > 1:",
        ),
        ("the result of another run is taken", "    if different:\n", "    if False:\n"),
        ("folds are not cut", "    if asked.folds:\n", "    if False:\n"),
    ),
}
