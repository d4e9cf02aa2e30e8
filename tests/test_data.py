"""Image sources: the probe is what it says, files are read as they are, and every mistake is named."""

import gzip
import math
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from glocal.data import load
from glocal.data.augment import crop_and_flip
from glocal.data.idx import find_idx, read_idx
from glocal.data.image_folder import folder_data
from glocal.data.probes import RECALL_KEYS, RECALL_PAIRS, RECALL_VALUES, _glyphs, recall


def read_pairs(image):
    """Keys, values and the framed key of one recall image, found by looking at every place: an oracle of its own."""
    keys, values = _glyphs()
    pairs, framed = {}, []
    for top in range(1, image.shape[0] - 3):
        for left in range(1, image.shape[1] - 3):
            patch = image[top : top + 3, left : left + 3] == 255
            ring = image[top - 1 : top + 4, left - 1 : left + 4]
            for key in range(len(keys)):
                if not (patch == keys[key]).all():
                    continue
                if ring.shape == (5, 5) and (ring == 128).sum() == 16:
                    framed.append(key)
                beside = image[top : top + 3, left + 4 : left + 7] == 255
                for value in range(len(values)):
                    if beside.shape == (3, 3) and (beside == values[value]).all() and not (ring == 128).any():
                        pairs[key] = value
    return pairs, framed


def test_recall_asks_for_the_value_beside_the_framed_key():
    data = recall(train_size=60, test_size=60)
    for images, labels, fewest in (
        (data.test_images, data.test_labels, RECALL_PAIRS),
        (data.train_images, data.train_labels, 1),
    ):
        seen = set()
        for image, label in zip(images[:, 0].numpy(), labels.tolist(), strict=True):
            pairs, framed = read_pairs(image)
            assert len(framed) == 1
            assert pairs[framed[0]] == label
            seen.add(len(pairs))
        assert seen == set(range(fewest, RECALL_PAIRS + 1))


def test_recall_is_seeded_and_its_splits_differ():
    one, same, other = recall(train_size=200, test_size=100), recall(train_size=200, test_size=100), recall(seed=1)
    assert torch.equal(one.train_images, same.train_images) and torch.equal(one.test_labels, same.test_labels)
    assert not torch.equal(one.test_images, other.test_images[:100])
    train = {image.numpy().tobytes() for image in one.train_images}
    assert len(train) > 190 and not any(image.numpy().tobytes() in train for image in one.test_images)


def test_recall_gives_nothing_away():
    data = recall()
    assert data.train_images.shape == (10_000, 1, 32, 32) and data.train_images.dtype == torch.uint8
    counts = torch.bincount(data.train_labels) / 10_000
    assert torch.allclose(counts, torch.full((RECALL_VALUES,), 1 / RECALL_VALUES), atol=0.02)
    # the mean picture of every class is the same: no pixel predicts the answer
    means = torch.stack([data.train_images[data.train_labels == i].double().mean(0) for i in range(RECALL_VALUES)])
    assert (means - means.mean(0)).abs().max() < 20
    # what its docstring says about the best guess that does not look at the keys
    guess = []
    for image, label in zip(data.test_images[:150, 0].numpy(), data.test_labels.tolist(), strict=False):
        values = list(read_pairs(image)[0].values())
        most = max(map(values.count, values))
        winners = [v for v in set(values) if values.count(v) == most]
        guess.append((label in winners) / len(winners))
    assert abs(np.mean(guess) - 0.412) < 0.1


def test_glyphs_differ():
    for glyphs, count, inked in zip(_glyphs(), (RECALL_KEYS, RECALL_VALUES), (4, 5), strict=True):
        assert len(glyphs) == count and (glyphs.sum((1, 2)) == inked).all()
        assert min((a != b).sum() for i, a in enumerate(glyphs) for b in glyphs[:i]) >= 4


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


# Image folders


def write_images(folder, count, *, size=(8, 6), mode="RGB", suffix="png", shade=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        colour = (shade, i, 7) if mode == "RGB" else shade + i
        Image.new(mode, size, colour).save(folder / f"{i:03d}.{suffix}")


def test_a_folder_with_splits(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for shade, name in enumerate(("cat", "dog")):
            write_images(tmp_path / split / name, count, shade=100 * shade)
    data = load(str(tmp_path))
    assert data.kind == "folder" and data.classes == ("cat", "dog") and data.note == ""
    assert data.train_images.shape == (8, 3, 6, 8) and data.test_images.shape == (4, 3, 6, 8)
    assert data.train_labels.tolist() == [0] * 4 + [1] * 4
    assert data.train_images[5, :, 0, 0].tolist() == [100, 1, 7]


def test_val_stands_for_test_and_leftovers_are_ignored(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / split / "a", 2)
        write_images(tmp_path / split / "b" / "deeper", 2)
        (tmp_path / split / "a" / "Thumbs.db").write_bytes(b"x")
        (tmp_path / split / "a" / ".hidden").write_bytes(b"x")
        (tmp_path / split / ".cache").mkdir()
    assert len(load(str(tmp_path)).test_labels) == 4


def test_class_folders_alone_are_split(tmp_path):
    write_images(tmp_path / "a", 20, shade=1)
    write_images(tmp_path / "b", 5, shade=2)
    write_images(tmp_path / "c", 2, shade=3)
    data = load(str(tmp_path))
    assert torch.bincount(data.test_labels).tolist() == [4, 1, 1]
    assert torch.bincount(data.train_labels).tolist() == [16, 4, 1]
    seen = [tuple(image[:, 0, 0].tolist()) for image in (*data.train_images, *data.test_images)]
    assert len(set(seen)) == 27  # every image is in one split
    assert torch.equal(data.test_images, load(str(tmp_path)).test_images)


def test_grey_stays_grey_and_one_colour_image_makes_all_coloured(tmp_path):
    write_images(tmp_path / "a", 3, mode="L", shade=10)
    write_images(tmp_path / "b", 3, mode="L", shade=20)
    assert load(str(tmp_path)).in_chans == 1
    write_images(tmp_path / "c", 3)
    data = load(str(tmp_path))
    assert data.in_chans == 3 and data.train_images[0, 0, 0, 0] == data.train_images[0, 2, 0, 0]


def test_mixed_sizes_become_the_median(tmp_path):
    for i, size in enumerate(((10, 8), (20, 8), (30, 40))):  # width, height
        write_images(tmp_path / "train" / f"{i}", 1, size=size)
        write_images(tmp_path / "test" / f"{i}", 1, size=(9, 9))
    data = load(str(tmp_path))
    assert data.img_size == (8, 20) and data.test_images.shape[-2:] == (8, 20)
    assert data.note == "Images (mixed sizes, median 8 x 20 pixels) were stretched to 8 x 20 pixels."


def test_large_images_are_reduced(tmp_path):
    for name in "ab":
        write_images(tmp_path / name, 2, size=(400, 100))
    data = load(str(tmp_path))
    assert data.img_size == (100, 224)
    assert data.note == "Images (100 x 400 pixels) were stretched to 100 x 224 pixels."


def test_sixteen_bits_are_scaled(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(np.full((4, 4), 256 * (100 + i), np.uint16)).save(tmp_path / name / f"{i}.png")
    data = load(str(tmp_path))
    assert {int(v) for v in torch.cat([data.train_images, data.test_images]).unique()} == {100, 101}


def damaged(path):
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-400])


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("break_", [lambda p: p.write_text("not an image"), damaged, lambda p: p.write_bytes(b"")])
def test_a_file_that_is_no_image_is_named(tmp_path, split, break_):
    for part in ("train", "test"):
        for name in "ab":
            write_images(tmp_path / part / name, 2, size=(64, 64))
    path = tmp_path / split / "b" / "notes.png"
    break_(path)
    with pytest.raises(ValueError, match=r"notes\.png: not an image that can be read.*; remove or replace it") as error:
        load(str(tmp_path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def folders(tmp_path, *names):
    for name in names:
        write_images(tmp_path / name, 2)


@pytest.mark.parametrize(
    "names, message",
    [
        ((), "holds neither idx files .* nor class folders of images"),
        (("train/a", "train/b"), "has 'train' but neither 'test' nor 'val' beside it"),
        (("test/a", "test/b"), "has 'test' but no 'train' beside it"),
        (("train/a", "train/b", "test/a"), "test: class folder 'b' is missing, though the other split has it"),
        (("train/a", "test/a", "test/b"), "train: class folder 'b' is missing, though the other split has it"),
        (("train/a", "test/a"), "train: holds 1 class folders; a comparison needs at least two"),
        (("a",), "holds one class folder, 'a'; a comparison needs two"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, names, message):
    folders(tmp_path, *names)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path))


def test_classes_that_are_too_small(tmp_path):
    folders(tmp_path, "a", "b")
    write_images(tmp_path / "c", 1)
    with pytest.raises(ValueError, match="c: holds 1 image; a class needs two"):
        load(str(tmp_path))
    (tmp_path / "c" / "000.png").unlink()
    with pytest.raises(ValueError, match="c: holds 0 images; a class needs two"):
        load(str(tmp_path))
    folders(tmp_path, "train/a", "train/b", "test/a")
    (tmp_path / "test" / "b").mkdir()
    with pytest.raises(ValueError, match="b: holds no image"):
        load(str(tmp_path))


def test_a_missing_path_names_the_nearest(tmp_path):
    (tmp_path / "FashionMNIST").mkdir()
    with pytest.raises(ValueError, match=r"neither a probe \(recall\) nor a folder; did you mean .*FashionMNIST'\?"):
        load(str(tmp_path / "FashonMNIST"))
    with pytest.raises(ValueError, match=r"there is no 'x' in '.*'"):
        load(str(tmp_path / "x" / "y"))
    with pytest.raises(ValueError, match=r"did you mean the probe 'recall'\?"):
        load("recal")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give the folder that holds"):
        load(str(tmp_path / "file"))


def test_folder_data_takes_its_name(tmp_path):
    folders(tmp_path, "a", "b")
    assert folder_data("mine", tmp_path).name == "mine"


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
