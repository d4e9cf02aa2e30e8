"""Training: one network on one data set, a loop on Accelerate that can be killed at any moment and goes on exactly.

Everything random in a step is drawn from the run's seed and the number of the step, and the order of an epoch's images
from the seed and the number of the epoch: no random state has to be kept, and a step gives the same whether the run
was interrupted before it or not.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from torch import Tensor, nn

from glocal.analysis.heads import quadratic_heads
from glocal.analysis.memory import peak_memory
from glocal.checkpoint import alone_in, load_state, save_state, save_weights, write_text
from glocal.config import RunConfig
from glocal.data import ImageData
from glocal.data.augment import crop_and_flip, randaugment
from glocal.optimizer import optimizer_of, rate
from glocal.plain import to_plain
from glocal.runs import EpochResult, RunResult, described, finished, identity, images_of
from glocal.tasks.classification import (
    Criterion,
    Predictions,
    accuracy,
    build_model,
    normaliser,
    predict,
    start_from,
)

_STEPS_PER_LINE = 50  # of metrics.jsonl


class NotFinite(FloatingPointError):
    """The loss became infinite or NaN; the message names step and learning rate."""


class Listener(Protocol):
    """Told how a run goes on."""

    def step(self, done: int, steps: int) -> None:
        """`done` of `steps` steps are done."""

    def epoch(self, result: EpochResult) -> None:
        """An epoch is finished."""


class _Silent:
    def step(self, done: int, steps: int) -> None: ...

    def epoch(self, result: EpochResult) -> None: ...


def train(
    config: RunConfig,
    data: ImageData,
    folder: Path | None = None,
    *,
    listener: Listener | None = None,
    checkpoint_seconds: float = 30,
    tensorboard: bool = False,
) -> RunResult:
    """Trains the network of `config` and tests it on the way.

    The same seed gives the same result, on a CPU bit for bit as long as the number of threads is the same, whether
    the run was interrupted or not. PyTorch's random state outside is left as it was.

    Args:
        config: Data, network, recipe and seed.
        data: All images of the source that `config.data` names.
        folder: Where the run lives. Afterwards it holds config.yaml, metrics.jsonl (a line an epoch, and one every 50
            steps), weights.safetensors, predictions.safetensors (class and loss of every test image) and result.json,
            written last; heads.jsonl, too, if the network has heads with a place (see `glocal.analysis.heads`). On the
            way checkpoints/ holds an exact state; a run that finds one there goes on, and a finished one returns its
            result. None keeps nothing.
        listener: Told about steps and epochs.
        checkpoint_seconds: Time between two exact states; there is one after every epoch, too.
        tensorboard: Whether to write TensorBoard's files into `folder` as well.

    Raises:
        NotFinite: The loss became infinite or NaN; the last state before is kept.
        ValueError: The configuration cannot be used for this data.
        CheckpointError: `config.weights` cannot be used, `folder` holds another run, or another process is at work
            there.
    """
    images = identity(data) if folder is not None else ""
    if folder is not None and (done := finished(folder, config, images)) is not None:
        return done
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # it remembers the precision of the run before
    # Only CUDA's devices beside the CPU: what others give has not been tried.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=config.train.precision)
    if config.train.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("precision fp16 needs a GPU; on a CPU use bf16")
    with ExitStack() as held:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone_in(folder))
        held.enter_context(torch.random.fork_rng())
        run = _Run(config, images_of(config, data), accelerator, listener or _Silent())
        if folder is not None:
            run.live_in(folder, images, tensorboard)
        return run.finish(run.all_epochs(checkpoint_seconds))


class _Run:
    """A run on its way: everything that a step reads or changes."""

    def __init__(self, config: RunConfig, data: ImageData, accelerator: Any, listener: Listener):
        recipe = config.train
        self.config, self.data, self.accelerator, self.listener = config, data, accelerator, listener
        self.folder: Path | None = None
        self.device: torch.device = accelerator.device
        self.images, self.labels = data.train_images, data.train_labels
        if _fits(self.images, self.device) and not recipe.randaugment:  # which takes images one by one
            self.images, self.labels = self.images.to(self.device), self.labels.to(self.device)
        self.mean, self.deviation = data.statistics()
        self.normalise = normaliser(self.mean, self.deviation, self.device)
        self.generator = torch.Generator()  # of order and augmentation
        # A last batch of a single image would break batch norm: it is left out, and so is every incomplete one.
        self.batch_size = min(recipe.batch_size, len(data.train_labels))
        self.steps_per_epoch = len(data.train_labels) // self.batch_size
        self.steps = self.steps_per_epoch * recipe.epochs
        model = build_model(
            config.model,
            in_chans=data.in_chans,
            num_classes=len(data.classes),
            img_size=data.img_size,
            seed=config.seed,
        )
        if config.weights is not None:
            start_from(model, Path(config.weights), new_head=config.new_head)
        self.params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.criterion = Criterion(recipe, data.train_labels, len(data.classes), self.device)
        optimizer = optimizer_of(model, recipe)
        self.average: Any = None
        if recipe.ema:  # before `prepare`, whose forward would be copied as that of the original
            from torch.optim.swa_utils import AveragedModel

            def average(averaged: Tensor, value: Tensor, _: Any) -> Tensor:
                # PyTorch's own also averages whole numbers, cut off: an index table would lose entries
                if not value.is_floating_point():
                    return value
                return torch.where(value.isfinite(), averaged.lerp(value, 1 - recipe.ema), value)

            self.average = AveragedModel(model, device=self.device, avg_fn=average, use_buffers=True)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.step = 0
        self.unread: Callable[[], float] | None = None  # the loss of the last step
        self.loss_sum, self.loss_count, self.seconds = 0.0, 0, 0.0  # of the epoch on its way
        self.epochs: list[EpochResult] = []
        self.peak_memory = 0
        self.board: Any = None

    def live_in(self, folder: Path, images: str, tensorboard: bool) -> None:
        """Keeps what happens in a folder, and goes on from what is kept there."""
        self.folder = folder
        write_text(folder / "config.yaml", yaml.safe_dump(described(self.config, images), sort_keys=False))
        self._resume(folder)
        self._cut(folder / "metrics.jsonl", "step", self.step)
        # before the first step heads stand where they start, whatever an attempt before this one has written
        self._cut(folder / "heads.jsonl", "epoch", len(self.epochs) if self.step else -1)
        if self.step == 0:
            self._note_heads()
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=self.step)

    def all_epochs(self, checkpoint_seconds: float) -> Predictions:
        """Trains to the end; what the final weights say of the test images."""
        predictions = None
        while self.step < self.steps:
            predictions = self._epoch(len(self.epochs), checkpoint_seconds)
        return self._test() if predictions is None else predictions  # killed between the last epoch and its result

    def finish(self, predictions: Predictions) -> RunResult:
        """Looks at the final weights and writes what remains of the run."""
        count = min(len(self.data.train_labels), len(self.data.test_labels))
        chosen = torch.randperm(len(self.data.train_labels), generator=self._seeded("fit"))[:count]
        labels = self.data.train_labels[chosen]
        started = time.perf_counter()
        trained = predict(self._tested(), self.data.train_images[chosen], labels, self.normalise)
        seconds = time.perf_counter() - started
        result = RunResult(
            epochs=tuple(self.epochs),
            params=self.params,
            train_loss=trained.loss.mean().item(),
            train_accuracy=accuracy(trained.predicted, labels),
            test_accuracy=self._accuracy(predictions),
            test_loss=predictions.loss.mean().item(),
            images_per_second_forward=count / seconds,
            peak_memory=self.peak_memory,
        )
        if self.folder is not None:
            about = {
                "config": to_plain(self.config),
                "classes": list(self.data.classes),
                "in_chans": self.data.in_chans,
                "img_size": list(self.data.img_size),
                "mean": self.mean,
                "deviation": self.deviation,
            }
            save_weights(self.folder / "weights.safetensors", self._tested().state_dict(), about)
            answers = {
                "predicted": predictions.predicted.to(torch.int32),
                "label": self.data.test_labels.to(torch.int32),
                "loss": predictions.loss,
            }
            save_weights(self.folder / "predictions.safetensors", answers)
            write_text(self.folder / "result.json", json.dumps(asdict(result), indent=1))
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
            if self.board is not None:
                self.board.close()
        return result

    def _epoch(self, number: int, checkpoint_seconds: float) -> Predictions | None:
        """The rest of an epoch, and the test if there is one after it."""
        order = torch.randperm(len(self.data.train_labels), generator=self._seeded(f"epoch {number}"))
        batches = order[: self.steps_per_epoch * self.batch_size].to(self.images.device).split(self.batch_size)
        self.model.train()
        started = saved = time.perf_counter()
        for chosen in batches[self.step - number * self.steps_per_epoch :]:
            try:
                if self.step == 0:
                    loss, self.peak_memory = peak_memory(partial(self._step, chosen), self.device)
                else:
                    loss = self._step(chosen)
            finally:
                # of the step before, which may be why this one fails; a device is at work on this one meanwhile
                self._read()
            self.unread = loss
            self.step += 1
            now = time.perf_counter()
            if now - saved > checkpoint_seconds and self.step % self.steps_per_epoch:
                self._read()
                self.seconds += time.perf_counter() - started
                self._keep()
                started = saved = time.perf_counter()
            self.listener.step(self.step, self.steps)
        self._read()
        trained = self.seconds + time.perf_counter() - started
        predictions = self._test() if self._tested_after(number) else None
        self.epochs.append(
            EpochResult(
                epoch=number + 1,
                train_loss=self.loss_sum / self.loss_count,
                test_accuracy=None if predictions is None else self._accuracy(predictions),
                seconds=self.seconds + time.perf_counter() - started,
                images_per_second=self.steps_per_epoch * self.batch_size / trained,
            )
        )
        self.loss_sum, self.loss_count, self.seconds = 0.0, 0, 0.0
        self._note({"step": self.step, **asdict(self.epochs[-1])})
        self._note_heads()
        self._keep()
        self.listener.epoch(self.epochs[-1])
        return predictions

    def _step(self, chosen: Tensor) -> Callable[[], float]:
        """One step on the training images `chosen`; what reads its loss."""
        recipe = self.config.train
        generator = self._seeded(f"step {self.step}")
        torch.manual_seed(generator.initial_seed())  # dropout, stochastic depth, mixing
        images = self.images[chosen]
        if recipe.crop_padding or recipe.flip:
            images = crop_and_flip(images, padding=recipe.crop_padding, flip=recipe.flip, generator=generator)
        if recipe.randaugment:
            images = randaugment(images, recipe.randaugment)
        pixels, labels = self.criterion.mix(self.normalise(images), self.labels[chosen].to(self.device))
        lr = self._lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.criterion(self.model(pixels), labels)
        read = _reader(loss.detach())
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        if recipe.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), recipe.max_grad_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self._plain())
        return read

    def _read(self) -> None:
        """Counts the loss of the last step, if that has not been done."""
        if self.unread is None:
            return
        loss, lr, self.unread = self.unread(), self._lr(self.step - 1), None
        if not math.isfinite(loss):
            kept = "" if self.folder is None else f"; the last state before is kept in {str(self.folder)!r}"
            raise NotFinite(
                f"{self.config.model.name}, seed {self.config.seed}: the loss is {loss} at step {self.step} of "
                f"{self.steps}, learning rate {lr:.2g}; lower the learning rate{kept}"
            )
        self.loss_sum += loss
        self.loss_count += 1
        if self.step % _STEPS_PER_LINE == 0:
            self._note({"step": self.step, "loss": loss, "lr": lr})

    def _lr(self, step: int) -> float:
        return self.config.train.lr * rate(step, self.steps, self.config.train.warmup)

    def _seeded(self, what: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.config.seed} {what}".encode()).digest()
        return self.generator.manual_seed(int.from_bytes(digest[:7], "big"))

    def _plain(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def _tested(self) -> nn.Module:
        """The network whose weights count: their average, if the recipe asks for it."""
        return self._plain() if self.average is None else self.average.module

    def _tested_after(self, number: int) -> bool:
        """Whether there is a test after epoch `number`, from 0."""
        images, tests = len(self.data.train_labels), len(self.data.test_labels)
        return self.step == self.steps or (number + 1) * images // tests > number * images // tests

    def _test(self) -> Predictions:
        return predict(self._tested(), self.data.test_images, self.data.test_labels, self.normalise)

    def _accuracy(self, predictions: Predictions) -> float:
        return accuracy(predictions.predicted, self.data.test_labels)

    # What is kept on the way

    def _keep(self) -> None:
        if self.folder is None:
            return
        scaler = self.accelerator.scaler
        state = {
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "step": self.step,
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "seconds": self.seconds,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "peak_memory": self.peak_memory,
        }
        save_state(self.folder / "checkpoints", self.step, self._plain().state_dict(), state)

    def _resume(self, folder: Path) -> None:
        found = load_state(folder / "checkpoints")
        if found is None:
            return
        weights, state = found
        self._plain().load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name in ("step", "loss_sum", "loss_count", "seconds", "peak_memory"):
            setattr(self, name, state[name])
        self.epochs = [EpochResult(**epoch) for epoch in state["epochs"]]

    def _note(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self.folder is None:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.board is not None:
            for name, value in line.items():
                if name not in ("step", "epoch") and value is not None:
                    self.board.add_scalar(name, value, line["step"])

    def _note_heads(self) -> None:
        """A line of heads.jsonl: where the heads look now; networks without such heads have no such file."""
        heads = quadratic_heads(self._tested())
        if self.folder is None or not heads:
            return
        with (self.folder / "heads.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": len(self.epochs), "layers": heads}) + "\n")

    def _cut(self, path: Path, count: str, last: int) -> None:
        """Takes back the lines of steps or epochs that are done again."""
        if not path.is_file():
            return
        kept = []
        for line in path.read_text("utf-8").splitlines():
            try:
                if json.loads(line)[count] <= last:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # cut off in the middle
        write_text(path, "".join(kept))


def _fits(images: Tensor, device: torch.device) -> bool:
    """Whether a GPU can hold all images beside what training needs."""
    return device.type == "cuda" and images.nbytes <= torch.cuda.mem_get_info(device)[0] // 4


def _reader(loss: Tensor) -> Callable[[], float]:
    """What reads a number once it is computed, and does not wait for what a GPU was given to do after it."""
    if loss.device.type != "cuda":
        return loss.item
    found = torch.empty((), dtype=loss.dtype, pin_memory=True).copy_(loss, non_blocking=True)
    computed = torch.cuda.Event()
    computed.record()

    def read() -> float:
        computed.synchronize()
        return found.item()

    return read
