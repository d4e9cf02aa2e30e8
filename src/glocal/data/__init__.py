"""Image sources: generated probes, MNIST-like idx files, image folders. All end as uint8 tensors in memory."""

import difflib
from pathlib import Path

from glocal.data.images import ImageData

PROBES = ("recall",)


def load(data: str) -> ImageData:
    """The images that a name or a path stands for.

    Args:
        data: A probe's name, or a folder: with MNIST-like idx files (in it or in its `raw`), with `train` and
            `test` (or `val`) holding class folders, or with class folders alone. A folder that happens to carry
            a probe's name is reached as "./recall".

    Raises:
        ValueError: Nothing usable is there; the message says what, where and what to do.
    """
    if data in PROBES:
        from glocal.data import probes

        return getattr(probes, data)()
    folder = Path(data).expanduser()
    if not folder.exists():
        near = difflib.get_close_matches(data, PROBES, n=1)
        hint = f"did you mean the probe {near[0]!r}?" if near else _nearest_path(folder)
        raise ValueError(f"--data: {data!r} is neither a probe ({', '.join(PROBES)}) nor a folder; {hint}")
    if not folder.is_dir():
        raise ValueError(f"--data: {data!r} is a file; give the folder that holds the idx files or the class folders")
    from glocal.data.idx import find_idx, idx_data

    files = find_idx(folder)
    if files is not None:
        return idx_data(data, files)
    from glocal.data.image_folder import folder_data

    return folder_data(data, folder)


def _nearest_path(folder: Path) -> str:
    """What to do about a folder that is missing: the nearest name beside it, or the first parent missing."""
    while not folder.parent.is_dir() and folder.parent != folder:
        folder = folder.parent
    beside = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    near = difflib.get_close_matches(folder.name, beside, n=1)
    if near:
        return f"did you mean {str(folder.parent / near[0])!r}?"
    return f"there is no {folder.name!r} in {str(folder.parent.absolute())!r}"


__all__ = ["PROBES", "ImageData", "load"]
