"""What a data set holds and what is wrong with it, found by looking at every image, said in plain words."""

import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from glocal.data import kind_of, load

if TYPE_CHECKING:  # it needs Pillow
    from glocal.data.contents import Described

_FEW = 5  # names in a sentence; the lists of DataCheck hold all
_DARK = 64  # of 255: 16-bit images whose brightest value stays below it lose most of what they hold
_UNBALANCED = 10  # largest class over smallest


@dataclass
class SameImage:
    """Images with the same pixels, by name, and the splits and classes that they are in."""

    images: list[str]
    splits: list[str]
    classes: list[str]


@dataclass
class DataCheck:
    """What `check` found. Images are named by their path below `path`; those without a file such as "train 17".

    Args:
        path: Name or folder that was looked at.
        kind: "probe", "digits", "idx" or "folder".
        layout: How the images are arranged, in words.
        classes: Name of every class.
        counts: Readable images by split and class.
        imbalance: Training images of the largest class over those of the smallest; None if a class has none.
        sizes: Height and width in pixels under "smallest" and "largest" (by area) and "median" (of each side); None
            without any image.
        distinct_sizes: How many different sizes there are.
        pixels: Number of images by kind of pixel, such as "grey, 8 bits". Colour of 16 bits counts as 8, because it
            is read as that.
        shape: Channels, height and width in which networks get the images; None without any.
        memory_bytes: What the images take in memory in that shape.
        unreadable: Every file that cannot be read, and why.
        same: Images with the same pixels; those of one colour all over are left out.
        blank: Images of one colour all over.
        ignored: Files and folders that are passed over.
        remarks: What is worth knowing, in sentences.
        problems: What is wrong, in sentences that say what to do.
        ok: Whether nothing is wrong.
    """

    path: str
    kind: str
    layout: str
    classes: list[str] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    imbalance: float | None = None
    sizes: dict[str, list[int]] | None = None
    distinct_sizes: int = 0
    pixels: dict[str, int] = field(default_factory=dict)
    shape: list[int] | None = None
    memory_bytes: int = 0
    unreadable: list[str] = field(default_factory=list)
    same: list[SameImage] = field(default_factory=list)
    blank: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    ok: bool = True


def check(path: str) -> DataCheck:
    """Looks at every image of a data set. A file that cannot be read is noted and does not stop the others.

    Cost: every image is decoded once, on one core about 0.15 ms for one of 32 x 32 pixels and 10 ms for a photograph.

    Args:
        path: What `load` takes: a probe's name, "digits" or a folder.

    Raises:
        ValueError: There is neither such a name nor such a folder.
    """
    try:
        kind = kind_of(path)
    except ValueError as error:
        if not os.path.isdir(Path(path).expanduser()):
            raise
        return DataCheck(path, "idx", "idx files, not complete", problems=[str(error)], ok=False)
    if kind == "folder":
        result, images = _folder(path)
    else:
        result, images = _arrays(path, kind)
    if images:
        _count(result, images)
        _measure(result, images)
        _compare(result, images)
    result.ok = not result.problems
    return result


def describe(check: DataCheck) -> str:
    """What was found, as text for a terminal, without a newline at the end."""
    lines = [f"{check.path}: {check.layout}"]
    if check.counts:
        lines += ["", *_table(check), ""]
    if check.imbalance is not None:
        lines.append(f"Largest class over smallest, in training: {check.imbalance:.1f}")
    if check.sizes is not None:
        small, middle, large = (_by(check.sizes[name]) for name in ("smallest", "median", "largest"))
        if check.distinct_sizes == 1:
            lines.append(f"Size: all {middle} pixels (height x width)")
        else:
            lines.append(
                f"Sizes: {check.distinct_sizes} different ones, smallest {small}, median {middle}, largest {large} "
                "pixels (height x width)"
            )
        lines.append(f"Pixels: {', '.join(f'{count} {name}' for name, count in check.pixels.items())}")
    if check.shape is not None:
        size = check.memory_bytes
        said = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
        lines.append(f"In memory: {said}, {_by(check.shape)} bytes an image")
    if check.ignored:
        lines.append(f"Passed over: {_few(check.ignored)}")
    for title, items in (
        ("Cannot be read:", check.unreadable),
        ("Worth knowing:", check.remarks),
        ("Wrong:", check.problems),
    ):
        if items:
            lines += ["", title, *(f"  - {item}" for item in items)]
    if check.ok:
        lines += ["", "Nothing is wrong."]
    # The name of a file may hold bytes that are no text, which a terminal cannot show.
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def _table(check: DataCheck) -> list[str]:
    """Images by class and split, and their sums."""
    rows = [["class", *check.counts]]
    rows += [[name, *(str(counts.get(name, 0)) for counts in check.counts.values())] for name in check.classes]
    rows.append(["together", *(str(sum(counts.values())) for counts in check.counts.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _arrays(path: str, kind: str) -> "tuple[DataCheck, list[Described]]":
    """A set that is no folder of image files."""
    from glocal.data.contents import describe_arrays

    words = {"probe": "generated probe", "digits": "the digits of scikit-learn", "idx": "MNIST-like idx files"}
    result = DataCheck(path, kind, words[kind])
    try:
        data = load(path)
    except ValueError as error:  # a damaged file; nothing more can be said
        result.problems.append(str(error))
        return result, []
    result.classes = list(data.classes)
    return result, list(describe_arrays(data))


def _folder(path: str) -> "tuple[DataCheck, list[Described]]":
    """A folder of image files: notes what their names tell, and the files that cannot be read."""
    from glocal.data.contents import describe_folder
    from glocal.data.image_folder import find_images

    root = Path(path).expanduser()
    found = find_images(root)
    result = DataCheck(path, "folder", "image folder", problems=found.problems)
    if found.folders:
        places = (f"{split} in {folder.name!r}" for split, folder in found.folders.items())
        result.layout += f" with splits: {', '.join(places)}"
    elif found.splits:
        result.layout += " without splits; a fifth of every class becomes the test"
    else:
        result.layout = "not recognised"
    result.classes = list(next(iter(found.splits.values()), {}))
    result.ignored = sorted(str(path.relative_to(root)) for path in found.ignored)
    images = []
    readable: Counter[tuple[str, str]] = Counter()
    for image in describe_folder(root, found):
        if isinstance(image, str):
            result.unreadable.append(image)
        else:
            images.append(image)
            readable[image.split, image.label] += 1
    if result.unreadable:
        result.problems.append(
            f"files that cannot be read: {len(result.unreadable)}, named above with the reasons; remove or replace each"
        )
    for split, classes in found.splits.items():
        for name, files in classes.items():
            if files and not readable[split, name]:
                result.problems.append(f"{split}: no image of class {name!r} can be read; add some")
    return result, images


def _count(result: DataCheck, images: "Sequence[Described]") -> None:
    """How many images every class has, where there are none, and where there is one."""
    count = Counter((image.split, image.label) for image in images)
    splits = list(dict.fromkeys(image.split for image in images))
    result.counts = {split: {name: count[split, name] for name in result.classes} for split in splits}
    training = result.counts.get("train", {})
    if training and min(training.values()) > 0:
        result.imbalance = max(training.values()) / min(training.values())
        if result.imbalance >= _UNBALANCED:
            small, large = min(training, key=training.__getitem__), max(training, key=training.__getitem__)
            result.remarks.append(
                f"class {large!r} has {training[large]} training images, class {small!r} {training[small]}: accuracy "
                "speaks mostly of the large classes; weight the loss by class, or add images to the small ones"
            )
    for name in result.classes:
        numbers = [counts[name] for counts in result.counts.values()]
        if result.kind != "folder" and not any(numbers):
            result.remarks.append(f"label {name} never occurs; a network gets an output for it all the same")
        elif result.kind != "folder" and not all(numbers):  # in a folder seen by its names
            missing = splits[numbers.index(0)]
            result.problems.append(f"{missing}: no image of class {name!r}, though another split has some; add some")
    for split, counts in result.counts.items():
        single = [name for name, number in counts.items() if number == 1]
        if single and split == "train":
            result.problems.append(
                f"one training image only: {_classes(single)}; too few to learn from: add images, or remove "
                f"{'the class' if len(single) == 1 else 'the classes'}"
            )
        elif single:
            result.remarks.append(
                f"one {split} image only: {_classes(single)}; accuracy on it is 0 or 100 %, so add images if you can"
            )


def _measure(result: DataCheck, images: "Sequence[Described]") -> None:
    """Sizes, kinds of pixels, memory, and images that hold nothing."""
    from glocal.data.image_folder import common_form
    from glocal.data.memory import check_fits

    sizes = Counter((image.height, image.width) for image in images)
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    median = [round(statistics.median(side)) for side in zip(*sizes.elements(), strict=True)]
    result.sizes = {"smallest": list(by_area[0]), "median": median, "largest": list(by_area[-1])}
    result.distinct_sizes = len(sizes)
    kinds = Counter(f"{'colour' if image.coloured else 'grey'}, {image.bits} bits" for image in images)
    result.pixels = dict(kinds.most_common())
    training = [(image.height, image.width, image.coloured) for image in images if image.split == "train"]
    if training:
        in_chans, size, note = common_form(training)
        result.shape = [in_chans, *size]
        result.memory_bytes = len(images) * in_chans * size[0] * size[1]
        if note:
            result.remarks.append(note)
        try:
            check_fits(result.path, len(images), in_chans, size)
        except ValueError as error:
            result.problems.append(str(error))
    deep = [image.highest for image in images if image.bits == 16]
    if deep and max(deep) < _DARK:
        result.problems.append(
            f"no image of 16 bits goes above {(max(deep) + 1) * 256 - 1} of 65535, so that {max(deep) + 1} of 256 "
            "levels are left at 8 bits; save them with their values multiplied"
        )
    result.blank = [image.name for image in images if image.blank]
    if result.blank:
        result.problems.append(
            f"{_are(len(result.blank))} of one colour all over: {_few(result.blank)}; remove or replace them"
        )


def _compare(result: DataCheck, images: "Sequence[Described]") -> None:
    """Images that are there more than once."""
    groups = defaultdict(list)
    for image in images:
        if not image.blank:
            groups[image.digest].append(image)
    for group in groups.values():
        if len(group) > 1:
            result.same.append(
                SameImage(
                    [image.name for image in group],
                    list(dict.fromkeys(image.split for image in group)),
                    list(dict.fromkeys(image.label for image in group)),
                )
            )
    shown = {
        "splits": [same for same in result.same if len(same.splits) > 1],
        "classes": [same for same in result.same if len(same.classes) > 1],
        "once": [same for same in result.same if len(same.splits) == len(same.classes) == 1],
    }
    if shown["splits"]:
        result.problems.append(
            f"{_are(len(shown['splits']))} in two splits: {_pairs(shown['splits'])}; the test then asks for what "
            "was learned by heart: remove them from one split"
        )
    if shown["classes"]:
        result.problems.append(
            f"{_are(len(shown['classes']))} in two classes: {_pairs(shown['classes'])}; one label must be wrong: "
            "keep them in the right class"
        )
    if shown["once"]:
        result.remarks.append(
            f"{_are(len(shown['once']))} more than once in a split: {_pairs(shown['once'])}; they count more than "
            "others, so remove the copies if that is not meant"
        )


def _pairs(same: Sequence[SameImage]) -> str:
    return _few([" = ".join(group.images[:3]) for group in same])


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(names[:_FEW]) + more


def _classes(names: Sequence[str]) -> str:
    return f"{'class' if len(names) == 1 else 'classes'} {_few([repr(name) for name in names])}"


def _are(count: int) -> str:
    return "1 image is" if count == 1 else f"{count} images are"


def _by(numbers: Sequence[int]) -> str:
    return " x ".join(map(str, numbers))
