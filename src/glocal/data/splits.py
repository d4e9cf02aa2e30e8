"""Other splits of the same images: a share of the training images, folds, a validation split, another form.

All are pure functions of the data and a seed, stratified by class, and copy only the images they move.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from glocal.data.images import ImageData


def fraction(data: ImageData, share: float, seed: int) -> ImageData:
    """The data with a share of its training images, the same share of every class; the test images stay.

    With one seed the shares are nested: the images of 0.05 are among those of 0.2.

    Args:
        data: Any images.
        share: 0 < share <= 1; every class keeps at least one image. 1 returns `data` itself.
        seed: Same seed, same images; another seed, others.

    Raises:
        ValueError: The share is outside that range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: {share}; it must be above 0 and at most 1")
    if share == 1:
        return data
    kept = [indices[: max(1, round(share * len(indices)))] for indices in _shuffled(data.train_labels, seed)]
    chosen = _together(kept)
    return dataclasses.replace(data, train_images=data.train_images[chosen], train_labels=data.train_labels[chosen])


def fold(data: ImageData, k: int, folds: int) -> ImageData:
    """Training and test images together, cut into `folds` parts: part `k` is the test, the rest the training.

    Every image is in the test of exactly one fold. The parts differ by at most one image, and in every class, too.
    A validation split that the data brought is left alone.

    Args:
        data: Any images.
        k: Number of the part that is the test, 0 to folds - 1.
        folds: Number of parts, 2 or more.

    Raises:
        ValueError: A class has fewer images than there are folds, or a number makes no sense.
    """
    if folds < 2:
        raise ValueError(f"folds: {folds}; it must be at least 2")
    if not 0 <= k < folds:
        raise ValueError(f"k: {k}; with {folds} folds it must be 0 to {folds - 1}")
    everything = torch.cat([data.train_labels, data.test_labels])
    part = torch.empty_like(everything)
    dealt = 0
    for indices in _shuffled(everything, seed=0):
        if len(indices) < folds:
            name = data.classes[int(everything[indices[0]])]
            raise ValueError(
                f"folds: {folds}, but class {name!r} has {_images(len(indices))}; "
                "ask for fewer folds or add images to the class"
            )
        # Dealt out like cards: where one class ends, the next goes on, so that no part gets all the remainders.
        part[indices] = (torch.arange(len(indices)) + dealt) % folds
        dealt += len(indices)
    tested = part == k
    images: dict[str, torch.Tensor] = {}
    labels: dict[str, torch.Tensor] = {}
    for name, mask in (("train", ~tested), ("test", tested)):
        from_train, from_test = mask.split([len(data.train_labels), len(data.test_labels)])
        images[name] = torch.cat([data.train_images[from_train], data.test_images[from_test]])
        labels[name] = torch.cat([data.train_labels[from_train], data.test_labels[from_test]])
    return dataclasses.replace(
        data,
        train_images=images["train"],
        train_labels=labels["train"],
        test_images=images["test"],
        test_labels=labels["test"],
    )


def hold_out(data: ImageData, share: float = 0.1) -> ImageData:
    """The data with a validation split in the place of the test, to choose a setting by without seeing the test.

    It is the split that the data brought, if it brought one, else a share of the training images of every class, at
    least one image. A class with a single training image keeps it for training.

    Args:
        data: Any images.
        share: 0 < share < 1; not used if the data brought a validation split.

    Raises:
        ValueError: The share is outside that range, or every class has a single training image.
    """
    if data.val_images is not None and data.val_labels is not None:
        return dataclasses.replace(
            data, test_images=data.val_images, test_labels=data.val_labels, val_images=None, val_labels=None
        )
    if not 0 < share < 1:
        raise ValueError(f"share: {share}; it must be above 0 and below 1")
    held = [
        indices[: min(max(1, round(share * len(indices))), len(indices) - 1)]
        for indices in _shuffled(data.train_labels, seed=0)
    ]
    chosen = _together(held)
    if len(chosen) == 0:
        raise ValueError(
            f"{data.name}: no class has two training images, so none can be held out for validation; add images"
        )
    rest = torch.ones(len(data.train_labels), dtype=torch.bool)
    rest[chosen] = False
    return dataclasses.replace(
        data,
        train_images=data.train_images[rest],
        train_labels=data.train_labels[rest],
        test_images=data.train_images[chosen],
        test_labels=data.train_labels[chosen],
    )


def as_form(data: ImageData, in_chans: int, img_size: Sequence[int]) -> ImageData:
    """The data in the form that a network for other images expects; `note` says in a sentence what was done.

    Grey images are repeated to colour (a view, no copy), sizes met by resizing (bilinear, antialiased).

    Args:
        data: Any images.
        in_chans: Channels wanted.
        img_size: Height and width wanted, in pixels.

    Raises:
        ValueError: Colour images are asked for as grey ones.
    """
    height, width = img_size
    if data.in_chans not in (1, in_chans):
        wanted = "grey" if in_chans == 1 else f"{in_chans} channels"
        raise ValueError(
            f"{data.name}: its images have {data.in_chans} channels and cannot be used as {wanted}; "
            "begin with the data that is in colour"
        )
    resized, repeated = data.img_size != (height, width), data.in_chans != in_chans

    def formed(images: torch.Tensor) -> torch.Tensor:
        if resized:
            images = torch.nn.functional.interpolate(images, (height, width), mode="bilinear", antialias=True)
        return images.expand(-1, in_chans, -1, -1) if repeated else images

    done = []
    if resized:
        done.append(f"resized from {data.img_size[0]} x {data.img_size[1]} to {height} x {width} pixels")
    if repeated:
        done.append(f"repeated from grey to {in_chans} channels")
    if not done:
        return data
    return dataclasses.replace(
        data,
        train_images=formed(data.train_images),
        test_images=formed(data.test_images),
        val_images=None if data.val_images is None else formed(data.val_images),
        note=f"{data.note} Images were {' and '.join(done)}.".strip(),
    )


def _shuffled(labels: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """The indices of every class that occurs, in the order of their labels, each in a random order of its own."""
    values = labels.numpy()
    order = np.lexsort((np.random.default_rng(seed).random(len(values)), values))
    _, counts = np.unique(values, return_counts=True)
    return list(torch.from_numpy(order).split(counts.tolist()))


def _together(indices: list[torch.Tensor]) -> torch.Tensor:
    """Indices of all classes in the order of the images, so that a subset keeps it."""
    return torch.cat(indices).sort().values


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
