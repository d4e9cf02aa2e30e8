"""MNIST-like data sets: idx files as published for MNIST, FashionMNIST, KMNIST and EMNIST.

An idx file is a big-endian magic number (two zero bytes, a type code, the number of axes), one 32-bit size for
every axis, and the values. Images are type 8 (unsigned byte) with three axes, labels type 8 with one.
Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits", section "file formats".
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from glocal.data.images import ImageData

_UNSIGNED_BYTE = 8
_OTHER_TYPES = {9: "signed bytes", 11: "16-bit integers", 12: "32-bit integers", 13: "floats", 14: "doubles"}
# Names of the four files, without ".gz"; EMNIST puts the name of its variant in front, some copies of MNIST have a dot
# before "idx".
_FILES: dict[str, tuple[str, ...]] = {
    "train_images": ("train-images-idx3-ubyte", "train-images.idx3-ubyte"),
    "train_labels": ("train-labels-idx1-ubyte", "train-labels.idx1-ubyte"),
    "test_images": (
        "t10k-images-idx3-ubyte", "test-images-idx3-ubyte", "t10k-images.idx3-ubyte", "test-images.idx3-ubyte",
    ),
    "test_labels": (
        "t10k-labels-idx1-ubyte", "test-labels-idx1-ubyte", "t10k-labels.idx1-ubyte", "test-labels.idx1-ubyte",
    ),
}  # fmt: skip


def find_idx(folder: Path) -> dict[str, Path] | None:
    """The four idx files of a data set, in `folder` or in its `raw`; None if it holds no idx file at all.

    Raises:
        ValueError: Some of the four are there and others are missing, or one exists in two variants.
    """
    for place in (folder, folder / "raw"):
        entries = sorted(path for path in place.iterdir() if path.is_file()) if place.is_dir() else []
        found = {role: _matching(entries, names) for role, names in _FILES.items()}
        if not any(found.values()):
            continue
        for role, paths in found.items():
            expected = _FILES[role][0]
            if not paths:
                raise ValueError(
                    f"{place}: {expected} (or {expected}.gz) is missing beside the other idx files; add it"
                )
            if len(paths) > 1:
                raise ValueError(
                    f"{place}: both {paths[0].name} and {paths[1].name} could be the {role.replace('_', ' ')}; "
                    "keep one data set in a folder"
                )
        return {role: paths[0] for role, paths in found.items()}
    return None


def _matching(entries: list[Path], names: tuple[str, ...]) -> list[Path]:
    """The files with one of these endings; a file and its own .gz count once, the plain one."""
    plain = [path for path in entries if path.name.endswith(names)]
    taken = {path.name for path in plain}
    packed = [path for path in entries if path.name.endswith(tuple(f"{name}.gz" for name in names))]
    return plain + [path for path in packed if path.name.removesuffix(".gz") not in taken]


def read_idx(path: Path, axes: int) -> np.ndarray:
    """The values of one idx file, uint8 with `axes` axes.

    Raises:
        ValueError: The file is no idx file of unsigned bytes with that many axes, or is cut short or too long.
        OSError: It cannot be read at all.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); download it again") from error
    if len(content) >= 4 and content[:2] == b"\0\0" and content[2] in _OTHER_TYPES and content[3] == axes:
        raise ValueError(
            f"{path}: holds {_OTHER_TYPES[content[2]]} (type 0x{content[2]:02x}); only unsigned bytes (type 0x08) are "
            "read; save its values, 0 to 255, as those"
        )
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE or content[3] != axes:
        raise ValueError(
            f"{path}: begins with 0x{content[:4].hex() or '(nothing)'}, not with 0x0000080{axes}; "
            f"it is no idx file of unsigned bytes with {axes} {'axis' if axes == 1 else 'axes'}; download it again"
        )
    header = 4 + 4 * axes
    if len(content) < header:
        raise ValueError(f"{path}: ends inside its header of {header} bytes; download it again")
    shape = struct.unpack(f">{axes}I", content[4:header])
    if len(content) - header != math.prod(shape):
        size = " x ".join(map(str, shape))
        raise ValueError(
            f"{path}: its header announces {size} = {math.prod(shape)} values, but it holds "
            f"{len(content) - header}; download it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def idx_data(name: str, files: dict[str, Path]) -> ImageData:
    """A MNIST-like data set from its four files.

    Args:
        name: What tables call it.
        files: What `find_idx` returned.

    Raises:
        ValueError: A file is damaged, or images and labels do not belong together.
    """
    images, labels = {}, {}
    for split in ("train", "test"):
        image_path, label_path = files[f"{split}_images"], files[f"{split}_labels"]
        images[split], labels[split] = read_idx(image_path, 3), read_idx(label_path, 1)
        if len(images[split]) != len(labels[split]):
            raise ValueError(
                f"{image_path} holds {len(images[split])} images, but {label_path} {len(labels[split])} labels; "
                "download both again"
            )
        if images[split].size == 0:
            raise ValueError(f"{image_path} holds no image; download it again")
    if images["train"].shape[1:] != images["test"].shape[1:]:
        raise ValueError(
            f"{files['train_images']} has images of {images['train'].shape[1:]} pixels, but "
            f"{files['test_images']} of {images['test'].shape[1:]}; keep the files of one data set in a folder"
        )
    unseen = sorted(set(np.unique(labels["test"])) - set(np.unique(labels["train"])))
    if unseen:
        raise ValueError(
            f"{files['test_labels']}: label {unseen[0]} does not occur in {files['train_labels']}; "
            "keep the files of one data set in a folder"
        )
    # Copies, because a tensor over a read-only buffer may be written to by mistake.
    return ImageData(
        name=name,
        train_images=torch.from_numpy(images["train"].copy())[:, None],
        train_labels=torch.from_numpy(labels["train"].astype(np.int64)),
        test_images=torch.from_numpy(images["test"].copy())[:, None],
        test_labels=torch.from_numpy(labels["test"].astype(np.int64)),
        classes=tuple(str(i) for i in range(int(labels["train"].max()) + 1)),
        kind="idx",
    )
