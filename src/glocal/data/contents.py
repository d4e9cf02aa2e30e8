"""A short description of every image of a data set, each decoded once, for `check`."""

import hashlib
import statistics
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from glocal.data.decoding import bits, in_order, read_header, read_image
from glocal.data.image_folder import FoundImages
from glocal.data.images import ImageData


@dataclass(slots=True)
class Described:
    """What `check` needs to know of one image.

    Args:
        name: Its path below the folder, or for data without image files such as "train 17".
        split: "train", "val" or "test".
        label: Name of its class.
        height: In pixels.
        width: In pixels.
        coloured: Whether it is in colour.
        bits: Bits a channel in the file, 8 or 16; colour of 16 bits counts as 8, because it is read as that.
        highest: Its largest value, of 255.
        blank: Whether it is of one colour all over.
        digest: Hash of its size and pixels as colour, so that a grey image equals its copy saved in colour.
    """

    name: str
    split: str
    label: str
    height: int
    width: int
    coloured: bool
    bits: int
    highest: int
    blank: bool
    digest: bytes


def describe_arrays(data: ImageData) -> Iterator[Described]:
    """Every image of a set that is no folder of image files."""
    height, width = data.img_size
    for split, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        lowest, highest = images.flatten(2).amin(2), images.flatten(2).amax(2)
        blank, brightest = (lowest == highest).all(1).tolist(), highest.amax(1).tolist()
        for i, label in enumerate(labels.tolist()):
            digest = hashlib.blake2b(images[i].numpy().tobytes(), digest_size=16).digest()
            yield Described(
                f"{split} {i}",
                split,
                data.classes[label],
                height,
                width,
                data.in_chans > 1,
                8,
                brightest[i],
                blank[i],
                digest,
            )


def describe_folder(folder: Path, found: FoundImages) -> Iterator[Described | str]:
    """Every image of a folder; for one that cannot be read, the line that says why."""
    files = [
        (path, split, label)
        for split, classes in found.splits.items()
        for label, paths in classes.items()
        for path in paths
    ]
    areas = []
    for path, _, _ in files[:: max(1, len(files) // 25)]:  # enough to tell small images from large ones
        with suppress(ValueError):
            height, width, _ = read_header(path)
            areas.append(height * width)
    return in_order(partial(_describe_file, folder), files, statistics.median(areas) if areas else 0)


def _describe_file(folder: Path, file: tuple[Path, str, str]) -> Described | str:
    path, split, label = file
    try:
        image = read_image(path)
        depth = bits(path) if image.mode == "L" else 8
    except ValueError as error:
        return str(error)
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=16)
    colour = image.convert("RGB")
    digest.update(colour.tobytes())
    bands = cast(tuple[tuple[int, int], ...], colour.getextrema())
    return Described(
        str(path.relative_to(folder)),
        split,
        label,
        image.height,
        image.width,
        image.mode == "RGB",
        depth,
        max(highest for _, highest in bands),
        all(lowest == highest for lowest, highest in bands),
        digest.digest(),
    )
