"""Probes: small generated tasks that ask one question of an architecture.

`recall` asks for content-dependent reach over the whole image. An image holds key-value pairs of glyphs and,
somewhere else, one framed key; the answer is the value that stands beside the same key. Which of the pairs
matters is known only from the framed glyph, so weights that do not depend on the content cannot fetch it.
"""

import itertools

import numpy as np
import torch

from glocal.data.images import ImageData

RECALL_KEYS = 6  # key glyphs
RECALL_VALUES = 8  # value glyphs = classes
RECALL_PAIRS = 4  # at most, in an image, with different keys
RECALL_SIZE = 32  # pixels a side
_CELL = 8  # pixels a side of a cell; a pair or the framed key fills one, at the same place inside it
_GLYPH = 3  # pixels a side of a glyph
_INK, _FRAME = np.uint8(255), np.uint8(128)


def _glyphs() -> tuple[np.ndarray, np.ndarray]:
    """Key glyphs, bool [RECALL_KEYS, 3, 3], and value glyphs, bool [RECALL_VALUES, 3, 3]; always the same ones.

    Keys have four of nine pixels inked and values five, and any two keys, and any two values, differ in four
    pixels or more: none is told apart by its brightness, or by a single pixel.
    """
    alphabets = []
    for count, inked in ((RECALL_KEYS, 4), (RECALL_VALUES, 5)):
        chosen: list[np.ndarray] = []
        for places in itertools.combinations(range(_GLYPH * _GLYPH), inked):
            candidate = np.isin(np.arange(_GLYPH * _GLYPH), places)
            if all((candidate != other).sum() >= 4 for other in chosen):
                chosen.append(candidate)
        alphabets.append(np.stack(chosen[:count]).reshape(count, _GLYPH, _GLYPH))
    return alphabets[0], alphabets[1]


def _recall_split(count: int, seed: tuple[int, int], fewest: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` images with `fewest` pairs or more, uint8 [N, 1, 32, 32], and their answers, int64 [N]."""
    rng = np.random.default_rng(seed)
    key_glyphs, value_glyphs = (glyphs * _INK for glyphs in _glyphs())
    cells_a_side = RECALL_SIZE // _CELL
    cells = rng.random((count, cells_a_side**2)).argsort(1)[:, : RECALL_PAIRS + 1]
    keys = rng.random((count, RECALL_KEYS)).argsort(1)[:, :RECALL_PAIRS]
    values = rng.integers(0, RECALL_VALUES, (count, RECALL_PAIRS))
    pairs = rng.integers(fewest, RECALL_PAIRS + 1, count)
    asked = (rng.random(count) * pairs).astype(np.int64)
    item = np.arange(count)
    images = np.zeros((count, RECALL_SIZE, RECALL_SIZE), np.uint8)

    def draw(item: np.ndarray, cell: np.ndarray, picture: np.ndarray, dy: int, dx: int) -> None:
        """Writes pictures [n, h, w] or one [h, w] into images `item` [n], with the corner at (dy, dx) in cells [n]."""
        height, width = picture.shape[-2:]
        rows = (cell // cells_a_side * _CELL + dy)[:, None, None] + np.arange(height)[:, None]
        columns = (cell % cells_a_side * _CELL + dx)[:, None, None] + np.arange(width)
        images[item[:, None, None], rows, columns] = picture

    for pair in range(RECALL_PAIRS):  # key, one empty column, value
        has = item[pairs > pair]
        draw(has, cells[has, pair], key_glyphs[keys[has, pair]], 2, 1)
        draw(has, cells[has, pair], value_glyphs[values[has, pair]], 2, _GLYPH + 2)
    draw(item, cells[:, -1], np.full((_GLYPH + 2, _GLYPH + 2), _FRAME), 1, 0)
    draw(item, cells[:, -1], key_glyphs[keys[item, asked]], 2, 1)  # over the frame: what is left of it is a ring
    return images[:, None], values[item, asked].astype(np.int64)


def recall(*, train_size: int = 10_000, test_size: int = 2_000, seed: int = 0) -> ImageData:
    """The probe `recall`: the value beside the key that is also shown in a frame.

    Args:
        train_size: Number of training images.
        test_size: Number of test images, drawn from a stream of their own.
        seed: Same seed, same images.

    Returns:
        Grey images of 32 x 32 pixels in 8 classes: one to four pairs in a training image, four in every test image.
        There chance is 12.5 %; naming the value that is in the picture most often, which takes no look at the
        keys, gives 41.2 %.
    """
    # An image with one pair shows what an answer is before the keys matter: from there the rest is learned. With four
    # pairs in every training image, every third network with attention stayed at the guess in the same time.
    train_images, train_labels = _recall_split(train_size, (seed, 0), 1)
    test_images, test_labels = _recall_split(test_size, (seed, 1), RECALL_PAIRS)
    return ImageData(
        name="recall",
        train_images=torch.from_numpy(train_images),
        train_labels=torch.from_numpy(train_labels),
        test_images=torch.from_numpy(test_images),
        test_labels=torch.from_numpy(test_labels),
        classes=tuple(f"value {i}" for i in range(RECALL_VALUES)),
        kind="probe",
    )
