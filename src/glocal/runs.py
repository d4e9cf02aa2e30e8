"""A run as it is described and kept: its images, its result, and the folder that says whose it is."""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from glocal.checkpoint import CheckpointError
from glocal.config import RunConfig
from glocal.data import ImageData
from glocal.data.splits import as_form, fold, fraction, hold_out
from glocal.plain import to_plain


@dataclass(frozen=True)
class EpochResult:
    """What one pass over the training images gave.

    Args:
        epoch: Its number, from 1.
        train_loss: Mean loss over the epoch's steps, as optimised: label smoothing and augmentation included.
        test_accuracy: Percent of the test images, after the epoch; None if they were not looked at: with few training
            images the test would cost more than the epoch, so there is one after as many as there are test images.
        seconds: Wall time of training and test.
        images_per_second: Training images over the wall time of training alone.
    """

    epoch: int
    train_loss: float
    test_accuracy: float | None
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class RunResult:
    """What a whole run gave. Losses here are plain cross-entropy of the final weights, in evaluation mode.

    Args:
        epochs: One entry an epoch.
        params: Number of trainable parameters.
        train_loss: Over training images without augmentation, as many as there are test images.
        train_accuracy: Percent of these.
        test_accuracy: Percent of the test images.
        test_loss: Over the test images.
        images_per_second_forward: Those training images over the wall time of predicting them.
        peak_memory: Bytes of tensors that lived at once in the first step, forward and backward and update.
    """

    epochs: tuple[EpochResult, ...]
    params: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float
    test_loss: float
    images_per_second_forward: float
    peak_memory: int


def images_of(config: RunConfig, data: ImageData) -> ImageData:
    """The images that a run trains on and is tested on, out of those that its source gives.

    Raises:
        ValueError: They cannot be split or brought into the form that the configuration asks for.
    """
    asked = config.data
    if asked.in_chans is not None or asked.img_size is not None:
        data = as_form(data, asked.in_chans or data.in_chans, asked.img_size or data.img_size)
    if asked.folds:
        data = fold(data, asked.fold, asked.folds)
    # Another seed learns from other images, so that the spread over seeds holds the luck of the draw.
    data = fraction(data, asked.fraction, config.seed)
    # Held out of the share: who has few images has few to choose a setting by.
    return hold_out(data) if asked.validation else data


def identity(data: ImageData) -> str:
    """A name for the images, labels and classes themselves, wherever they lie."""
    content = hashlib.sha256()
    content.update(repr(data.classes).encode())
    for value in (getattr(data, field.name) for field in fields(data)):
        if isinstance(value, Tensor):
            content.update(f"{value.dtype} {tuple(value.shape)}".encode())
            content.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)  # no copy
    return content.hexdigest()[:16]


def finished(folder: Path, config: RunConfig, images: str) -> RunResult | None:
    """The result in a run's folder; None if there is no run or it is not finished.

    Args:
        folder: Of a run.
        config: Its configuration; where data and first weights lie does not count.
        images: Their `identity`.

    Raises:
        CheckpointError: The folder holds another run.
    """
    try:
        there = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    different = _difference(there, described(config, images))
    if different:
        raise CheckpointError(f"{folder}: holds another run ({different}); name another folder")
    try:
        plain = json.loads((folder / "result.json").read_text("utf-8"))
        epochs = tuple(EpochResult(**epoch) for epoch in plain.pop("epochs"))
        return RunResult(epochs=epochs, **plain)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def described(config: RunConfig, images: str) -> dict[str, Any]:
    """What config.yaml holds."""
    return {**to_plain(config), "images": images}


def _difference(there: Any, here: Any, where: str = "") -> str:
    """The first value in which two configurations differ, in words; empty if they agree."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [key for key in here if where + key not in ("data.source", "weights")]
        found = (_difference(there.get(key), here[key], f"{where}{key}.") for key in keys)
        return next((difference for difference in found if difference), "")
    return "" if there == here else f"{where.rstrip('.')} is {there!r} there, {here!r} here"
