"""Image files to uint8 pixels: any format and mode that Pillow reads, the right way up, one line for what it does not.

Every image becomes grey ("L") or colour ("RGB") with 8 bits a channel. 16 bits are cut to the upper eight; of several
frames the first counts; the orientation that a camera noted is applied. Transparent places become white: pictures
with transparency are drawn for light pages, and what colours lie hidden below differs from program to program.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow's names for images without colour; LA has transparency, those with I are 16 bits deep or more.
_GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"}
_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 turn an image by a quarter
# Measured on 2 cores: below this many pixels an image, two threads spend more time waiting for the interpreter's lock
# than they gain; at 160 x 160 they take 0.6 of the time.
_WORTH_THREADS = 80 * 80
_CHUNK = 16  # images handed to a thread at a time

logging.getLogger("PIL").addHandler(logging.NullHandler())  # its complaints would stand beside our one line

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_header(path: Path) -> tuple[int, int, bool]:
    """Height and width in pixels as the image will stand, and whether it is coloured; no pixel is decoded.

    Raises:
        ValueError: The file is no image; the message names it.
    """
    with _opened(path) as image:
        width, height = image.size
        if _is_turned(image):
            width, height = height, width
        return height, width, image.mode not in _GREY_MODES


def read_image(path: Path, mode: str | None = None, size: tuple[int, int] | None = None) -> Image.Image:
    """One image, decoded.

    Args:
        path: Its file.
        mode: "L" or "RGB"; without it grey images are "L", all others "RGB".
        size: Height and width to stretch it to (bilinear, antialiased); without it the image keeps its size.

    Raises:
        ValueError: The file is no image, is cut short or has pixels of another kind; the message names it.
    """
    with _opened(path) as image:
        if size is not None:  # JPEG decodes at a half, a quarter or an eighth in a fraction of the time
            height, width = reversed(size) if _is_turned(image) else size
            image.draft(None, (2 * width, 2 * height))
        image.load()  # Image.open reads the header only; a cut file fails here
        _turn_upright(image)
        upright = _eight_bits(image)
        if upright.has_transparency_data:
            drawn = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn)
        upright = upright.convert(mode or ("L" if image.mode in _GREY_MODES else "RGB"))
        if size is not None and upright.size != (size[1], size[0]):
            upright = upright.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        return upright


def bits(path: Path) -> int:
    """Bits a channel that the file stores, 8 or 16, as far as Pillow tells; read from the header."""
    with _opened(path) as image:
        return 16 if image.mode.startswith("I") else 8


def in_order(function: Callable[[Item], Result], items: Sequence[Item], pixels: float) -> Iterator[Result]:
    """`function` of every item, in their order; in threads where images are large enough for it to pay.

    Args:
        function: Decodes one image: Pillow lets other threads run meanwhile.
        items: What it is called with.
        pixels: Of a typical image.
    """
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # about odd metadata; what matters is raised
        if threads == 1 or pixels < _WORTH_THREADS:
            yield from map(function, items)
            return
        chunks = [items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK)]
        with ThreadPoolExecutor(threads) as pool:
            for results in pool.map(lambda chunk: [function(item) for item in chunk], chunks):
                yield from results


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image, open; what goes wrong with it, here or under `with`, becomes one line that names the file."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            is_link = path.is_symlink() and not path.exists()
            raise OSError("the file that it links to is missing" if is_link else "it is not a file")
        with Image.open(path) as image:
            yield image
    except Exception as error:  # decoders raise errors of every kind on damaged files
        why = _reason(path, error)
        raise ValueError(f"{path}: not an image that can be read{why}; remove or replace it") from error


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return " (it is empty)" if path.stat().st_size == 0 else ""
    said = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
    return f" ({' '.join(said.split()) or type(error).__name__})"


def _is_turned(image: Image.Image) -> bool:
    """Whether the image's orientation exchanges height and width.

    A TIFF's is no part of "exif" here, and Pillow applies it by itself.
    """
    if "exif" not in image.info:
        return False
    try:
        return image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
    except Exception:  # damaged metadata: the pixels may be whole
        return False


def _turn_upright(image: Image.Image) -> None:
    with suppress(Exception):  # damaged metadata, as above
        ImageOps.exif_transpose(image, in_place=True)


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits a pixel scaled to 8; Pillow's own conversion would cut everything above 255 to white."""
    if image.mode == "F":
        raise ValueError("its pixels are fractions, whose range is not known; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65_535:
        raise ValueError(
            f"its pixels go from {pixels.min()} to {pixels.max()}, beyond 16 bits; save it with 8 or 16 bits"
        )
    return Image.fromarray((pixels >> 8).astype(np.uint8))
