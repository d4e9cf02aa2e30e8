"""Image sources: the probe is what it says, files are read as they are, and every mistake is named."""

import gzip
import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from glocal.data import kind_of, load
from glocal.data.augment import crop_and_flip
from glocal.data.idx import find_idx, read_idx
from glocal.data.recall import recall


def test_statistics():
    data = recall(train_size=50, test_size=1)
    mean, deviation = data.statistics()
    pixels = data.train_images.double()
    assert math.isclose(mean[0], pixels.mean().item()) and math.isclose(deviation[0], pixels.std(correction=0).item())


# MNIST-like files


def idx(array):
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, *, train=12, test=5, side=6, gz=False, prefix=""):
    """A small MNIST-like set; returns its arrays by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", train), ("t10k", test)):
        arrays[f"{split}-images-idx3-ubyte"] = rng.integers(0, 256, (count, side, side + 1)).astype(np.uint8)
        arrays[f"{split}-labels-idx1-ubyte"] = (np.arange(count) % 3).astype(np.uint8)
    for name, array in arrays.items():
        content = idx(array)
        path = folder / (prefix + name + (".gz" if gz else ""))
        path.write_bytes(gzip.compress(content) if gz else content)
    return arrays


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("place", [".", "raw"])
@pytest.mark.parametrize("prefix", ["", "emnist-letters-"])
def test_idx_files_are_read_as_they_are(tmp_path, gz, place, prefix):
    arrays = write_idx(tmp_path / place, gz=gz, prefix=prefix)
    data = load(str(tmp_path))
    assert data.kind == "idx" and data.classes == ("0", "1", "2") and data.img_size == (6, 7)
    assert np.array_equal(data.train_images[:, 0].numpy(), arrays["train-images-idx3-ubyte"])
    assert np.array_equal(data.test_images[:, 0].numpy(), arrays["t10k-images-idx3-ubyte"])
    assert np.array_equal(data.test_labels.numpy(), arrays["t10k-labels-idx1-ubyte"])
    assert data.train_labels.dtype == torch.int64


def test_idx_prefers_the_unpacked_file(tmp_path):
    write_idx(tmp_path, gz=True)
    arrays = write_idx(tmp_path)
    assert np.array_equal(load(str(tmp_path)).train_images[:, 0].numpy(), arrays["train-images-idx3-ubyte"])
    assert find_idx(tmp_path)["train_images"].suffix == ""


def test_idx_files_with_a_dot_in_their_names(tmp_path):
    arrays = write_idx(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / path.name.replace("-idx", ".idx"))
    assert np.array_equal(load(str(tmp_path)).test_images[:, 0].numpy(), arrays["t10k-images-idx3-ubyte"])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("train-labels-idx1-ubyte", None, "train-labels-idx1-ubyte .* is missing beside the other idx files"),
        ("train-images-idx3-ubyte", b"", r"train-images-idx3-ubyte: begins with 0x\(nothing\), not with 0x00000803"),
        ("train-images-idx3-ubyte", b"\x89PNG....", "begins with 0x89504e47, not with 0x00000803"),
        ("train-labels-idx1-ubyte", idx(np.zeros((2, 2, 2), np.uint8)), "no idx file of unsigned bytes with 1 axis"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03\0\0", "ends inside its header of 16 bytes"),
        ("train-images-idx3-ubyte", idx(np.zeros((12, 6, 7), np.uint8))[:-1], "504 values, but it holds 503"),
        ("train-images-idx3-ubyte", idx(np.zeros((12, 6, 7), np.uint8)) + b"x", "504 values, but it holds 505"),
        ("train-labels-idx1-ubyte", idx(np.zeros(11, np.uint8)), "holds 12 images, but .* 11 labels"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((5, 9, 9), np.uint8)), r"\(6, 7\) pixels, but .* \(9, 9\)"),
        ("t10k-labels-idx1-ubyte", idx(np.full(5, 7, np.uint8)), "label 7 does not occur in"),
        ("train-images-idx3-ubyte", b"\0\0\x0b\x03", r"holds 16-bit integers \(type 0x0b\); only unsigned bytes"),
        ("t10k-labels-idx1-ubyte", b"\0\0\x0c\x01", r"holds 32-bit integers \(type 0x0c\); only unsigned bytes"),
        ("other-train-images-idx3-ubyte", b"", "could be the train images; keep one data set in a folder"),
    ],
)  # fmt: skip
def test_damaged_idx_files_are_refused(tmp_path, name, content, message):
    write_idx(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path))


def test_a_cut_gz_and_an_empty_set_are_refused(tmp_path):
    write_idx(tmp_path, gz=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        read_idx(path, 3)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match="not a whole gzip file"):
        read_idx(path, 3)
    write_idx(tmp_path, train=0)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte holds no image"):
        load(str(tmp_path))


# scikit-learn's digits


def test_digits_are_scikit_learns_stretched_to_bytes():
    read = pytest.importorskip("sklearn.datasets").load_digits()
    data = load("digits")
    assert data.kind == "digits" and data.classes == tuple("0123456789") and data.in_chans == 1
    # the same images, as often as they occur there, each with its label
    ours = torch.cat([data.train_images, data.test_images])[:, 0].double() * 16 / 255
    found = [
        (label, tuple(image))
        for image, label in zip(
            ours.flatten(1).round().tolist(), [*data.train_labels.tolist(), *data.test_labels.tolist()], strict=True
        )
    ]
    assert sorted(found) == sorted((label, tuple(image)) for image, label in zip(read.data, read.target, strict=True))
    assert data.train_images.max() == 255 and data.train_images.min() == 0
    for label in range(10):
        test, everything = (data.test_labels == label).sum().item(), (read.target == label).sum()
        assert abs(test - everything / 5) <= 0.5


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"scikit-learn is not installed; run: pip install 'glocal\[lab\]'"):
        load("digits")


# Names and paths


def test_a_folder_with_the_name_of_a_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_idx(tmp_path / "digits")
    assert kind_of("digits") == "digits" and kind_of("./digits") == "idx" and kind_of("recall") == "probe"
    assert load("./digits").img_size == (6, 7)


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    write_idx(tmp_path)

    def refuse(self, *_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte' cannot be read \(permission denied\); allow it"):
        load(str(tmp_path))


def test_a_missing_path_names_the_nearest(tmp_path):
    (tmp_path / "FashionMNIST").mkdir()
    with pytest.raises(
        ValueError, match=r"neither a probe \(recall.*\) nor 'digits' nor a folder; did you mean .*FashionMNIST'\?"
    ):
        load(str(tmp_path / "FashonMNIST"))
    with pytest.raises(ValueError, match=r"there is no 'x' in '.*'"):
        load(str(tmp_path / "x" / "y"))
    with pytest.raises(ValueError, match=r"did you mean the probe 'recall'\?"):
        load("recal")
    with pytest.raises(ValueError, match=r"did you mean 'digits'\?"):
        load("digit")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give the folder that holds"):
        load(str(tmp_path / "file"))


# Augmentation


def test_crop_and_flip_is_a_shift_or_its_mirror():
    images = torch.randint(1, 256, (64, 2, 5, 7), dtype=torch.uint8)
    result = crop_and_flip(images, padding=2, flip=True, generator=torch.Generator().manual_seed(1))
    assert result.shape == images.shape and result.dtype == torch.uint8
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    kinds = set()
    for i in range(64):
        found = {
            (dy, dx, mirrored)
            for dy in range(5)
            for dx in range(5)
            for mirrored in (False, True)
            if torch.equal(result[i], (padded[i].flip(-1) if mirrored else padded[i])[:, dy : dy + 5, dx : dx + 7])
        }
        assert len(found) == 1
        kinds |= found
    assert len({kind[:2] for kind in kinds}) > 15 and {kind[2] for kind in kinds} == {False, True}


def test_crop_alone_never_mirrors():
    images = torch.randint(1, 256, (32, 1, 4, 4), dtype=torch.uint8)
    assert torch.equal(crop_and_flip(images, padding=0, flip=False), images)
