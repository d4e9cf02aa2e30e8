"""Trained networks in use, with a network whose answers can be told from the pixels."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from glocal.checkpoint import CheckpointError, save_weights
from glocal.config import DataConfig, ModelConfig, RunConfig
from glocal.data import ImageData
from glocal.inference import evaluate, image_files, load_trained, predict_files
from glocal.plain import to_plain

NETWORK = """
import torch
from torch import nn

class Halves(nn.Module):
    '''Scores: the mean of the left half, that of the right half, and of the first channel less that of the last.'''
    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.in_chans = in_chans

    def forward(self, x):
        assert x.shape[1] == self.in_chans and not self.training
        left, right = x.chunk(2, 3)
        sides = [left.mean((1, 2, 3)), right.mean((1, 2, 3)), x[:, 0].mean((1, 2)) - x[:, -1].mean((1, 2))]
        return torch.stack(sides, 1) * self.scale
"""
CLASSES = ("left", "right", "red")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def a_run(folder, chans=3, size=(4, 6), **changed):
    """A folder as training leaves it; levels are divided by 50."""
    config = RunConfig(DataConfig("some"), ModelConfig(model="net.py:Halves"))
    about = {
        "config": to_plain(config),
        "classes": list(CLASSES),
        "in_chans": chans,
        "img_size": list(size),
        "mean": [0.0] * chans,
        "deviation": [50.0] * chans,
    } | changed
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text("seed: 0")
    save_weights(run / "weights.safetensors", {"scale": torch.tensor(1.0)}, about)
    return run


def softmax(scores):
    scores = np.exp(np.asarray(scores, float))
    return scores / scores.sum()


def an_image(path, pixels, mode=None, **options):
    Image.fromarray(np.asarray(pixels), mode).save(path, **options)
    return path


def halves(left, right, size=(4, 6)):
    pixels = np.full(size, left, np.uint8)
    pixels[:, size[1] // 2 :] = right
    return pixels


# Loading


def test_a_run_is_loaded_by_its_folder_or_file(folder):
    run = a_run(folder)
    for path in (run, run / "weights.safetensors"):
        trained = load_trained(path)
        assert trained.classes == CLASSES and trained.in_chans == 3 and trained.img_size == (4, 6)
        assert trained.config.data.source == "some" and not trained.model.training
    scores = trained.scores(torch.full((2, 3, 4, 6), 100, dtype=torch.uint8))
    assert torch.equal(scores, torch.tensor([[2.0, 2.0, 0.0]] * 2))


def test_what_is_no_trained_network_is_said(folder):
    def said(path):
        with pytest.raises(CheckpointError) as error:
            load_trained(path)
        assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}")
        return str(error.value)

    assert "no trained network; give the folder of a run, or its weights.safetensors" in said(folder)
    assert "no trained network" in said(folder / "none")
    run = a_run(folder)
    assert "(config: must hold names with values" in said(a_run(folder, config=None))
    assert "(config.train.of tomorrow: unknown; valid are epochs," in said(
        a_run(folder, config={"train": {"of tomorrow": 1}})
    )
    assert "(not enough values to unpack" in said(a_run(folder, img_size=[4]))
    save_weights(run / "weights.safetensors", {"a": torch.ones(1)})
    assert "not written by train or compare of this glocal ('config' is missing)" in said(run)
    (run / "weights.safetensors").write_text("text")
    assert "not a file of weights that can be read" in said(run)
    (run / "weights.safetensors").unlink()
    assert "the run is not finished; the command that started it continues" in said(run)


@pytest.mark.parametrize("weights", [{"other": torch.ones(())}, {"scale": torch.ones(3)}, {}])
def test_weights_of_another_network_are_named(folder, weights):
    run = a_run(folder)
    config = RunConfig(model=ModelConfig(model="net.py:Halves"))
    about = {"config": to_plain(config), "classes": CLASSES, "in_chans": 1, "img_size": [4, 6]}
    save_weights(run / "weights.safetensors", weights, about | {"mean": [0.0], "deviation": [1.0]})
    with pytest.raises(CheckpointError, match=r"weights of another network than net.py:Halves: .*scale") as error:
        load_trained(run)
    assert "\n" not in str(error.value)


def test_of_many_names_that_differ_the_first_is_said(folder):
    run = a_run(folder)
    about = {"classes": ["a", "b"], "in_chans": 1, "img_size": [8, 8], "mean": [0.0], "deviation": [1.0]}
    config = RunConfig(model=ModelConfig("C-T", dims=(32, 32)))
    save_weights(run / "weights.safetensors", {"a": torch.ones(1)}, about | {"config": to_plain(config)})
    with pytest.raises(CheckpointError, match="Missing key") as error:
        load_trained(run)
    assert len(str(error.value)) < 300


# Predictions of files


def test_files_are_named_or_found_in_folders(folder):
    nested = folder / "images" / "deep"
    nested.mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "deep/c.webp", "notes.txt", "._a.jpg", ".hidden.png"):
        (folder / "images" / name).write_bytes(b"")
    (folder / "images" / ".cache").mkdir()
    (folder / "images" / ".cache" / "d.png").write_bytes(b"")
    (folder / "images" / "folder.png").mkdir()
    images = folder / "images"
    found = [images / "a.jpg", images / "b.PNG", images / "deep" / "c.webp"]
    assert image_files([images]) == found
    assert image_files([images / "notes.txt", images]) == [images / "notes.txt", *found]  # named: the user knows
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: holds no image \(.*\.png"):
        image_files([images, folder / "empty"])
    with pytest.raises(ValueError, match=r"none: no such file or folder$"):
        image_files([folder / "none"])


def test_predictions_follow_from_the_pixels(folder):
    trained = load_trained(a_run(folder))
    red = np.zeros((4, 6, 3), np.uint8)
    red[..., 0] = 250
    files = [
        an_image(folder / "left.png", halves(200, 50)),
        an_image(folder / "right.png", halves(50, 100)),
        an_image(folder / "red.png", red),
        an_image(folder / "large.png", halves(0, 150, (40, 60))),
    ]
    found = list(predict_files(trained, files))
    assert [each.predicted for each in found] == ["left", "right", "red", "right"]
    assert [each.path for each in found] == [str(file) for file in files]
    expected = [softmax(scores) for scores in ((4, 1, 0), (1, 2, 0), (250 / 150, 250 / 150, 5))]
    for each, probabilities in zip(found, expected, strict=False):
        assert list(each.probabilities) == list(CLASSES)
        assert list(each.probabilities.values()) == pytest.approx(probabilities.tolist(), rel=1e-5)
    json.dumps(found[0].probabilities)


def test_every_mode_of_image_is_read(folder):
    pixels = halves(200, 50)
    clear = np.zeros((4, 6, 4), np.uint8)
    clear[:, :3, 3] = 255  # black on the left, transparent, that is white, on the right
    palette = Image.fromarray(np.stack([pixels] * 3, -1)).convert("P")
    palette.save(folder / "palette.png")
    palette.save(folder / "palette.gif")
    files = [
        an_image(folder / "16.png", pixels.astype(np.uint16) * 256 + 99),
        an_image(folder / "alpha.png", clear),
        an_image(folder / "rgba.png", np.dstack([*[pixels] * 3, np.full_like(pixels, 255)])),
        an_image(folder / "1.png", pixels > 100),
        an_image(folder / "cmyk.tif", np.dstack([*[255 - pixels] * 3, np.zeros_like(pixels)]), "CMYK"),
        *(folder / "palette.png", folder / "palette.gif"),
    ]
    expected = {"16.png": (4, 1), "alpha.png": (0, 5.1), "rgba.png": (4, 1), "1.png": (5.1, 0), "cmyk.tif": (4, 1)}
    for chans in (3, 1):
        trained = load_trained(a_run(folder, chans))
        for each in predict_files(trained, files):
            scores = [*expected.get(each.path.rpartition("/")[2], (4, 1)), 0]
            assert list(each.probabilities.values()) == pytest.approx(softmax(scores).tolist(), abs=0.02), each.path


def test_many_files_keep_their_order(folder):
    trained = load_trained(a_run(folder, 1))
    kinds = np.random.default_rng(0).integers(0, 2, 150)
    files = [an_image(folder / f"{i}.png", halves(*((90, 10) if k == 0 else (10, 90)))) for i, k in enumerate(kinds)]
    found = list(predict_files(trained, files))
    assert [each.predicted for each in found] == [CLASSES[k] for k in kinds]
    assert [each.path for each in found] == [str(file) for file in files]


def test_a_file_that_is_no_image_is_named(folder):
    trained = load_trained(a_run(folder))
    good = an_image(folder / "good.png", np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))
    (folder / "cut.png").write_bytes(good.read_bytes()[:900])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    for name in ("cut.png", "text.png", "empty.png"):
        with pytest.raises(ValueError, match=rf"{name}: not an image that can be read") as error:
            list(predict_files(trained, [good, folder / name]))
        assert "\n" not in str(error.value)


# Evaluation


def data_of(pixels, labels, classes=CLASSES):
    images, labels = torch.from_numpy(np.stack(pixels)), torch.tensor(labels)
    images = images[:, None] if images.ndim == 3 else images.movedim(-1, 1)
    return ImageData("mine", images[:1], labels[:1], images, labels, classes, "folder")


def test_an_evaluation_by_hand(folder):
    pixels = [halves(200, 50), halves(50, 200), halves(50, 100), halves(50, 100), halves(150, 50)]
    labels = [0, 0, 0, 1, 1]
    for chans in (1, 3):  # a network for colour sees grey images as grey ones in colour
        found = evaluate(load_trained(a_run(folder, chans)), data_of(pixels, labels))
        scores = [(4, 1, 0), (1, 4, 0), (1, 2, 0), (1, 2, 0), (3, 1, 0)]
        losses = [-np.log(softmax(score)[label]) for score, label in zip(scores, labels, strict=True)]
        assert found.images == 5 and found.accuracy == 40
        assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert found.confusion == [[1, 2, 0], [1, 1, 0], [0, 0, 0]]
        assert found.per_class == {"left": pytest.approx(100 / 3), "right": 50}  # of "red" there is no image


def test_images_of_another_size_are_resized(folder):
    data = data_of([halves(200, 50, (40, 60)), halves(50, 200, (40, 60))], [0, 1])
    assert evaluate(load_trained(a_run(folder, 1)), data).accuracy == 100


def test_images_that_do_not_fit_the_network_are_refused(folder):
    pixels = [halves(200, 50)]
    grey = load_trained(a_run(folder, 1))
    with pytest.raises(ValueError, match=r"^mine: its images have 3 channels and cannot be used as grey"):
        evaluate(grey, data_of([np.dstack(pixels * 3)], [0]))
    with pytest.raises(ValueError, match=r"^mine: its 2 classes are not the 3 .*\(such as 'red'\)$"):
        evaluate(grey, data_of(pixels, [0], ("left", "right")))
    with pytest.raises(ValueError, match=r"\(in another order\)$"):
        evaluate(grey, data_of(pixels, [0], ("right", "left", "red")))


# planted by scripts/mutate
FAULTS = (
    ("hidden files are taken for images", "in _SUFFIXES and not hidden", "in _SUFFIXES"),
    (
        "counts are [predicted][true]",
        "data.test_labels * n + found.predicted",
        "found.predicted * n + data.test_labels",
    ),
)
