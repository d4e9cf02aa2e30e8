"""Image folders: one subfolder per class, with or without `train` and `test` (or `val`) above them.

Images are decoded once, to uint8 in memory. All get one size and one mode, by rules that need no configuration:
colour if any training image is coloured, else grey; the size of the images if they agree, else the median height
and width of the training images, at most 224 pixels a side, to which every image is stretched.
"""

import hashlib
import statistics
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from glocal.data.images import ImageData

MAX_SIDE = 224  # pixels; only images of mixed sizes, or larger ones, are resized
_TEST_SHARE = 0.2  # of every class, when the folder has no test split of its own
_TEST_NAMES = ("test", "val")
# Files that programs leave in folders; everything else in a class folder must be an image.
_LEFTOVERS = {"thumbs.db", "desktop.ini"}


def folder_data(name: str, folder: Path) -> ImageData:
    """The images of a folder, in two splits.

    Args:
        name: What tables call it.
        folder: Holds `train` and `test` (or `val`) with class folders, or class folders alone: then a fifth of
            every class is set aside for the test, chosen by file name: the same images on every machine.

    Raises:
        ValueError: Nothing usable is there, a class is missing in a split or has one image only, or a file is
            no image; the message names the folder or file.
    """
    subfolders = _subfolders(folder)
    test_name = next((test for test in _TEST_NAMES if folder / test in subfolders), None)
    if folder / "train" in subfolders:
        if test_name is None:
            raise ValueError(f"{folder}: has 'train' but neither 'test' nor 'val' beside it")
        classes, splits = _given_splits(folder / "train", folder / test_name)
    else:
        if not subfolders:
            raise ValueError(
                f"{folder}: holds neither idx files (such as train-images-idx3-ubyte) nor class folders of images"
            )
        if test_name is not None:
            raise ValueError(f"{folder}: has {test_name!r} but no 'train' beside it")
        classes, splits = _made_splits(folder, subfolders)
    in_chans, size, note = _common_form([path for path, _ in splits["train"]])
    images, labels = {}, {}
    for split, files in splits.items():
        images[split] = torch.empty((len(files), in_chans, *size), dtype=torch.uint8)
        for i, (path, _) in enumerate(files):
            images[split][i] = _decode(path, in_chans, size)
        labels[split] = torch.tensor([label for _, label in files])
    return ImageData(
        name=name,
        train_images=images["train"],
        train_labels=labels["train"],
        test_images=images["test"],
        test_labels=labels["test"],
        classes=classes,
        kind="folder",
        note=note,
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    """Every file under a class folder, in an order that does not depend on the file system."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(
        path
        for path in paths
        if path.name.lower() not in _LEFTOVERS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


Split = list[tuple[Path, int]]  # image files with their labels


def _given_splits(train: Path, test: Path) -> tuple[tuple[str, ...], dict[str, Split]]:
    """Two folders of class folders; every class must be in both."""
    folders = {
        split: {path.name: path for path in _subfolders(path)} for split, path in (("train", train), ("test", test))
    }
    for path, own, other in ((test, folders["test"], folders["train"]), (train, folders["train"], folders["test"])):
        missing = sorted(set(other) - set(own))
        if missing:
            raise ValueError(f"{path}: class folder {missing[0]!r} is missing, though the other split has it")
    classes = tuple(sorted(folders["train"]))
    if len(classes) < 2:
        raise ValueError(f"{train}: holds {len(classes)} class folders; a comparison needs at least two")
    splits: dict[str, Split] = {"train": [], "test": []}
    for split, paths in folders.items():
        for label, class_name in enumerate(classes):
            files = _files(paths[class_name])
            if not files:
                raise ValueError(f"{paths[class_name]}: holds no image")
            splits[split] += [(path, label) for path in files]
    return classes, splits


def _made_splits(folder: Path, subfolders: list[Path]) -> tuple[tuple[str, ...], dict[str, Split]]:
    """Class folders without splits: a fifth of every class, at least one image, becomes the test."""
    if len(subfolders) < 2:
        raise ValueError(f"{folder}: holds one class folder, {subfolders[0].name!r}; a comparison needs two")
    splits: dict[str, Split] = {"train": [], "test": []}
    for label, path in enumerate(subfolders):
        files = _files(path)
        if len(files) < 2:
            raise ValueError(
                f"{path}: holds {len(files)} image{'s'[: len(files) != 1]}; a class needs two, one to train on and "
                "one to test on"
            )
        # Ordered by a hash of the name: no random state, and the same on every machine.
        ordered = sorted(files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
        count = max(1, round(len(files) * _TEST_SHARE))
        splits["test"] += [(file, label) for file in sorted(ordered[:count])]
        splits["train"] += [(file, label) for file in sorted(ordered[count:])]
    return tuple(path.name for path in subfolders), splits


def _common_form(files: list[Path]) -> tuple[int, tuple[int, int], str]:
    """Channels, (height, width) and a sentence about resizing, from the headers of the training images."""
    coloured = False
    sizes: Counter[tuple[int, int]] = Counter()
    for path in files:
        with _open(path) as image:
            coloured = coloured or image.mode not in _GREY_MODES
            sizes[image.height, image.width] += 1
    in_chans = 3 if coloured else 1
    if len(sizes) == 1:
        size = next(iter(sizes))
        common = f"{size[0]} x {size[1]} pixels"
    else:
        size = tuple(round(statistics.median(side)) for side in zip(*sizes.elements(), strict=True))
        common = f"mixed sizes, median {size[0]} x {size[1]} pixels"
    size = tuple(min(side, MAX_SIDE) for side in size)
    if sizes.keys() == {size}:
        return in_chans, size, ""
    return in_chans, size, f"Images ({common}) were stretched to {size[0]} x {size[1]} pixels."


# Pillow's names for images without colour; LA has transparency, I;16 and I are 16 bits deep.
_GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F"}


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
    return ValueError(f"{path}: not an image that can be read{why}; remove or replace it")


def _decode(path: Path, in_chans: int, size: tuple[int, int]) -> torch.Tensor:
    """One image as uint8 [C, H, W]."""
    with _open(path) as image:
        try:
            image.load()  # Image.open reads the header only; a cut file fails here
            image = _eight_bits(image).convert("L" if in_chans == 1 else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise _unreadable(path, error) from error
        if image.size != (size[1], size[0]):
            image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        pixels = np.array(image)  # a copy: the image's own buffer is read-only
    return torch.from_numpy(pixels).reshape(size[0], size[1], in_chans).permute(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits a pixel scaled to 8; Pillow's own conversion would cut everything above 255 to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65_535) >> 8).astype(np.uint8))
