"""What a comparison compares: networks of ours, operators and models of others, and what they cost."""

import pytest

from glocal.candidates import Networks
from glocal.compare import Study, compare
from glocal.config import ModelConfig
from glocal.data import load

from .small_study import config, folders, row

pytestmark = pytest.mark.usefixtures("in_process")

OPERATOR = """
import torch
from torch import nn

class Mean(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(x.mean((1, 2), keepdim=True).expand_as(x))

class Tiny(nn.Module):
    def __init__(self, in_chans, num_classes, width=4):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, width, 3)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))
"""


def test_operators_and_models_of_others_stand_beside_ours(folder):
    (folder / "my-ops").mkdir()
    file = folder / "my-ops" / "own.py"
    file.write_text(OPERATOR)
    asked = config(
        folder,
        layouts=("C-C-T-T",),
        mixers=(f"{file}:Mean", "WindowAttention(window_size=2)"),
        models=(f"{file}:Tiny(width=8)", "timm:resnet10t", "all_attention_quadratic(dim=8, depth=1, num_heads=2)"),
        seeds=(2,),
    )
    results = compare(asked, quiet=True)
    names = [c["name"] for c in results["candidates"]]
    assert names == [
        "C-C-T-T",
        f"{file}:Mean in C-C-T-T",
        "WindowAttention(window_size=2) in C-C-T-T",
        f"{file}:Tiny(width=8)",
        "timm:resnet10t",
        "all_attention_quadratic(dim=8, depth=1, num_heads=2)",
    ]
    assert [c["resized"] for c in results["candidates"]] == [True, True, True, False, False, False]
    tiny = row(results, f"{file}:Tiny(width=8)")
    assert tiny["params"] == 9 * 8 + 8 + 8 * 3 + 3 and tiny["macs"] == 6 * 6 * 8 * 9 + 8 * 3
    assert not results["verdicts"][0]["equal_budget"]
    assert "differ in size" in results["verdicts"][0]["sentence"]

    study = Study(asked, {asked.data[0]: load(asked.data[0])})
    before = folders(study)
    file.write_text(OPERATOR.replace("mean((1, 2)", "amax((1, 2)"))
    after = folders(Study(asked, {asked.data[0]: load(asked.data[0])}))
    changed = [one != other for one, other in zip(before, after, strict=True)]
    assert changed == [False, True, False, True, False, False] * 2  # those of the file that changed


def test_the_budget_may_be_parameters(folder):
    results = compare(config(folder, budget="params", layouts=("C-C-C-C", "T-T-T-T"), seeds=(1,)), quiet=True)
    target = results["budget"]["targets"][str(folder / "data")]
    assert all(abs(c["params"] / target - 1) < 0.02 for c in results["candidates"])
    assert results["budget"]["of"] == "params"


def test_a_repeated_comparison_counts_nothing_again(folder, monkeypatch):
    first = compare(config(folder), quiet=True)
    monkeypatch.setattr("glocal.candidates.cost.macs", None)
    assert compare(config(folder), quiet=True) == first


def test_networks_of_a_users_file_are_counted_again(folder):
    """It may have changed since."""
    file, data = folder / "own.py", load(str(folder / "data"))
    config = ModelConfig(model=f"{file}:Tiny()")
    found = []
    for text in (OPERATOR, OPERATOR.replace("width=4", "width=8")):
        file.write_text(text)
        networks = Networks(folder / "networks.json")
        found.append(networks.made_for(config, data, resized=False).params)
        networks.keep()
    assert found == [9 * width + width + 3 * width + 3 for width in (4, 8)]


# planted by scripts/mutate
FAULTS = {
    "candidates.py": (
        (
            "a model of others counts as resized",
            "ModelConfig(model=entry.model), data, resized=False",
            "ModelConfig(model=entry.model), data, resized=True",
        ),
        ("networks are counted again at every start", "        if key not in self._known:\n", "        if True:\n"),
        (
            "what a user's file costs is remembered",
            'for key, value in self._known.items() if ".py" not in key',
            "for key, value in self._known.items()",
        ),
    ),
    "compare.py": (
        (
            "a user's file does not count in a run's name",
            "key.update(Path(found[1]).expanduser().read_bytes())",
            "pass",
        ),
    ),
    "summary.py": (
        ("a network of others is within the budget", "equal = all(row.resized for row in rows)", "equal = True"),
    ),
}
