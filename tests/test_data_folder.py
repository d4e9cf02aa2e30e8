"""Image folders: every kind of file becomes the same pixels, the splits are those of the folder, mistakes are named."""

import os
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from glocal.data import decoding, load, memory
from glocal.data.decoding import in_order, read_header, read_image
from glocal.data.image_folder import folder_data


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


def damaged(path, kind="PNG"):
    Image.effect_noise((64, 64), 50).convert("RGB").save(path, format=kind)
    path.write_bytes(path.read_bytes()[:-400])


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    "break_, why",
    [
        (lambda p: p.write_text("not an image"), ""),
        (lambda p: p.write_bytes(b""), r" \(it is empty\)"),
        (damaged, r" \(.*truncated.*\)"),
        (lambda p: damaged(p, "JPEG"), r" \(.*truncated.*\)"),
        (lambda p: p.symlink_to("nowhere.png"), r" \(the file that it links to is missing\)"),
        (os.mkfifo, r" \(it is not a file\)"),
        (lambda p: Image.new("F", (8, 8)).save(p, format="TIFF"), r" \(its pixels are fractions, .*\)"),
        (
            lambda p: Image.new("I", (8, 8), 70_000).save(p, format="TIFF"),
            r" \(its pixels go from 70000 to 70000, .*\)",
        ),
    ],
)
def test_a_file_that_is_no_image_is_named(tmp_path, split, break_, why):
    for part in ("train", "test"):
        for name in "ab":
            write_images(tmp_path / part / name, 2, size=(64, 64))
    path = tmp_path / split / "b" / "notes.png"
    break_(path)
    with pytest.raises(
        ValueError, match=rf"notes\.png: not an image that can be read{why}; remove or replace it$"
    ) as error:
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
        (("train/a", "train/b", "test/a"), "test: class folder 'b' is missing, though another split has it"),
        (("train/a", "test/a", "test/b"), "train: class folder 'b' is missing, though another split has it"),
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


def test_folder_data_takes_its_name(tmp_path):
    folders(tmp_path, "a", "b")
    assert folder_data("mine", tmp_path).name == "mine"


@pytest.mark.parametrize(
    "names, counts",
    [
        (("Training", "testing"), (3, None, 2)),
        (("train", "valid"), (3, None, 2)),
        (("TRAIN", "validation"), (3, None, 2)),
        (("training", "Val", "test"), (3, 2, 1)),
    ],
)
def test_splits_go_by_their_usual_names(tmp_path, names, counts):
    for number, split in zip((3, 2, 1), names, strict=False):
        for name in "ab":
            write_images(tmp_path / split / name, number)
    (tmp_path / "annotations").mkdir()
    data = load(str(tmp_path))
    assert data.train_labels.tolist() == [0] * counts[0] + [1] * counts[0]
    assert len(data.test_labels) == 2 * counts[2]
    if counts[1] is None:
        assert data.val_images is None and data.val_labels is None
    else:
        assert data.val_labels.tolist() == [0, 0, 1, 1] and data.val_images.shape == (4, 3, 6, 8)


def test_two_folders_for_one_split_are_refused(tmp_path):
    folders(tmp_path, "train/a", "train/b", "training/a", "test/a", "test/b")
    with pytest.raises(ValueError, match="has 'train' and 'training' for the same split; keep one"):
        load(str(tmp_path))


def test_what_archives_leave_behind_is_no_class(tmp_path):
    folders(tmp_path, "a", "b", "__MACOSX", ".git")
    (tmp_path / "labels.csv").write_text("x")
    (tmp_path / "a" / "empty.png").mkdir()
    assert load(str(tmp_path)).classes == ("a", "b")


def test_a_class_folder_that_may_not_be_read(tmp_path, monkeypatch):
    folders(tmp_path, "a", "b")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"/b: cannot be read \(permission denied\); allow it"):
        load(str(tmp_path))


def test_an_image_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    write_images(tmp_path, 1)
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ValueError, match=r"/000\.png: not an image that can be read \(permission denied\); remove"):
        read_header(tmp_path / "000.png")


# Kinds of pixels

PICTURE = np.arange(0, 240, 10, dtype=np.uint8).reshape(2, 4, 3)
# What the EXIF standard says of each orientation: where the stored first row and first column are to be seen.
ORIENTATIONS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: a[::-1, ::-1],
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_orientation_that_a_camera_noted_is_applied(tmp_path, kind, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PICTURE).save(tmp_path / "x", format=kind, exif=exif, **options)
    upright = ORIENTATIONS[orientation](PICTURE)
    assert np.array_equal(np.asarray(read_image(tmp_path / "x")), upright)
    assert read_header(tmp_path / "x") == (*upright.shape[:2], True)


def test_damaged_metadata_does_not_spoil_the_pixels(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "x.png", exif=b"Exif\0\0no metadata at all")
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.png")), PICTURE)
    assert read_header(tmp_path / "x.png") == (2, 4, True)


def test_transparent_places_become_white(tmp_path):
    alpha = np.array([[0, 255, 51, 255], [0, 0, 255, 255]], np.uint8)
    share = alpha[:, :, None] / 255
    expected = PICTURE * share + 255 * (1 - share)
    Image.fromarray(np.dstack([PICTURE, alpha])).save(tmp_path / "colour.png")
    assert np.abs(np.asarray(read_image(tmp_path / "colour.png")) - expected).max() <= 1
    Image.fromarray(np.dstack([PICTURE[:, :, 0], alpha])).save(tmp_path / "grey.png")
    grey = read_image(tmp_path / "grey.png")
    assert grey.mode == "L" and np.abs(np.asarray(grey) - expected[:, :, 0]).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=1)
    assert np.asarray(read_image(tmp_path / "palette.png")).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    Image.fromarray(PICTURE).save(tmp_path / "key.png", transparency=tuple(PICTURE[0, 1].tolist()))
    keyed = PICTURE.copy()
    keyed[0, 1] = 255
    assert np.array_equal(np.asarray(read_image(tmp_path / "key.png")), keyed)


def test_inks_become_light(tmp_path):
    inks = np.random.default_rng(0).integers(0, 256, (5, 5, 4)).astype(np.uint8)
    Image.fromarray(inks, "CMYK").save(tmp_path / "x.tif")
    light = 255 * (1 - inks[:, :, :3] / 255) * (1 - inks[:, :, 3:] / 255)
    assert np.abs(np.asarray(read_image(tmp_path / "x.tif")) - light).max() <= 1


def test_one_bit_and_the_first_of_several_frames(tmp_path):
    Image.fromarray(PICTURE[:, :, 0] > 100).save(tmp_path / "x.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.png")), (PICTURE[:, :, 0] > 100) * 255)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        frames[0].save(tmp_path / "x", format=kind, save_all=True, append_images=frames[1:])
        assert read_image(tmp_path / "x").getpixel((1, 1))[0] > 250


def test_a_photograph_is_reduced_to_what_its_average_shows(tmp_path):
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (6, 9, 3)).astype(np.uint8)).resize((1800, 1200), Image.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "x.jpg", quality=95, exif=exif)
    means = np.asarray(photo, np.float64).reshape(60, 20, 60, 30, 3).mean((1, 3))  # of what falls on each new pixel
    turned = means.swapaxes(0, 1)[:, ::-1]
    assert np.abs(np.asarray(read_image(tmp_path / "x.jpg", "RGB", (60, 60)), np.float64) - turned).mean() < 2


# Threads and memory


def test_threads_give_the_images_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (2, 30, 81, 81)).astype(np.uint8)
    for name, class_arrays in zip("ab", arrays, strict=True):
        for split in ("train", "test"):
            (tmp_path / split / name).mkdir(parents=True)
        for i, array in enumerate(class_arrays):
            Image.fromarray(array).save(tmp_path / "train" / name / f"{i:02}.png")
        shutil.copy(tmp_path / "train" / name / "00.png", tmp_path / "test" / name)
    data = load(str(tmp_path))
    assert np.array_equal(data.train_images[:, 0].numpy(), arrays.reshape(60, 81, 81))
    for broken in ("29", "05"):
        path = tmp_path / "train" / "b" / f"{broken}.png"
        path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"b/05\.png: not an image that can be read"):
        load(str(tmp_path))


def test_threads_are_used_for_large_images_only(monkeypatch):
    monkeypatch.setattr(decoding.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    here = threading.get_ident()
    assert set(in_order(lambda _: threading.get_ident(), range(100), 32 * 32)) == {here}
    assert here not in set(in_order(lambda _: threading.get_ident(), range(100), 224 * 224))


def test_images_that_do_not_fit_in_memory_are_refused_before_decoding(tmp_path, monkeypatch):
    for name in "ab":
        write_images(tmp_path / name, 5, size=(200, 100))
    needed = 10 * 3 * 100 * 200
    monkeypatch.setattr(memory, "available_bytes", lambda: needed)
    assert len(load(str(tmp_path)).train_labels) == 8
    monkeypatch.setattr(memory, "available_bytes", lambda: needed - 1)
    monkeypatch.setattr("glocal.data.image_folder.read_image", lambda *_: pytest.fail("it decoded"))
    with pytest.raises(
        ValueError, match=r"10 images of 100 x 200 pixels need .* GB of memory.*\((\d+) x (\d+) pixels fit"
    ):
        load(str(tmp_path))
    monkeypatch.setattr(memory, "available_bytes", lambda: 12_000_000_000)
    with pytest.raises(ValueError) as error:
        memory.check_fits("big", 1_000_000, 3, (224, 224))
    said = re.fullmatch(
        r"big: 1000000 images of 224 x 224 pixels need 150\.5 GB of memory, but 12\.0 GB are available; save them "
        r"smaller \((\d+) x (\d+) pixels fit\) or use fewer",
        str(error.value),
    )
    height, width = map(int, said.groups())
    assert 0.5 * 12e9 < 3_000_000 * height * width < 12e9


def test_available_memory_is_what_the_system_says():
    psutil = pytest.importorskip("psutil")
    said = memory.available_bytes()
    assert said is None or 0 < said <= 1.1 * psutil.virtual_memory().total


def test_a_container_has_what_its_limit_leaves(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
        "/sys/fs/cgroup/memory.max": "5000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 1000000\nfile 3000000\n",
    }
    monkeypatch.setattr(memory.Path, "read_text", lambda path: files[str(path)])
    assert memory.available_bytes() == 4_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert memory.available_bytes() == 8000 * 1024


# planted by scripts/mutate
FAULTS = {
    "data/decoding.py": (
        ("mirrored images that are turned keep their size in the header", "in (5, 6, 7, 8)", "in (6, 8)"),
        ("transparent places become black", 'drawn.size, "white")', 'drawn.size, "black")'),
    ),
    "data/memory.py": (("images that do not fit in memory are decoded", "needed <= free", "needed <= 8 * free"),),
}
