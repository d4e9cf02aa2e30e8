"""The probe `texture`: decided by local statistics, and by nothing else.

An image is noise in which pixels a certain offset apart agree. The class is that offset. It holds all over the image,
so that a look at any neighbourhood tells as much as a look at another of the same size, and there is no layout to see.
The setting is that of Julesz: textures that agree in their histogram and differ in their second-order statistics.
"""

import numpy as np
import torch

from glocal.data.images import ImageData

# (rows, columns): every offset of whole pixels at distance 5, one of each pair that differs in sign alone. Pixels that
# are nearer to each other, or at another offset, are independent: no smaller neighbourhood tells anything.
OFFSETS = ((0, 5), (3, 4), (4, 3), (5, 0), (4, -3), (3, -4))
_REACH = 5  # pixels; the longest offset along an axis
_NOISE = 0.3  # deviation of what a pixel shares with no other, where what it shares has sqrt(2)


def _split(count: int, size: int, seed: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """`count` images, uint8 [N, 1, size, size], and their classes, int64 [N]."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(OFFSETS), count)
    down, across = np.array(OFFSETS)[labels].T[:, :, None, None]
    side = size + 2 * _REACH
    white = rng.standard_normal((count, side, side), np.float32)
    item = np.arange(count)[:, None, None]
    rows, columns = _REACH + np.arange(size)[:, None], _REACH + np.arange(size)
    field = white[item, rows, columns] + white[item, rows + down, columns + across]
    field += _NOISE * rng.standard_normal(field.shape, np.float32)
    # Ranks instead of values: every image has every grey level equally often, whatever its class.
    order = field.reshape(count, -1).argsort(1)
    levels = (np.arange(size * size) * 256 // (size * size)).astype(np.uint8)
    images = np.empty(order.shape, np.uint8)
    np.put_along_axis(images, order, np.broadcast_to(levels, order.shape), 1)
    return images.reshape(count, 1, size, size), labels


def texture(*, train_size: int = 3_000, test_size: int = 1_000, size: int = 32, seed: int = 0) -> ImageData:
    """The probe `texture`: the offset at which the pixels of a noise image agree.

    Every pixel is the sum of two values of white Gaussian noise, its own and the one at the offset, and of a little
    noise of its own; then its rank in the image takes its place. Two pixels that lie the offset apart have a
    correlation of 0.46, all others of 0.

    Args:
        train_size: Number of training images.
        test_size: Number of test images, drawn from a stream of their own.
        size: Pixels a side.
        seed: Same seed, same images.

    Returns:
        Grey images of `size` x `size` pixels in 6 classes, the offsets of length 5. Chance is 16.7 %; the histogram is
        the same in every image to the pixel, so it gives no more. Comparing each pixel with those 5 pixels away gives
        100 %.
    """
    train_images, train_labels = _split(train_size, size, (seed, 0))
    test_images, test_labels = _split(test_size, size, (seed, 1))
    return ImageData(
        name="texture",
        train_images=torch.from_numpy(train_images),
        train_labels=torch.from_numpy(train_labels),
        test_images=torch.from_numpy(test_images),
        test_labels=torch.from_numpy(test_labels),
        classes=tuple(f"({down}, {across})" for down, across in OFFSETS),
        kind="probe",
    )
