"""Image sources: probes, embedded digits, MNIST-like idx files, image folders. All end as uint8 tensors in memory."""

import difflib
from pathlib import Path

from glocal.data.images import ImageData

PROBES = ("recall", "texture")

EMBEDDED = ("digits",)


def load(data: str) -> ImageData:
    """The images that a name or a path stands for.

    Args:
        data: A probe's name, "digits", or a folder: with MNIST-like idx files (in it or in its `raw`), with `train`
            and `test` (or `val`) holding class folders, or with class folders alone. A folder that happens to carry
            one of the names is reached as "./recall".

    Raises:
        ValueError: Nothing usable is there; the message says what, where and what to do.
    """
    kind, folder = kind_of(data), Path(data).expanduser()
    if kind == "probe":
        from glocal.data.recall import recall
        from glocal.data.texture import texture

        return recall() if data == "recall" else texture()
    if kind == "digits":
        from glocal.data.digits import digits

        return digits()
    try:
        if kind == "idx":
            from glocal.data.idx import find_idx, idx_data

            files = find_idx(folder)
            assert files is not None, "kind_of has found them"
            return idx_data(data, files)
        from glocal.data.image_folder import folder_data

        return folder_data(data, folder)
    except OSError as error:
        raise _cannot_read(error, folder) from error


def kind_of(data: str) -> str:
    """What a name or a path stands for: "probe", "digits", "idx" or "folder".

    Raises:
        ValueError: It is neither a name nor a folder, or a folder with some idx files but not all four.
    """
    if data in PROBES:
        return "probe"
    if data in EMBEDDED:
        return data
    folder = Path(data).expanduser()
    try:
        if not folder.exists():
            near = difflib.get_close_matches(data, (*PROBES, *EMBEDDED), n=1)
            kind = "the probe " if near and near[0] in PROBES else ""
            hint = f"did you mean {kind}{near[0]!r}?" if near else _nearest_path(folder)
            raise ValueError(
                f"{data!r} is neither a probe ({', '.join(PROBES)}) nor {' nor '.join(map(repr, EMBEDDED))} "
                f"nor a folder; {hint}"
            )
        if not folder.is_dir():
            raise ValueError(f"{data!r} is a file; give the folder that holds the idx files or the class folders")
        from glocal.data.idx import find_idx

        return "folder" if find_idx(folder) is None else "idx"
    except OSError as error:
        raise _cannot_read(error, folder) from error


def _cannot_read(error: OSError, folder: Path) -> ValueError:
    why = (error.strerror or str(error)).lower()
    return ValueError(f"{str(error.filename or folder)!r} cannot be read ({why}); allow it, or name another")


def _nearest_path(folder: Path) -> str:
    """What to do about a folder that is missing: the nearest name beside it, or the first parent missing."""
    while not folder.parent.is_dir() and folder.parent != folder:
        folder = folder.parent
    beside = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    near = difflib.get_close_matches(folder.name, beside, n=1)
    if near:
        return f"did you mean {str(folder.parent / near[0])!r}?"
    return f"there is no {folder.name!r} in {str(folder.parent.absolute())!r}"


__all__ = ["EMBEDDED", "PROBES", "ImageData", "kind_of", "load"]
