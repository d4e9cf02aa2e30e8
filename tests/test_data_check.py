"""What `check` says of data sets with planted faults: each is found and named, and a clean set has none."""

import dataclasses
import gzip
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glocal.data import memory
from glocal.data.check import check, describe


def write(path, *, size=(8, 6), seed=0, mode="RGB"):
    """An image of noise, width by height; other seeds give other images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(array).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """A clean folder: two splits, classes of 4 and 3 images in training and 2 in the test."""
    seed = 0
    for split, counts in (("train", {"cat": 4, "dog": 3}), ("test", {"cat": 2, "dog": 2})):
        for name, count in counts.items():
            for i in range(count):
                write(tmp_path / "set" / split / name / f"{i}.png", seed=(seed := seed + 1))
    return tmp_path / "set"


def test_a_clean_folder(folder):
    found = check(str(folder))
    assert found.ok and found.problems == [] and found.remarks == [] and found.unreadable == [] and found.same == []
    assert found.kind == "folder" and found.layout == "image folder with splits: train in 'train', test in 'test'"
    assert found.classes == ["cat", "dog"]
    assert found.counts == {"train": {"cat": 4, "dog": 3}, "test": {"cat": 2, "dog": 2}}
    assert found.imbalance == 4 / 3
    assert found.sizes == {"smallest": [6, 8], "median": [6, 8], "largest": [6, 8]} and found.distinct_sizes == 1
    assert found.pixels == {"colour, 8 bits": 11}
    assert found.shape == [3, 6, 8] and found.memory_bytes == 11 * 3 * 6 * 8
    lines = describe(found).splitlines()
    assert [line.split() for line in lines[2:6]] == [
        ["class", "train", "test"], ["cat", "4", "2"], ["dog", "3", "2"], ["together", "7", "4"],
    ]  # fmt: skip
    assert "In memory: 1.6 kB, 3 x 6 x 8 bytes an image" in lines
    assert "Size: all 6 x 8 pixels (height x width)" in lines and lines[-1] == "Nothing is wrong."


def test_it_can_be_written_as_json(folder):
    shutil.copy(folder / "train" / "cat" / "0.png", folder / "test" / "dog" / "x.png")
    found = check(str(folder))
    read = json.loads(json.dumps(dataclasses.asdict(found)))
    assert read["same"] == [
        {"images": ["train/cat/0.png", "test/dog/x.png"], "splits": ["train", "test"], "classes": ["cat", "dog"]}
    ]
    assert read["counts"] == found.counts and read["ok"] is False


def test_every_file_that_cannot_be_read_is_named(folder):
    (folder / "train" / "cat" / "empty.png").touch()
    (folder / "train" / "dog" / "notes.txt").write_text("no image")
    cut = write(folder / "test" / "cat" / "cut.png", size=(64, 64))
    cut.write_bytes(cut.read_bytes()[:-3000])
    (folder / "test" / "dog" / "gone.png").symlink_to("nowhere")
    os.mkfifo(folder / "test" / "dog" / "pipe.png")
    found = check(str(folder))
    names = ["train/cat/empty.png", "train/dog/notes.txt", "test/cat/cut.png", "test/dog/gone.png", "test/dog/pipe.png"]
    assert len(found.unreadable) == 5
    for name, line in zip(names, found.unreadable, strict=True):
        assert line.startswith(f"{folder / name}: not an image that can be read") and "\n" not in line
    assert not found.ok and len(found.problems) == 1
    assert found.problems[0].startswith("files that cannot be read: 5, named above")
    assert found.counts["train"] == {"cat": 4, "dog": 3}  # what can be read
    text = describe(found)
    assert all(str(folder / name) in text for name in names) and "Nothing is wrong" not in text


def test_a_class_without_a_readable_image(folder):
    for path in (folder / "test" / "dog").iterdir():
        path.write_bytes(b"")
    assert "test: no image of class 'dog' can be read; add some" in check(str(folder)).problems


def test_the_same_image_twice(folder):
    train, test = folder / "train", folder / "test"
    shutil.copy(train / "cat" / "0.png", test / "cat" / "leak.png")  # in two splits
    Image.open(train / "cat" / "1.png").save(train / "dog" / "wrong.bmp")  # in two classes, in another format
    shutil.copy(train / "dog" / "2.png", train / "dog" / "copy.png")  # twice in one split
    write(train / "cat" / "turned.png", size=(6, 8), seed=5)
    found = check(str(folder))
    assert [(s.images, s.splits, s.classes) for s in found.same] == [
        (["train/cat/0.png", "test/cat/leak.png"], ["train", "test"], ["cat"]),
        (["train/cat/1.png", "train/dog/wrong.bmp"], ["train"], ["cat", "dog"]),
        (["train/dog/2.png", "train/dog/copy.png"], ["train"], ["dog"]),
    ]
    assert len(found.problems) == 2
    assert "1 image is in two splits: train/cat/0.png = test/cat/leak.png" in found.problems[0]
    assert "1 image is in two classes: train/cat/1.png = train/dog/wrong.bmp" in found.problems[1]
    assert "1 image is more than once in a split: train/dog/2.png = train/dog/copy.png" in found.remarks[-1]


def test_a_grey_image_equals_its_copy_saved_in_colour_but_not_another_shape(tmp_path):
    for name, seed in (("a", 0), ("b", 10)):
        for i in range(5):
            write(tmp_path / name / f"{i}.png", mode="L", seed=seed + i)
    Image.open(tmp_path / "a" / "0.png").convert("RGB").save(tmp_path / "a" / "colour.png")
    pixels = np.asarray(Image.open(tmp_path / "a" / "1.png"))
    Image.fromarray(pixels.reshape(8, 6)).save(tmp_path / "a" / "shape.png")
    (same,) = check(str(tmp_path)).same
    assert sorted(same.images) == ["a/0.png", "a/colour.png"]


def test_many_are_named_in_part_and_listed_in_full(folder):
    for i in range(8):
        write(folder / "train" / "cat" / f"new{i}.png", seed=100 + i)
        shutil.copy(folder / "train" / "cat" / f"new{i}.png", folder / "test" / "cat")
    found = check(str(folder))
    assert len(found.same) == 8 and " and 3 more; " in found.problems[0]


def test_images_of_one_colour(folder):
    for i, (split, colour) in enumerate((("train", "black"), ("train", "black"), ("test", (200, 0, 7)))):
        Image.new("RGB", (8, 6), colour).save(folder / split / "cat" / f"blank{i}.png")
    found = check(str(folder))
    assert found.blank == ["train/cat/blank0.png", "train/cat/blank1.png", "test/cat/blank2.png"]
    assert found.same == []
    (problem,) = found.problems
    assert problem.startswith("3 images are of one colour all over: train/cat/blank0.png, train")


def test_a_class_missing_and_a_class_of_one(folder):
    shutil.rmtree(folder / "test" / "dog")
    write(folder / "train" / "emu" / "0.png", seed=50)
    write(folder / "test" / "emu" / "0.png", seed=51)
    found = check(str(folder))
    assert found.counts["test"] == {"cat": 2, "dog": 0, "emu": 1}
    assert f"{folder / 'test'}: class folder 'dog' is missing, though another split has it" in found.problems[0]
    assert found.problems[1].startswith("one training image only: class 'emu'; too few to learn from")
    assert len(found.problems) == 2
    assert any(remark.startswith("one test image only: class 'emu'") for remark in found.remarks)


def test_imbalance_is_worth_knowing(folder):
    for i in range(30):
        write(folder / "train" / "cat" / f"new{i}.png", seed=100 + i)
    found = check(str(folder))
    assert found.ok and found.imbalance == 34 / 3
    assert found.remarks[0].startswith("class 'cat' has 34 training images, class 'dog' 3:")
    (folder / "train" / "cat" / "new0.png").unlink()
    for i in range(1, 5):
        (folder / "train" / "cat" / f"new{i}.png").unlink()
    assert check(str(folder)).remarks == []  # 29 / 3 < 10


def test_sizes_pixels_and_leftovers(folder):
    write(folder / "train" / "cat" / "large.png", size=(40, 20), mode="L", seed=30)
    write(folder / "train" / "cat" / "small.png", size=(3, 5), seed=31)
    Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8) * 1300).save(folder / "train" / "dog" / "deep.png")
    (folder / "train" / "cat" / "Thumbs.db").touch()
    (folder / "train" / ".hidden").mkdir()
    (folder / "labels.csv").touch()
    (folder / "__MACOSX").mkdir()
    found = check(str(folder))
    assert found.sizes == {"smallest": [5, 3], "median": [6, 8], "largest": [20, 40]} and found.distinct_sizes == 3
    assert found.pixels == {"colour, 8 bits": 12, "grey, 8 bits": 1, "grey, 16 bits": 1}
    assert found.ignored == ["__MACOSX", "labels.csv", "train/.hidden", "train/cat/Thumbs.db"]
    assert found.ok and found.remarks == ["Images (mixed sizes, median 6 x 8 pixels) were stretched to 6 x 8 pixels."]
    assert "3 different ones, smallest 5 x 3, median 6 x 8, largest 20 x 40 pixels" in describe(found)


def test_sixteen_bits_that_are_used_in_part(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(4):
            pixels = rng.integers(0, 4096, (6, 6)).astype(np.uint16)
            pixels[0, 0] = 4095
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    (problem,) = check(str(tmp_path)).problems
    assert problem.startswith("no image of 16 bits goes above 4095 of 65535, so that 16 of 256 levels are left")


def test_class_folders_alone(tmp_path):
    for first, (name, count) in enumerate((("a", 10), ("b", 5), ("c", 1))):
        for i in range(count):
            write(tmp_path / name / f"{i}.png", seed=100 * first + i)
    found = check(str(tmp_path))
    assert found.counts["train"] == {"a": 8, "b": 4, "c": 0}
    assert found.counts["test"] == {"a": 2, "b": 1, "c": 1} and found.imbalance is None
    assert found.layout.startswith("image folder without splits; a fifth")
    assert found.problems[0].startswith(f"{tmp_path / 'c'}: holds 1 image; a class needs two")


def test_folders_that_are_no_data_set(tmp_path):
    found = check(str(tmp_path))
    assert not found.ok and found.layout == "not recognised" and found.counts == {}
    assert found.problems[0].startswith(f"{tmp_path}: holds neither idx files")
    assert describe(found).startswith(f"{tmp_path}: not recognised")
    with pytest.raises(ValueError, match="there is no 'nowhere'"):
        check(str(tmp_path / "nowhere"))


def test_a_folder_behind_a_closed_one(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(ValueError, match=r"/closed/set' cannot be read \(permission denied\); allow it"):
        check(str(tmp_path / "closed" / "set"))


def test_too_large_for_memory(folder, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    (problem,) = check(str(folder)).problems
    assert "11 images of 6 x 8 pixels need" in problem


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_no_text(folder):
    name = os.fsdecode(b"\xff.png")
    (folder / "train" / "cat" / name).write_bytes(b"")
    describe(check(str(folder))).encode()


# Sets that are no folders of image files


def write_idx(folder, name, array):
    folder.mkdir(exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    (folder / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))


def test_idx_files(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 5, 4)).astype(np.uint8)
    images[7] = images[2]
    images[4] = 9
    write_idx(tmp_path, "train-images-idx3-ubyte", images[:6])
    write_idx(tmp_path, "train-labels-idx1-ubyte", np.array([0, 1, 3, 3, 0, 1], np.uint8))
    write_idx(tmp_path, "t10k-images-idx3-ubyte", images[6:])
    write_idx(tmp_path, "t10k-labels-idx1-ubyte", np.array([0, 1, 1], np.uint8))
    found = check(str(tmp_path))
    assert found.kind == "idx" and found.classes == ["0", "1", "2", "3"] and found.shape == [1, 5, 4]
    assert found.counts == {"train": {"0": 2, "1": 2, "2": 0, "3": 2}, "test": {"0": 1, "1": 2, "2": 0, "3": 0}}
    assert found.blank == ["train 4"] and [same.images for same in found.same] == [["train 2", "test 1"]]
    assert found.remarks[0].startswith("label 2 never occurs")
    assert found.problems[0].startswith("test: no image of class '3', though another split has some")
    assert len(found.problems) == 4  # and the blank one, and the same in two splits and two classes
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    broken = check(str(tmp_path))
    assert not broken.ok and "t10k-labels-idx1-ubyte (or" in broken.problems[0] and broken.kind == "idx"
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"x")
    assert "not a whole gzip file" in check(str(tmp_path)).problems[0]


@pytest.mark.parametrize("name, count", [("recall", 6_000), ("digits", 1797)])
def test_sets_without_files(name, count):
    if name == "digits":
        pytest.importorskip("sklearn")
    found = check(name)
    assert found.ok and found.kind == {"recall": "probe"}.get(name, name)
    assert sum(sum(counts.values()) for counts in found.counts.values()) == count


# planted by scripts/mutate
FAULTS = {
    "data/contents.py": (
        (
            "images of other sizes with the same pixels count as the same",
            "hashlib.blake2b(repr(image.size).encode(), digest_size=16)",
            "hashlib.blake2b(digest_size=16)",
        ),
    ),
    "data/check.py": (
        ("an image in two splits is passed over", "if len(same.splits) > 1]", "if len(same.splits) > 2]"),
    ),
}
