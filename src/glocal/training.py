"""Training: one network on one data set, a plain loop on Accelerate. B images in a batch, C channels, H W pixels."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from glocal.backbone import Backbone
from glocal.config import ModelConfig, RunConfig, TrainConfig
from glocal.data import ImageData
from glocal.data.augment import crop_and_flip

_TEST_BATCH = 256  # images; large enough to be quick, small enough for any memory


@dataclass(frozen=True)
class EpochResult:
    """What one pass over the training images gave.

    Args:
        train_loss: Mean loss over the epoch's steps, label smoothing included.
        test_accuracy: Percent of the test images, after the epoch.
        seconds: Wall time of training and test.
        images_per_second: Training images over the wall time of training alone.
    """

    train_loss: float
    test_accuracy: float
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class RunResult:
    """What a whole run gave.

    Args:
        epochs: One entry an epoch.
        params: Number of trainable parameters.
    """

    epochs: tuple[EpochResult, ...]
    params: int


def build_model(config: ModelConfig, data: ImageData) -> Backbone:
    """The network of a configuration, made for the images and classes of `data`."""
    return Backbone(
        config.layout,
        in_chans=data.in_chans,
        num_classes=len(data.classes),
        img_size=data.img_size,
        dims=config.dims,
        depths=config.depths,
    )


def train(
    config: RunConfig,
    data: ImageData,
    *,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
    on_epoch: Callable[[EpochResult], None] = lambda result: None,
) -> RunResult:
    """Trains the network of `config` on `data` and tests it after every epoch.

    Everything random comes from `config.seed`: the same seed gives the same result, on a CPU bit for bit as long
    as the number of threads is the same. PyTorch's random state outside is left as it was.

    Args:
        config: Network, recipe and seed.
        data: Images; those of `config.data`.
        on_step: Called after every step with the steps done and the steps of the whole run.
        on_epoch: Called after every epoch.

    Raises:
        FloatingPointError: The loss became infinite or NaN; the message names step and learning rate.
    """
    from accelerate import Accelerator

    accelerator = Accelerator()
    recipe = config.train
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        generator = torch.Generator().manual_seed(config.seed)  # order and augmentation, whatever the model draws
        model = build_model(config.model, data)
        params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        # A last batch of a single image would break batch norm: it is left out, and so is every incomplete one.
        batch_size = min(recipe.batch_size, len(data.train_labels))
        steps_per_epoch = len(data.train_labels) // batch_size
        steps = steps_per_epoch * recipe.epochs
        optimizer = torch.optim.AdamW(_groups(model, recipe.weight_decay), lr=recipe.lr, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, recipe.warmup))
        model, optimizer = accelerator.prepare(model, optimizer)
        normalise = _normaliser(data, accelerator.device)
        results = []
        step = 0
        for _ in range(recipe.epochs):
            started = time.perf_counter()
            model.train()
            losses = []
            for images, labels in _batches(data, batch_size, steps_per_epoch, recipe, generator):
                labels = labels.to(accelerator.device)
                scores = model(normalise(images))
                loss = F.cross_entropy(scores, labels, label_smoothing=recipe.label_smoothing)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(
                        f"{config.model.layout}, seed {config.seed}: the loss is {losses[-1]} at step {step + 1} of "
                        f"{steps}, learning rate {schedule.get_last_lr()[0]:.2g}; lower the learning rate"
                    )
                optimizer.zero_grad()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
                optimizer.step()
                schedule.step()
                step += 1
                on_step(step, steps)
            trained = time.perf_counter()
            accuracy = evaluate(model, data.test_images, data.test_labels, normalise)
            results.append(
                EpochResult(
                    train_loss=sum(losses) / len(losses),
                    test_accuracy=accuracy,
                    seconds=time.perf_counter() - started,
                    images_per_second=steps_per_epoch * batch_size / (trained - started),
                )
            )
            on_epoch(results[-1])
    return RunResult(tuple(results), params)


def evaluate(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    normalise: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    """Percent of `images`, uint8 [N, C, H, W], whose highest score is at their label, int64 [N]."""
    model.eval()
    right = 0
    with torch.inference_mode():
        for batch, answers in zip(images.split(_TEST_BATCH), labels.split(_TEST_BATCH), strict=True):
            right += (model(normalise(batch)).argmax(1).cpu() == answers).sum().item()
    return 100 * right / len(labels)


def rate(step: int, steps: int, warmup: float) -> float:
    """Learning rate before step `step` (from 0) as a share of its peak: a line up, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters with two axes or more are decayed; biases and the scales of norms are not."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    free = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def _normaliser(data: ImageData, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """uint8 [B, C, H, W] to float with mean 0 and deviation 1 in every channel of the training images."""
    mean, deviation = (torch.tensor(values, device=device).view(-1, 1, 1) for values in data.statistics())
    return lambda images: (images.to(device).float() - mean) / deviation


def _batches(
    data: ImageData, batch_size: int, count: int, recipe: TrainConfig, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`count` batches of the training images in a new order, uint8 [B, C, H, W] and int64 [B]."""
    order = torch.randperm(len(data.train_labels), generator=generator)
    for chosen in order[: count * batch_size].split(batch_size):
        images = data.train_images[chosen]
        if recipe.crop_padding or recipe.flip:
            images = crop_and_flip(images, padding=recipe.crop_padding, flip=recipe.flip, generator=generator)
        yield images, data.train_labels[chosen]
