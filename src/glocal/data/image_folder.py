"""Image folders: one subfolder per class, with or without folders for training, validation and test above them.

Images are decoded once, to uint8 in memory. All get one size and one mode, by rules that need no configuration:
colour if any training image is coloured, else grey; the size of the images if they agree, else the median height
and width of the training images, at most 224 pixels a side, to which every image is stretched.
"""

import hashlib
import os
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from glocal.data.decoding import in_order, read_header, read_image
from glocal.data.images import ImageData
from glocal.data.memory import check_fits

MAX_SIDE = 224  # pixels; only images of mixed sizes, or larger ones, are resized
_TEST_SHARE = 0.2  # of every class, when the folder has no test split of its own
# Names that folders of splits go by, in any case. Without `test`, `val` stands for it.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# What programs leave in folders, and all that is hidden; everything else in a class folder must be an image.
_LEFTOVERS = {"thumbs.db", "desktop.ini", "__macosx"}


@dataclass
class FoundImages:
    """What a folder holds, by the names of its files; none has been opened.

    Args:
        folders: The folder of every split; empty if there are class folders alone.
        splits: Image files by split ("train", "test", perhaps "val") and class.
        ignored: Files and folders that are passed over.
        problems: Why the folder cannot be used, one line each; empty if it can.
    """

    folders: dict[str, Path] = field(default_factory=dict)
    splits: dict[str, dict[str, list[Path]]] = field(default_factory=dict)
    ignored: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def folder_data(name: str, folder: Path) -> ImageData:
    """The images of a folder, in two splits, or three if it brought a validation split beside training and test.

    Args:
        name: What tables call it.
        folder: Holds `train` and `test` (or `val`, or all three) with class folders, or class folders alone: then a
            fifth of every class is set aside for the test, chosen by file name: the same images on every machine.

    Raises:
        ValueError: Nothing usable is there, a class is missing in a split or has one image only, a file is no
            image, or they do not fit in memory; the message names the folder or file.
    """
    found = find_images(folder)
    if found.problems:
        raise ValueError(found.problems[0])
    training = [path for paths in found.splits["train"].values() for path in paths]
    in_chans, size, note = common_form(in_order(read_header, training, pixels=0))
    check_fits(str(folder), sum(len(p) for c in found.splits.values() for p in c.values()), in_chans, size)
    decode = partial(read_image, mode="L" if in_chans == 1 else "RGB", size=size)
    images, labels = {}, {}
    for split, classes in found.splits.items():
        files = [path for paths in classes.values() for path in paths]
        pixels = np.empty((len(files), *size, in_chans), np.uint8)
        for i, image in enumerate(in_order(decode, files, size[0] * size[1])):
            pixels[i] = np.asarray(image).reshape(*size, in_chans)
        images[split] = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        counts = torch.tensor([len(paths) for paths in classes.values()])
        labels[split] = torch.arange(len(classes)).repeat_interleave(counts)
    return ImageData(
        name=name,
        train_images=images["train"],
        train_labels=labels["train"],
        test_images=images["test"],
        test_labels=labels["test"],
        classes=tuple(found.splits["train"]),
        kind="folder",
        note=note,
        val_images=images.get("val"),
        val_labels=labels.get("val"),
    )


def find_images(folder: Path) -> FoundImages:
    """Looks which splits, classes and files a folder holds, and notes all that keeps it from being used."""
    found = FoundImages()
    subfolders = _subfolders(folder, found)
    split_folders: dict[str, Path] = {}
    for split, names in SPLIT_NAMES.items():
        matching = [path for path in subfolders if path.name.lower() in names]
        if matching:
            split_folders[split] = matching[0]
        if len(matching) > 1:
            both = " and ".join(repr(path.name) for path in matching)
            found.problems.append(f"{folder}: has {both} for the same split; keep one")
    if not split_folders:
        _split_classes(folder, subfolders, found)
        return found
    found.ignored += [path for path in subfolders if path not in split_folders.values()]
    if "train" not in split_folders:
        other = next(iter(split_folders.values())).name
        found.problems.append(f"{folder}: has {other!r} but no 'train' beside it; add it")
    elif len(split_folders) == 1:
        found.problems.append(
            f"{folder}: has {split_folders['train'].name!r} but neither 'test' nor 'val' beside it; add one of them, "
            "or move the class folders up, and a fifth of every class becomes the test"
        )
    if "test" not in split_folders and "val" in split_folders:
        split_folders["test"] = split_folders.pop("val")
    found.folders = split_folders
    _given_classes(split_folders, found)
    return found


def _given_classes(split_folders: dict[str, Path], found: FoundImages) -> None:
    """Folders of class folders; every class must be in all of them."""
    folders = {split: {path.name: path for path in _subfolders(path, found)} for split, path in split_folders.items()}
    classes = sorted(set().union(*folders.values()))
    if len(classes) < 2:
        found.problems.append(
            f"{next(iter(split_folders.values()))}: holds {len(classes)} class folders; a comparison needs at least "
            "two, one for the images of every class"
        )
    for split, paths in folders.items():
        found.splits[split] = {}
        for name in classes:
            files = _files(paths[name], found) if name in paths else []
            found.splits[split][name] = files
            if name not in paths:
                found.problems.append(
                    f"{split_folders[split]}: class folder {name!r} is missing, though another split has it; add it, "
                    "or remove it there"
                )
            elif not files:
                found.problems.append(f"{paths[name]}: holds no image; add some, or remove the class everywhere")


def _split_classes(folder: Path, subfolders: list[Path], found: FoundImages) -> None:
    """Class folders without splits: a fifth of every class, at least one image, becomes the test."""
    if not subfolders:
        found.problems.append(
            f"{folder}: holds neither idx files (such as train-images-idx3-ubyte) nor class folders of images; put "
            "the images of every class into a folder with its name"
        )
        return
    if len(subfolders) == 1:
        found.problems.append(
            f"{folder}: holds one class folder, {subfolders[0].name!r}; a comparison needs two; did you mean "
            f"{str(subfolders[0])!r}?"
        )
    found.splits = {"train": {}, "test": {}}
    for path in subfolders:
        files = _files(path, found)
        if len(files) < 2:
            found.problems.append(
                f"{path}: holds {len(files)} image{'s'[: len(files) != 1]}; a class needs two, one to train on and "
                "one to test on; add some, or remove the folder"
            )
        # Ordered by a hash of the name: no random state, and the same on every machine.
        ordered = sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file.name)).digest())
        count = max(1, round(len(files) * _TEST_SHARE))
        found.splits["test"][path.name] = sorted(ordered[:count])
        found.splits["train"][path.name] = sorted(ordered[count:])


def _subfolders(folder: Path, found: FoundImages) -> list[Path]:
    """Folders in this one; what else is there has no class and is passed over."""
    folders = []
    for path, is_folder in _entries(folder, found, follow=True):
        if is_folder:
            folders.append(path)
        else:
            found.ignored.append(path)
    return sorted(folders)


def _files(folder: Path, found: FoundImages) -> list[Path]:
    """Every file under a class folder, in an order that does not depend on the file system."""
    files: list[Path] = []
    folders = [folder]
    while folders:
        inside = _entries(current := folders.pop(), found, follow=False)
        for path, is_folder in inside:
            (folders if is_folder else files).append(path)
        if not inside and current != folder:
            found.ignored.append(current)
    return sorted(files)


def _entries(folder: Path, found: FoundImages, follow: bool) -> list[tuple[Path, bool]]:
    """What a folder holds, without leftovers, and whether each is a folder, if `follow` also one that is linked."""
    kept = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = Path(entry.path)
                if entry.name.startswith(".") or entry.name.lower() in _LEFTOVERS:
                    found.ignored.append(path)
                else:
                    kept.append((path, entry.is_dir(follow_symlinks=follow)))
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        found.problems.append(f"{folder}: cannot be read ({why}); allow it, or move it away")
    return kept


def common_form(headers: Iterable[tuple[int, int, bool]]) -> tuple[int, tuple[int, int], str]:
    """Channels, (height, width) and a sentence about resizing that follow from the training images.

    Args:
        headers: Height, width and whether it is coloured, of every training image; at least one.
    """
    coloured = False
    sizes: Counter[tuple[int, int]] = Counter()
    for height, width, colour in headers:
        coloured = coloured or colour
        sizes[height, width] += 1
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
