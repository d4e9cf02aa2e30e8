"""The probe `recall`: decided by content-dependent reach over the whole image.

An image holds key-value pairs of glyphs and, somewhere else, one framed key; the answer is the value that stands
beside the same key. Which of the pairs matters is known only from the framed glyph, so weights that do not depend on
the content cannot fetch it. Squeeze-and-excitation in a convolution block does depend on it: its gates see the whole
image, and with more steps than attention needs they learn to let through what belongs to the framed key.
"""

import itertools

import numpy as np
import torch

from glocal.data.images import ImageData

KEYS = 4  # key glyphs
VALUES = 4  # value glyphs = classes
PAIRS = 4  # at most, in an image, with different keys and different values
_CELL = 8  # pixels a side of a cell; a pair or the framed key fills one, at the same place inside it
_GLYPH = 3  # pixels a side of a glyph
_INK, _FRAME = np.uint8(255), np.uint8(128)


def _glyphs() -> tuple[np.ndarray, np.ndarray]:
    """Key glyphs, bool [KEYS, 3, 3], and value glyphs, bool [VALUES, 3, 3]; always the same ones.

    Keys have four of nine pixels inked and values five, and any two keys, and any two values, differ in four
    pixels or more: none is told apart by its brightness, or by a single pixel.
    """
    alphabets = []
    for count, inked in ((KEYS, 4), (VALUES, 5)):
        chosen: list[np.ndarray] = []
        for places in itertools.combinations(range(_GLYPH * _GLYPH), inked):
            candidate = np.isin(np.arange(_GLYPH * _GLYPH), places)
            if all((candidate != other).sum() >= 4 for other in chosen):
                chosen.append(candidate)
        alphabets.append(np.stack(chosen[:count]).reshape(count, _GLYPH, _GLYPH))
    return alphabets[0], alphabets[1]


def _split(count: int, size: int, seed: tuple[int, int], fewest: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` images with `fewest` pairs or more, uint8 [N, 1, size, size], and their answers, int64 [N]."""
    rng = np.random.default_rng(seed)
    key_glyphs, value_glyphs = (glyphs * _INK for glyphs in _glyphs())
    cells_a_side = size // _CELL
    cells = rng.random((count, cells_a_side**2)).argsort(1)[:, : PAIRS + 1]
    keys = rng.random((count, KEYS)).argsort(1)[:, :PAIRS]
    values = rng.random((count, VALUES)).argsort(1)[:, :PAIRS]
    pairs = rng.integers(fewest, PAIRS + 1, count)
    asked = (rng.random(count) * pairs).astype(np.int64)
    item = np.arange(count)
    images = np.zeros((count, size, size), np.uint8)

    def draw(item: np.ndarray, cell: np.ndarray, picture: np.ndarray, dy: int, dx: int) -> None:
        """Writes pictures [n, h, w] or one [h, w] into images `item` [n], with the corner at (dy, dx) in cells [n]."""
        height, width = picture.shape[-2:]
        rows = (cell // cells_a_side * _CELL + dy)[:, None, None] + np.arange(height)[:, None]
        columns = (cell % cells_a_side * _CELL + dx)[:, None, None] + np.arange(width)
        images[item[:, None, None], rows, columns] = picture

    for pair in range(PAIRS):  # key, one empty column, value
        has = item[pairs > pair]
        draw(has, cells[has, pair], key_glyphs[keys[has, pair]], 2, 1)
        draw(has, cells[has, pair], value_glyphs[values[has, pair]], 2, _GLYPH + 2)
    draw(item, cells[:, -1], np.full((_GLYPH + 2, _GLYPH + 2), _FRAME), 1, 0)
    draw(item, cells[:, -1], key_glyphs[keys[item, asked]], 2, 1)  # over the frame: what is left of it is a ring
    return images[:, None], values[item, asked]


def recall(*, train_size: int = 5_000, test_size: int = 1_000, size: int = 32, seed: int = 0) -> ImageData:
    """The probe `recall`: the value beside the key that is also shown in a frame.

    Args:
        train_size: Number of training images.
        test_size: Number of test images, drawn from a stream of their own.
        size: Pixels a side, a multiple of 8 and at least 24: a cell takes 8 x 8.
        seed: Same seed, same images.

    Returns:
        Grey images of `size` x `size` pixels in 4 classes. A training image has one to four pairs; every test image
        has four, and as their values are all different, each of the classes is there once: without a look at the
        keys nothing beats chance, 25 %. In five epochs C-C-T-T comes near 100 %, C-C-C-C does not; in twelve
        C-C-C-C reached 100 % too.

    Raises:
        ValueError: `size` holds no whole number of cells, or too few.
    """
    if size % _CELL or (size // _CELL) ** 2 <= PAIRS:
        raise ValueError(f"recall: size is {size}; it must be a multiple of {_CELL} pixels and at least {3 * _CELL}")
    # An image with one pair shows what an answer is before the keys matter: from there the rest is learned. With four
    # pairs in every training image, every third network with attention stayed at the guess in the same time.
    train_images, train_labels = _split(train_size, size, (seed, 0), 1)
    test_images, test_labels = _split(test_size, size, (seed, 1), PAIRS)
    return ImageData(
        name="recall",
        train_images=torch.from_numpy(train_images),
        train_labels=torch.from_numpy(train_labels),
        test_images=torch.from_numpy(test_images),
        test_labels=torch.from_numpy(test_labels),
        classes=tuple(f"value {i}" for i in range(VALUES)),
        kind="probe",
    )
