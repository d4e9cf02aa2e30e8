"""A comparison small enough for tests, on a data set that is written for it."""

import struct

import numpy as np
from PIL import Image

from glocal.config import CompareConfig


def write_digits(folder, train=48, test=18, side=8, seed=0):
    """A small MNIST-like set of three classes, told apart by their brightness."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 3).astype(np.uint8)
        images = (rng.integers(0, 150, (count, side, side)) + 40 * labels[:, None, None]).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())


def write_colours(folder, count=6, side=10):
    """Class folders of coloured images."""
    rng = np.random.default_rng(1)
    for name, colour in (("red", 0), ("blue", 2)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 100, (side, side, 3)).astype(np.uint8)
            pixels[..., colour] += 100
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


LAYOUTS = ("C-C-T-T", "T-T-T-T")


def config(folder, **options):
    settings = {"data": (str(folder / "data"),), "layouts": LAYOUTS, "seeds": (2,), "epochs": 1, "out": folder / "out"}
    return CompareConfig(**(settings | options))


def row(results, name, **where):
    [found] = [
        c
        for c in results["candidates"]
        if c["name"] == name and all(c[key] == value for key, value in ({"without": None} | where).items())
    ]
    return found


def folders(study):
    return [study.folder(run) for phase in study.plan.phases for run in phase]
