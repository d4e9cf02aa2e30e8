"""`glocal explore`: which model it finds, which images, what it says on the page, and how it refuses."""

import json
import os
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import glocal
from glocal import cli
from glocal.cli.explore import _chosen
from glocal.cli.parsing import UserError
from glocal.config import DataConfig, ModelConfig, RunConfig, TrainConfig

STEM = ["stem.conv1", "stem.conv2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder as training leaves it, but for the training."""
    from glocal.checkpoint import save_weights
    from glocal.plain import to_plain
    from glocal.tasks.classification import build_model

    folder = tmp_path_factory.mktemp("runs") / "places"
    folder.mkdir()
    config = RunConfig(
        DataConfig("digits"), ModelConfig("QuadraticAttention(num_heads=2)-T", dims=(32, 32)), TrainConfig()
    )
    model = build_model(config.model, in_chans=1, num_classes=10, img_size=(8, 8), seed=0)
    about = {
        "config": to_plain(config), "classes": [str(i) for i in range(10)], "in_chans": 1, "img_size": [8, 8],
        "mean": [78.0], "deviation": [96.0],
    }  # fmt: skip
    save_weights(folder / "weights.safetensors", model.state_dict(), about)
    return folder


def explore(tmp_path, *arguments):
    page = tmp_path / "new" / "page.html"
    code = cli.main(["explore", *map(str, arguments), "--out", str(page)])
    return code, page.read_text("utf-8") if page.exists() else ""


def about(page):
    text = page.partition('<script type="application/json" id="about">')[2].partition("</script>")[0]
    return json.loads(text)


def test_a_run_with_its_own_test_images(run, tmp_path, capsys):
    code, page = explore(tmp_path, run)
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "4 layers on 5 images; rebuilt within" in said.out and "page.html (0." in said.out
    found = about(page)
    assert [layer["name"] for layer in found["layers"]] == [*STEM, "stages.0.0.mixer", "stages.1.0.mixer"]
    assert [len(layer["rows"]) for layer in found["layers"]] == [1, 1, 1, 5]
    assert len({picture["name"].rpartition("(")[2] for picture in found["pictures"]}) == 5  # of five classes
    assert all(picture["note"].startswith("seen as ") for picture in found["pictures"])
    assert "random" not in page and found["epochs"] is None
    assert explore(tmp_path, run / "weights.safetensors")[0] == 0


def test_the_epochs_of_a_run(run, tmp_path, capsys):
    record = {"centers": [[0, 1], [2, 3]], "precision": [[[1, 0], [0, 1]]] * 2}
    lines = [json.dumps({"epoch": n, "layers": {"stages.0.0.mixer": record}}) for n in (1, 2, 3)]
    (run / "heads.jsonl").write_text("\n".join(lines))
    try:
        assert about(explore(tmp_path, run)[1])["epochs"] is not None
        assert about(explore(tmp_path, run, "--layers", "stages.1*")[1])["epochs"] is None  # no such heads there
        (run / "heads.jsonl").write_text(lines[0] + "\n{}")
        assert explore(tmp_path, run)[0] == 2
        assert "heads.jsonl, line 2: no record of an epoch" in one_line(capsys)
    finally:
        (run / "heads.jsonl").unlink()


def test_images_that_are_named_and_chosen_layers(run, tmp_path):
    for name in ("b.png", "a.png"):
        Image.fromarray(np.full((9, 7, 3), 200, np.uint8)).save(tmp_path / name)
    code, page = explore(tmp_path, run, "--images", tmp_path / "b.png", tmp_path / "a.png", "--layers", "stages.1*")
    assert code == 0
    assert [picture["name"] for picture in about(page)["pictures"]] == ["b.png", "a.png"]
    assert [layer["name"] for layer in about(page)["layers"]] == ["stages.1.0.mixer"]


def test_what_was_computed_is_what_the_model_computes(run, tmp_path, monkeypatch):
    """The layers that go onto the page hold the weights of the run's network on its own images."""
    from glocal.data import load
    from glocal.inference import load_trained

    kept = {}
    import glocal.analysis.maps as maps

    real = maps.maps
    monkeypatch.setattr(maps, "maps", lambda calls: real(kept.setdefault("calls", calls)))
    assert explore(tmp_path, run, "--dtype", "float64")[0] == 0
    trained, data = load_trained(run), load("digits")
    first = [data.test_labels.tolist().index(label) for label in dict.fromkeys(data.test_labels.tolist())][:5]
    x = (data.test_images[first].double() - 78) / 96
    with torch.no_grad(), glocal.inspect(trained.model.double().eval(), convolutions=True) as seen:
        trained.model(x)
    assert len(seen) == 4
    for one, other in zip(kept["calls"], seen, strict=True):
        torch.testing.assert_close(one.weights().weights, other.weights().weights)


def test_a_convolutional_network(tmp_path):
    """Every layer with a kernel, its taps as heads; no patches, no 1x1."""
    code, page = explore(tmp_path, "timm:resnet10t", "--dtype", "float64")
    assert code == 0 and len(page) < 2e6
    layers = about(page)["layers"]
    names = [layer["name"] for layer in layers]
    assert names[:3] == ["conv1.0", "conv1.3", "conv1.6"] and names[-1] == "layer4.0.conv2" and len(names) == 11
    assert {layer["heads"] for layer in layers} == {1} and max(layer["error"] for layer in layers) < 1e-14
    assert "A dense convolution's heads are its taps" in page
    assert {len(layer["index"]) for layer in layers} == {1} and not any(layer["shares"] for layer in layers)


def test_a_model_of_ours_by_name(tmp_path):
    """Images of the size and the channels that it was made for, unless its name says otherwise."""
    small = "vit_tiny(depth=1, in_chans=1, img_size=(64, 96))"
    code, page = explore(tmp_path, small)
    assert code == 0
    assert "Its weights are random: nothing here was learned." in page
    assert about(page)["layers"][0]["queries"]["grid"] == [4, 6]
    assert about(explore(tmp_path, "vit_tiny(depth=1)")[1])["layers"][0]["queries"]["grid"] == [14, 14]
    assert about(explore(tmp_path, "resnet18_cifar")[1])["layers"][0]["queries"]["grid"] == [32, 32]
    model = glocal.create_model(small)
    torch.save(model.state_dict(), tmp_path / "own.pt")
    assert "random" not in explore(tmp_path, small, "--weights", tmp_path / "own.pt")[1]
    assert explore(tmp_path, "vit_tinny")[0] == 2


def one_line(capsys):
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and said.startswith("glocal explore: "), said
    return said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a model: the folder of a run"),
        (["timm:no_such_net"], "timm has no such model"),
        (["all_attention_quadratik"], "did you mean 'all_attention_quadratic'?"),
        (["hf:nowhere"], "no config.json there"),
        (["nowhere/run"], "no trained network"),
        (["RUN", "--images", "gone.png"], "gone.png: no such file"),
        (
            ["RUN", "--layers", "nothing*"],
            "'nothing*' is the name of none; there are stem.conv1, stem.conv2, stages.0.0.mixer",
        ),
        (["RUN", "--weights", "x.pt"], "has weights of its own"),
        (["RUN", "--dtype", "float8"], "--dtype"),
        (["timm:mixer_s32_224"], "the model has no token mixer of this library, no attention of timm"),
        (["timm:resnet10t", "--lesson"], "--lesson is a page without a model; leave out timm:resnet10t"),
        (["timm:resnet10t", "--weights", "gone.pt"], "gone.pt: no such file"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, arguments, words):
    assert explore(tmp_path, *[run if each == "RUN" else each for each in arguments])[0] == 2
    assert words in one_line(capsys)


def test_a_model_of_which_nothing_can_be_seen_says_why():
    seen = types.SimpleNamespace(calls=[], refused={"blocks.0.attn": "normalises queries and keys"})
    with pytest.raises(UserError, match=r"nothing to show: blocks\.0\.attn normalises queries and keys"):
        _chosen(seen, ())


def test_a_model_of_which_every_call_is_refused_says_why(tmp_path, monkeypatch, capsys):
    """Its layers are ones that are read, but they were not given batches."""

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return torch.stack([self.two(self.one(image)).mean((1, 2)) for image in x])

    made_for = {"in_chans": 3, "img_size": 12}
    models = types.SimpleNamespace(create_model=lambda name: Alone(), defaults=lambda name: made_for)
    monkeypatch.setitem(sys.modules, "glocal.models", models)
    assert explore(tmp_path, "alone")[0] == 2
    assert "nothing to show: one was called with (3, 12, 12), which is no batch (and 1 more)" in one_line(capsys)


@pytest.mark.parametrize("model", ["RUN", "--lesson"])
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("file/page.html", "file is a file; name another place"),
        ("file/new/page.html", "file is a file; name another place"),
        ("folder", "folder is a folder; name a file in it, such as"),
        ("locked/new/page.html", "locked may not be changed; name another place"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_it_is_computed(
    run, tmp_path, capsys, monkeypatch, model, out, words
):
    (tmp_path / "file").write_text("")
    for folder in ("folder", "locked"):
        (tmp_path / folder).mkdir()
    real = os.access  # permissions bind no root
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("locked") and real(path, mode))
    for name in ("_page", "_lesson"):
        monkeypatch.setattr(f"glocal.cli.explore.{name}", lambda *_: pytest.fail("computed"))
    assert cli.main(["explore", str(run) if model == "RUN" else model, "--out", str(tmp_path / out)]) == 2
    assert words in one_line(capsys)


def test_a_page_is_written_over_an_older_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("glocal.cli.explore._lesson", lambda: "newer")
    for out in ("page.html", "page.html", "new/one/page.html"):
        assert cli.main(["explore", "--lesson", "--out", out]) == 0
        assert (tmp_path / out).read_text() == "newer"


def test_the_lesson_needs_no_model(tmp_path, monkeypatch):
    lesson = types.SimpleNamespace(lesson_page=lambda: "<p>taught")
    monkeypatch.setitem(sys.modules, "glocal.report.lesson", lesson)
    assert explore(tmp_path, "--lesson") == (0, "<p>taught")


# planted by scripts/mutate
FAULTS = {
    ("cli/explore.py", "test_cli_explore.py"): (
        (
            "images are shown as they come, not one a class",
            "first = list({label: labels.index(label) for label in labels}.values())[:_SHOWN]",
            "first = list(range(_SHOWN))",
        ),
        (
            "pixels are not normalised",
            "x = normaliser(loaded.mean, loaded.deviation, device)(pixels).to(dtype)",
            "x = pixels.to(dtype)",
        ),
        (
            "random weights are not mentioned",
            "notes = [_RANDOM] if random and command.weights is None else []",
            "notes = []",
        ),
        (
            "weights from a file count as random",
            "[_RANDOM] if random and command.weights is None",
            "[_RANDOM] if random",
        ),
        ("a file of weights is not read", "        start_from(model, command.weights)\n", "        pass\n"),
        (
            "all layers are shown",
            "return [call for call in seen if any(",
            "return [call for call in seen if True or any(",
        ),
        ("a folder is taken for a file", "    if out.is_dir():", "    if False:"),
        ("a file is taken for a folder", "    if not above.is_dir():", "    if False:"),
        ("a locked folder is not noticed", "if not os.access(above, os.W_OK | os.X_OK):", "if False:"),
        ("only the folder just above is looked at", "out.absolute().parents if folder.exists()", "[out.parent]"),
        ("a page that cannot be written is computed first", "        _check_out(command.out)\n", ""),
        ("a model without attention is left to others", "    if not seen.calls:\n", "    if False:\n"),
        ("epochs are left out", 'epochs=_epochs(folder / "heads.jsonl"),', "epochs=[],"),
        ("arguments in a model's name make it a path", 'r"\\w+(\\(.*\\))?", name)', 'r"\\w+", name)'),
        ("the type is not heeded", "model = loaded.model.to(dtype).eval()", "model = loaded.model.eval()"),
    ),
}
