"""`glocal recall`: small networks, asked by distance."""

import dataclasses
import json

import pytest
import torch

from glocal import recall
from glocal.cli import main
from glocal.config import RecallCommand
from glocal.data.recall_sequences import VOCABULARY
from glocal.report.distances import bucketed, distances_report

NEAR = "DepthwiseConv(kernel_size=3, rank=1)"
FAR = "SelfAttention(num_heads=4)"


def run(mixer, length=12, steps=20, seed=0):
    return recall.Run(mixer, seed, length, steps, "test")


@pytest.mark.parametrize(
    ("mixer", "reach"),
    [(NEAR, 2), ("DepthwiseConv(kernel_size=5, rank=1)", 4), (FAR, 11), ("AveragePooling(kernel_size=1, rank=1)", 0)],
)
def test_reach_is_that_of_two_layers(mixer, reach):
    torch.manual_seed(0)
    assert recall.reach_of(recall.SequenceNetwork(mixer), 12) == reach


def test_scores_are_those_of_the_question():
    torch.manual_seed(0)
    network = recall.SequenceNetwork(NEAR).eval()
    tokens = torch.randint(VOCABULARY, (3, 12))
    question = torch.tensor([0, 6, 11])
    scores = network(tokens, question)
    changed = tokens.clone()
    for row, place in enumerate(question):
        changed[row, (place + 6) % 12] = (changed[row, (place + 6) % 12] + 1) % VOCABULARY  # out of reach
    assert torch.equal(network(changed, question), scores)
    changed[torch.arange(3), question] = (tokens[torch.arange(3), question] + 1) % VOCABULARY
    assert (network(changed, question) != scores).any(1).all()


def test_same_run_same_result():
    first, again, other = (recall.train(run(NEAR, seed=seed)) for seed in (0, 0, 1))
    assert first.right == again.right != other.right
    assert first.tested == other.tested  # the same test for all
    assert sum(first.tested) == recall.TESTED and len(first.tested) == 11


def test_attention_learns_it_and_nothing_is_learned_beyond_a_convolution_s_reach():
    found = recall.train(run(FAR, steps=250))
    assert sum(found.right) > 0.6 * sum(found.tested)
    found = recall.train(run(NEAR, steps=250))
    near, far = (sum(found.right[part]) / sum(found.tested[part]) for part in (slice(2), slice(2, None)))
    assert near > 0.17
    assert far == pytest.approx(1 / 8, abs=0.02)


@pytest.fixture
def command(tmp_path):
    return RecallCommand(mixers=(NEAR, FAR), length=8, steps=10, seeds=1, out=tmp_path / "out")


def test_finished_runs_are_not_repeated(command, monkeypatch):
    first = recall.recall_by_distance(command, quiet=True)
    files = sorted((command.out / "runs").glob("*.json"))
    assert len(files) == 2
    asked = []

    def train_all(left, *others):
        asked.append([each.mixer for each in left])
        for each in left:
            others[1][each] = recall.Found([1] * 7, [2] * 7, 7, 1, 0.0)

    monkeypatch.setattr(recall, "_train_all", train_all)
    assert recall.recall_by_distance(command, quiet=True) == first and asked == []
    broken = next(file for file in files if NEAR in file.read_text())
    broken.write_text(broken.read_text()[:-9])  # as a full disk would leave it
    recall.recall_by_distance(command, quiet=True)
    recall.recall_by_distance(dataclasses.replace(command, steps=11), quiet=True)
    assert asked == [[NEAR], [NEAR, FAR]]
    whole = next(file for file in files if FAR in file.read_text())
    own = recall.Run(**json.loads(whole.read_text())["run"])
    assert recall._finished(whole, own)
    assert recall._finished(whole, dataclasses.replace(own, seed=5)) is None  # a file of another run


def test_results_and_report_say_the_same(command):
    results = recall.recall_by_distance(command, quiet=True)
    assert json.loads((command.out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert [each["mixer"] for each in results["operators"]] == [NEAR, FAR]
    assert [each["reach"] for each in results["operators"]] == [2, 7]
    page = (command.out / "report.html").read_text()
    for each in results["operators"]:
        share = 100 * each["right"][0][0] / each["tested"][0]
        assert f"<td>{share:.1f}</td>" in page


def test_report():
    assert [len(bucket) for bucket in bucketed(48)] == [6] * 7 + [5]
    assert [d for bucket in bucketed(9) for d in bucket] == list(range(1, 9))
    operators = [
        {"mixer": "A<b>(x=1)", "right": [[4, 0, 0], [2, 1, 0]], "tested": [4, 2, 2], "reach": 1, "params": 12345},
        {"mixer": "B", "right": [[4, 2, 2], [4, 2, 2]], "tested": [4, 2, 2], "reach": 3, "params": 10},
        {"mixer": "C", "right": [[1, 0, 1], [1, 0, 1]], "tested": [4, 2, 2], "reach": 0, "params": 10},
    ]
    page = distances_report(
        {"length": 4, "steps": 7, "seeds": 2, "chance": 12.5, "operators": operators, "kind": "recall"}
    )
    for sentence in (
        "A&lt;b&gt;(x=1): its output depends on tokens up to 1 away; it answers 75.0 % of the questions within, 12.5 %",
        "B: its output depends on tokens at any distance; it answers 100.0 % of the questions (a guess gives 12.5 %).",
        "C: its output depends on no other token; it answers 25.0 % of the questions (a guess gives 12.5 %).",
    ):
        assert sentence in page
    assert "tokens between" not in page  # there is none between neighbours, whose distance is 1
    assert "<b>(x" not in page and "http" not in page and "12,345" in page
    assert "<td>75.0</td><td>25.0</td><td>0.0</td><td>1</td>" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mixers", "Depthwise"], "did you mean 'DepthwiseConv'"),
        (["--mixers", "DepthwiseConv()"], "an operator for images; build it with rank=1"),
        (["--mixers", "SelfAttention", "SelfAttention"], "named twice"),
        (["--mixers"], "none given"),
        (["--steps", "3"], "--steps: 3; it must be at least 10"),
        (["--length", "4"], "--length: 4; it must be at least 8"),
        (["--seeds", "0"], "--seeds: 0"),
    ],
)
def test_mistakes_are_said_in_one_line(capsys, tmp_path, arguments, words):
    assert main(["recall", *arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_others_wrote_is_not_overwritten(capsys, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    assert main(["recall", "--out", str(tmp_path)]) == 2
    assert "is not a result of glocal recall" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["recall", "--out", str(tmp_path / "file")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


# planted by scripts/mutate
FAULTS = {
    "recall.py": (
        (
            "scores are read at the first token",
            "mixed[torch.arange(len(mixed), device=mixed.device), question]",
            "mixed[:, 0]",
        ),
        ("every seed has its own test", ".manual_seed(TEST_SEED)", ".manual_seed(run.seed)"),
        ("weights are not seeded", "    torch.manual_seed(run.seed)\n", ""),
        ("distances begin at zero", "bincount(minlength=run.length)[1:]", "bincount(minlength=run.length)[:-1]"),
        ("a broken file ends the command", "except (OSError, ValueError, KeyError", "except (OSError, KeyError"),
        (
            "runs of another length are taken over",
            'return result if kept.get("run") == asdict(run) else None',
            "return result",
        ),
    ),
    "report/distances.py": (
        (
            "seeds are not averaged over all that were tested",
            "/ max(tested, 1) for right",
            "/ max(len(bucket), 1) for right",
        ),
        ("the last distance is left out", "range(1, length, size)]", "range(1, length - 1, size)]"),
        ("within reach ends one early", 'range(1, operator["reach"] + 1)', 'range(1, operator["reach"])'),
        ("an operator without a neighbour reads those nearby", "if not within:", "if not beyond:"),
        ("a place between is counted", '"distance from the question', '"tokens between the question'),
    ),
}
