"""The documents say what is true: commands are what CI runs, Python works, the tree is the disk, links lead."""

import doctest
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch

import glocal
from glocal import contract, mixers

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")


def blocks(language, text=README):
    """The contents of every fenced block of `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


# --- commands -----------------------------------------------------------------------------------------------------


def test_ci_runs_the_commands_of_the_readme():
    install_and_compare, install_and_test = blocks("sh")
    shown = subprocess.run([ROOT / ".ci" / "run", "--show"], capture_output=True, text=True, check=True).stdout
    assert shown.split("\n---\n") == [
        install_and_compare.rstrip("\n") + " --seeds 1 --epochs 1",
        install_and_test.rstrip("\n"),
        "scripts/check\n",
    ]


def test_both_languages_say_the_same():
    for language in ("sh", "pycon"):
        assert blocks(language) == blocks(language, CHINESE)
    trees = [listed(blocks("text", text)[0]) for text in (README, CHINESE)]
    assert list(trees[0]) == list(trees[1]) and all(trees[1].values())
    for pattern in (r"`[^`\n]+`", r"docs/[\w.-]+", r"^## ", r"^\| `\w+`"):
        found = [set(re.findall(pattern, text, flags=re.MULTILINE)) for text in (README, CHINESE)]
        assert {re.sub(r"FOLDER|文件夹", "F", each) for each in found[0]} == {
            re.sub(r"FOLDER|文件夹", "F", each) for each in found[1]
        }
    assert CHINESE.count("\n## ") == README.count("\n## ")


def test_commands_start_from_a_fresh_clone():
    for block in blocks("sh"):
        first = block.split()[0]
        assert first == "scripts/install"
    for word in re.findall(r"scripts/[\w-]+", README):
        assert (ROOT / word).is_file(), f"README.md names {word}, which does not exist"


# --- Python -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", ["README.md", "docs/positions.md"])
def test_python_gives_the_stated_output(document):
    sessions, names = blocks("pycon", (ROOT / document).read_text(encoding="utf-8")), {}
    assert sessions
    for number, session in enumerate(sessions):
        test = doctest.DocTestParser().get_doctest(session, names, f"{document}, block {number}", document, 0)
        said = []
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append, clear_globs=False)
        assert not said, "".join(said)
        names = test.globs if document != "README.md" else {}  # there each block stands for itself


def test_operators_of_the_table_exist():
    [table] = re.findall(r"^\| operator .*?\n\n", README, flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) <= set(glocal.available())


def test_shapes_in_the_idea_are_what_the_code_stores():
    idea = (ROOT / "docs" / "idea.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.+?)` \| (\(.+?\)) \|", idea, flags=re.MULTILINE)
    assert rows
    x = torch.randn(2, 8, 8, 16)
    stored = [(spec, str(tuple(glocal.build(spec, 16).weights(x).weights.shape))) for spec, _ in rows]
    assert rows == stored


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The operator that CONTRIBUTING.md writes, as if it stood in glocal.mixers; gives its test's names."""
    operator, _, test = blocks("python", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    (tmp_path / "shift.py").write_text(operator)
    spec = importlib.util.spec_from_file_location("shift", tmp_path / "shift.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(mixers, "Shift", module.Shift, raising=False)
    names = {"source": operator}
    exec(compile(test, "CONTRIBUTING.md", "exec"), names)
    return names


def test_the_example_operator_keeps_the_contract(example):
    outcomes = [contract.run(s, check, grid) for s in mixers.Shift.examples for check, grid in contract.cases(s)]
    assert not [outcome for outcome in outcomes if outcome.state == "broken"]
    assert len([outcome for outcome in outcomes if outcome.state == "kept"]) > 100


def test_the_example_operator_is_its_oracle(example):
    x = torch.randn(2, 5, 4, 8)
    assert torch.equal(glocal.build("Shift(step=2)", 8)(x), example["by_loop"](2)(x))


def test_the_faults_of_the_example_are_found(example):
    x = torch.randn(2, 5, 4, 8)
    expected = example["by_loop"](2)(x)
    for breaks, old, new in example["FAULTS"]:
        assert example["source"].count(old) == 1, breaks
        wrong = {}
        exec(compile(example["source"].replace(old, new), "CONTRIBUTING.md", "exec"), wrong)
        mixer = wrong["Shift"](8, step=2)
        found = [path(x) for path in (mixer, mixer.reference)]
        assert any(each.shape != expected.shape or not torch.equal(each, expected) for each in found), breaks


# --- tree ---------------------------------------------------------------------------------------------------------


def listed(tree):
    """{path: description} of an indented tree. `a/b/` stands for the folder b in a."""
    entries, parents = {}, []
    for line in tree.splitlines():
        name, _, description = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        path = "".join(parents[:depth]) + name
        entries[path.rstrip("/")] = description.strip()
        parents[depth:] = [name]
    return entries


def on_disk(root):
    """Every file that belongs to the project, as paths from `root`."""
    command = ["git", "-C", root, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        paths = [Path(name) for name in names if name]
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository: an unpacked archive
        paths = [path.relative_to(root) for path in root.rglob("*")]
        made = re.compile(r"\.(?!ci|gitignore)|__pycache__|build$|dist$|glocal-compare$|.*\.egg-info$")
        paths = [path for path in paths if not any(made.match(part) for part in path.parts)]
    return {path for path in paths if (root / path).is_file()}


def differences(entries, files):
    """A sentence for everything that the tree lists and the disk lacks, or the other way round.

    A folder without entries below it stands for all that it holds; any other must list everything.
    """
    everything = {Path(*file.parts[: n + 1]) for file in files for n in range(len(file.parts))}
    named = {Path(path) for path in entries}
    named |= {parent for path in named for parent in path.parents} - {Path()}
    open_folders = {path.parent for path in named}
    missing = {path for path in everything if path.parent in open_folders} - named
    return [f"the tree lacks {path}" for path in sorted(missing)] + [
        f"the tree lists {path}, which does not exist" for path in sorted(named - everything)
    ]


def test_tree_is_the_disk():
    [tree] = blocks("text")
    entries = listed(tree)
    assert not differences(entries, on_disk(ROOT))
    assert not [path for path, description in entries.items() if not description], "an entry says nothing"
    assert not [path for path in entries if (ROOT / path).is_dir() and f"{path.split('/')[-1]}/" not in tree]
    package = {f"src/glocal/{path.name}" for path in (ROOT / "src" / "glocal").glob("*.py")}
    assert package <= set(entries)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["a", "b/c", "d/e/f", "d/e/g/h"], []),
        (["a", "b/c", "d/e/f", "d/e/g/h", "new"], ["the tree lacks new"]),
        (["a", "b/c", "d/e/f", "d/e/g/h", "d/e/new"], ["the tree lacks d/e/new"]),
        (["a", "b/c", "d/e/f", "d/e/g/h", "d/new"], ["the tree lacks d/new"]),
        (["a", "b/c", "d/e/f"], ["the tree lists d/e/g, which does not exist"]),
    ],
)
def test_a_wrong_tree_is_found(files, found):
    entries = listed("a     one\nb/    two\nd/e/  three\n  f   four\n  g/  five\n")
    assert differences(entries, {Path(file) for file in files}) == found


# --- links and versions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [target.split("#")[0] for target in targets if not target.startswith(("http:", "https:", "#"))]
    assert not [target for target in local if not (document.parent / target).exists()]


def test_change_log_knows_this_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert glocal.__version__ in headings[:2]
