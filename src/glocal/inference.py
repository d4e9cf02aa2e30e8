"""Trained networks in use: their predictions for image files, and how they do on a test split."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glocal.checkpoint import CheckpointError, load_about, load_weights
from glocal.config import RunConfig
from glocal.data import ImageData
from glocal.data.decoding import read_image
from glocal.data.splits import as_form
from glocal.plain import from_plain
from glocal.tasks.classification import accuracy, build_model, normaliser, predict

_BATCH = 64  # images decoded at a time
_SUFFIXES = {
    *{".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif"},
    *{".tiff", ".webp"},
}


@dataclass(frozen=True)
class Trained:
    """A network with all that is needed to use it.

    Args:
        model: In evaluation mode.
        config: The run that made it.
        classes: Name of every score.
        in_chans: Channels of an image.
        img_size: Height and width that images are resized to.
        mean: Of every channel, taken away from its grey levels.
        deviation: What they are then divided by.
    """

    model: nn.Module
    config: RunConfig
    classes: tuple[str, ...]
    in_chans: int
    img_size: tuple[int, int]
    mean: list[float]
    deviation: list[float]

    def scores(self, images: Tensor) -> Tensor:
        """Scores [B, classes] of uint8 images [B, in_chans, H, W]."""
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            return self.model(normaliser(self.mean, self.deviation, device)(images)).float().cpu()


@dataclass(frozen=True)
class FilePrediction:
    """What a network says of an image file.

    Args:
        path: The file.
        predicted: Name of the class with the highest probability.
        probabilities: Of every class, under its name; they sum to 1.
    """

    path: str
    predicted: str
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """How a network does on a test split.

    Args:
        images: How many there are.
        accuracy: Percent of them.
        loss: Mean cross-entropy.
        per_class: Percent of each class, under its name.
        confusion: Counts [true][predicted].
    """

    images: int
    accuracy: float
    loss: float
    per_class: dict[str, float]
    confusion: list[list[int]]


def load_trained(path: Path) -> Trained:
    """The network of a run's folder, or of a weights.safetensors that a run wrote.

    Raises:
        CheckpointError: There is none, it is not finished, or its weights do not fit; the message says which.
    """
    file = path / "weights.safetensors" if path.is_dir() else path
    if not file.exists():
        if (path / "config.yaml").exists():
            raise CheckpointError(f"{path}: the run is not finished; the command that started it continues")
        raise CheckpointError(f"{path}: no trained network; give the folder of a run, or its weights.safetensors")
    about = load_about(file)
    try:
        config: RunConfig = from_plain(RunConfig, about["config"], "config.")
        classes, in_chans = tuple(about["classes"]), int(about["in_chans"])
        height, width = about["img_size"]
        mean, deviation = list(map(float, about["mean"])), list(map(float, about["deviation"]))
    except (KeyError, ValueError, TypeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{file}: not written by train or compare of this glocal ({why}); how to use it is unknown"
        ) from error
    model = build_model(config.model, in_chans=in_chans, num_classes=len(classes), img_size=(height, width), seed=0)
    try:
        model.load_state_dict(load_weights(file))
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        what = lines[min(1, len(lines) - 1)].strip().split(", ")[0].rstrip(".")  # the first of perhaps hundreds
        raise CheckpointError(f"{file}: weights of another network than {config.model.name}: {what}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Trained(model.to(device).eval(), config, classes, in_chans, (height, width), mean, deviation)


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and all images in folders that are named, in order.

    Raises:
        ValueError: A path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(file for file in path.rglob("*") if _is_image(file, path))
            if not below:
                raise ValueError(f"{path}: holds no image ({', '.join(sorted(_SUFFIXES))})")
            found += below
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder")
    return found


def _is_image(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)  # such as the ._ files of macOS
    return file.suffix.lower() in _SUFFIXES and not hidden and file.is_file()


def predict_files(trained: Trained, files: Sequence[Path]) -> Iterator[FilePrediction]:
    """Predictions for image files, in their order, a batch at a time.

    Raises:
        ValueError: A file is no image that can be read; the message names it.
    """
    for start in range(0, len(files), _BATCH):
        chosen = files[start : start + _BATCH]
        mode = "L" if trained.in_chans == 1 else "RGB"
        pixels = np.stack([np.array(read_image(file, mode, trained.img_size)) for file in chosen])
        images = torch.from_numpy(pixels).reshape(len(chosen), *trained.img_size, trained.in_chans).movedim(-1, 1)
        for file, probabilities in zip(chosen, trained.scores(images).softmax(1).tolist(), strict=True):
            named = dict(zip(trained.classes, probabilities, strict=True))
            yield FilePrediction(str(file), max(named, key=named.__getitem__), named)


def evaluate(trained: Trained, data: ImageData) -> Evaluation:
    """How a network does on the test images of `data`, brought into the form it was trained in.

    Raises:
        ValueError: The data has other classes, or colour where the network takes grey.
    """
    if data.classes != trained.classes:
        other = sorted(set(data.classes) ^ set(trained.classes))
        what = f"such as {other[0]!r}" if other else "in another order"
        raise ValueError(
            f"{data.name}: its {len(data.classes)} classes are not the {len(trained.classes)} that the network was "
            f"trained on ({what})"
        )
    data = as_form(data, trained.in_chans, trained.img_size)
    device = next(trained.model.parameters()).device
    found = predict(
        trained.model, data.test_images, data.test_labels, normaliser(trained.mean, trained.deviation, device)
    )
    n = len(data.classes)
    confusion = torch.bincount(data.test_labels * n + found.predicted, minlength=n * n).view(n, n)
    counts: Any = confusion.sum(1)
    return Evaluation(
        images=len(data.test_labels),
        accuracy=accuracy(found.predicted, data.test_labels),
        loss=found.loss.mean().item(),
        per_class={
            name: 100 * confusion[i, i].item() / counts[i].item()
            for i, name in enumerate(data.classes)
            if counts[i] > 0
        },
        confusion=confusion.tolist(),
    )
