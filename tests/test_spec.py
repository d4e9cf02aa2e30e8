"""Text to operator: canonical forms, nesting, context, files of the user's own, and what bad specs are told."""

import os
import textwrap

import pytest
import torch
from torch import nn

import glocal
from glocal import contract, mixers
from glocal.spec import available, build, in_a_users_file

SHIFT = """
    import torch
    from glocal import Aggregation, TokenMixer
    from glocal.aggregation import grid_positions


    class Left(TokenMixer):
        examples = ("Left()",)

        def __init__(self, dim, *, step=1):
            super().__init__(dim, rank=1)
            self.step = step

        def values(self, source):
            return source.unsqueeze(2)

        def weights(self, x):
            n = x.shape[1]
            index = (torch.arange(n) - self.step).clamp(min=-1).view(1, 1, n, 1)
            places = grid_positions((n,))
            return Aggregation(x.new_ones(1, 1, 1, 1), index, n, places, places, (n,), (n,))


    class Both(torch.nn.Module):
        def __init__(self, dim, *, first, second="GELU"):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            return self.first(x)
"""


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "my_ops.py"
    path.write_text(textwrap.dedent(SHIFT))
    return path


def test_available_names_the_public_classes():
    assert available() == tuple(sorted(n for n, v in vars(mixers).items() if isinstance(v, type)))
    assert {"Convolution", "SelfAttention", "WindowAttention"} <= set(available())
    assert glocal.available() == available()


@pytest.mark.parametrize("spec", contract.examples())
def test_repr_is_canonical(spec):
    mixer = build(spec, 32)
    again = build(repr(mixer), 32)
    assert type(again) is type(mixer)
    assert repr(again) == repr(mixer)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in mixer.state_dict().items()}


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("SelfAttention(head_dim=8)", "SelfAttention(num_heads=4)"),
        ("SelfAttention", "SelfAttention(num_heads=1)"),
        ("SelfAttention(out_dim=32, num_heads=2, causal=False)", "SelfAttention(num_heads=2)"),
        ("DepthwiseConv(bias=False, kernel_size=5)", "DepthwiseConv(kernel_size=5, bias=False)"),
        (" AveragePooling ( kernel_size = (3, 5) ) ", "AveragePooling(kernel_size=(3, 5))"),
        ("DepthwiseConv(kernel_size=(5, 5))", "DepthwiseConv(kernel_size=5)"),
        ("LocalMLP(window_size=[3, 5], num_heads=4)", "LocalMLP(window_size=(3, 5), num_heads=4)"),
    ],
)
def test_one_text_for_one_operator(spec, canonical):
    assert repr(build(spec, 32)) == canonical


def test_a_module_is_returned_as_it_is():
    module = nn.Identity()
    assert build(module, 32) is module


def test_context_fills_only_what_the_spec_leaves_open_and_the_operator_has():
    assert build("DepthwiseConv(kernel_size=3)", 32, rank=1, grid_size=(8,)).rank == 1
    assert build("DepthwiseConv(kernel_size=3, rank=2)", 32, rank=1).rank == 2
    assert build("RelativeAttention(num_heads=4)", 32, grid_size=(6, 5), rank=2).grid_size == (6, 5)
    assert build("SelfAttention(num_heads=4)", 32, head_dim=16).num_heads == 4


def test_a_users_own_file(user_file):
    mixer = build(f"{user_file}:Left(step=2)", 8)
    assert type(mixer).__name__ == "Left"
    assert mixer.step == 2


def test_specs_nest(user_file):
    both = build(f"{user_file}:Both(first=DepthwiseConv(kernel_size=3), second=Left(step=3))", 8)
    assert repr(both.first) == "DepthwiseConv(kernel_size=3)"
    assert both.second.step == 3


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("SelfAtention(num_heads=4)", ["SelfAtention", "did you mean 'SelfAttention'?"]),
        ("selfattention", ["did you mean 'SelfAttention'?"]),
        ("SelfAttention(num_head=4)", ["num_head", "did you mean 'num_heads'?"]),
        ("SelfAttention(4)", ["named", "SelfAttention(argument=value)"]),
        ("SelfAttention(num_heads=4", ["cannot be read"]),
        ("SelfAttention(num_heads=2 + 2)", ["2 + 2"]),
        ("SelfAttention(num_heads=5)", ["SelfAttention", "5", "32"]),
        ("SelfAttention(num_heads='4')", ["SelfAttention", "num_heads", "'4'"]),
        ("NeighborhoodAttention(kernel_size=4)", ["kernel_size", "4", "odd"]),
        ("DepthwiseConv(kernel_size=(3, 3, 3))", ["kernel_size", "3", "rank is 2"]),
        ("DepthwiseConv(kernel_size=0)", ["kernel_size", "0", "positive"]),
        ("DepthwiseConv(rank=3)", ["rank", "3"]),
        ("RelativeAttention(num_heads=4)", ["grid_size"]),
        ("WindowAttention(window_size=4, num_heads=4, shift_size=4)", ["shift_size", "4"]),
        ("NeighborhoodAttention(num_heads=4, border='reflect')", ["border", "reflect", "shifted"]),
        ("InhomogeneousDepthwiseConv(num_groups=5)", ["num_groups", "5", "32"]),
        ("__import__('os').system('true')", ["not an operator"]),
        ("nowhere.py:Left", ["nowhere.py", "no file"]),
        ("", ["cannot be read"]),
        ("SelfAttention(num_heads=4, num_heads=2)", ["num_heads", "twice"]),
        ("NeighborhoodAttention(num_heads=4, border=masked)", ["border", "masked", "quotes"]),
        ("SelfAttention(num_heads=4, causal=true)", ["causal", "true", "True or False"]),
        ("SelfAttention(num_heads=4, causal='False')", ["causal", "'False'", "True or False"]),
        ("SelfAttention(num_heads={[]: 1})", ["no number"]),
        ("SelfAttention(out_dim=0)", ["out_dim", "0", "positive"]),
        ("WindowAttention(num_heads=4, shift_size=1.5)", ["shift_size", "1.5", "whole number"]),
        ("DepthwiseConv(kernel_size=3.0)", ["kernel_size", "3.0", "whole number"]),
        ("RelativeAttention(num_heads=4, grid_size=7)", ["grid_size", "(7, 7)"]),
    ],
)
def test_a_bad_spec_is_told_what_is_wrong(spec, words):
    with pytest.raises(ValueError) as raised:
        build(spec, 32)
    for word in words:
        assert word in str(raised.value)


def test_a_file_without_the_operator(user_file):
    with pytest.raises(ValueError, match="did you mean 'Left'"):
        build(f"{user_file}:Lefft", 8)


def test_of_a_file_its_own_operators_are_named(user_file):
    with pytest.raises(ValueError, match=r"unknown operator 'Zzz'; Valid: Both, Left$"):
        build(f"{user_file}:Zzz", 8)
    with pytest.raises(ValueError, match="did you mean 'SelfAttention'"):
        build(f"{user_file}:Both(first=SelfAtention(num_heads=1))", 8)
    for text in (str(user_file), f"{user_file}:"):
        with pytest.raises(ValueError, match=r"names a file and nothing in it; write it as \S+my_ops\.py:Name\("):
            build(text, 8)


def test_an_abstract_operator_says_what_it_lacks(user_file):
    user_file.write_text(user_file.read_text().replace("def weights", "def wieghts"))
    with pytest.raises(ValueError, match=r"my_ops\.py:Left' cannot be built: .* abstract .*weights"):
        build(f"{user_file}:Left", 8)


@pytest.mark.parametrize("given", [5, None, ["SelfAttention"], torch.nn.Linear])
def test_what_is_no_text_is_refused(given):
    for call in (lambda: build(given, 8), lambda: glocal.create_model(given)):
        with pytest.raises(ValueError, match=r"^spec: .*, must be text such as 'Name\(argument=value, ...\)'$"):
            call()


def test_an_error_is_found_in_a_users_file(user_file):
    user_file.write_text(user_file.read_text().replace("n = x.shape[1]", "n = x.shape[1] / 0"))
    line = user_file.read_text()[: user_file.read_text().index("/ 0")].count("\n") + 1
    with pytest.raises(ZeroDivisionError) as raised:
        build(f"{user_file}:Left", 8)(torch.zeros(1, 4, 8))
    assert in_a_users_file(raised.value) == f"{user_file}, line {line}: ZeroDivisionError: division by zero"
    with pytest.raises(ZeroDivisionError) as raised:
        1 / 0  # noqa: B018
    assert in_a_users_file(raised.value) is None


def test_repr_of_a_users_operator_builds(user_file):
    mixer = build(f"{user_file}:Left(step=2)", 8)
    again = build(repr(mixer), 8)
    assert type(again) is type(mixer)
    assert again.step == 2


def test_a_users_file_that_cannot_be_loaded(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import torch\n1 / 0\n")
    with pytest.raises(ValueError, match=r"broken.py, line 2: ZeroDivisionError"):
        build(f"{path}:Left", 8)
    path.write_bytes(b"a = 1\0\n")
    with pytest.raises(ValueError, match=r"broken.py(, line \d)?: SyntaxError"):
        build(f"{path}:Left", 8)
    path.write_text("def (\n")
    with pytest.raises(ValueError, match=r"broken.py, line 1: SyntaxError"):
        build(f"{path}:Left", 8)


def test_a_changed_file_is_read_again_and_its_imports_are_no_operators(user_file):
    build(f"{user_file}:Left", 8)
    text = user_file.read_text().replace("class Left", "class Right") + "from torch.nn import Linear\n"
    user_file.write_text(text)
    os.utime(user_file, ns=(1, 1))
    with pytest.raises(ValueError, match="unknown operator 'Left'"):
        build(f"{user_file}:Left", 8)
    assert type(build(f"{user_file}:Right", 8)).__name__ == "Right"
    with pytest.raises(ValueError, match="unknown operator 'Linear'"):
        build(f"{user_file}:Linear(out_features=3)", 8)


# planted by scripts/mutate
FAULTS = {
    "spec.py": (
        (
            "the context overrides what the spec gives",
            "arguments[key] = _value(value, text, dim, operators, context)",
            "arguments.setdefault(key, _value(value, text, dim, operators, context))",
        ),
        (
            "a head_dim of the context meets num_heads of the spec",
            'if {"num_heads", "head_dim"} & keywords.keys():',
            "if False:",
        ),
        ("arguments without a name are dropped", "if node.args or any(", "if any("),
        ("of an argument given twice the last one counts", "if twice is not None:", "if False:"),
        (
            "a name without quotes is an unknown operator, whatever the argument",
            "if isinstance(value, ast.Name) and value.id not in operators:",
            "if False:",
        ),
        ("a user's file is read once, however often it changes", "file.stat().st_mtime_ns, path)", "0, path)"),
        ("what a user's file imports are operators of it", " and v.__module__ == name}", "}"),
        (
            "repr of a user's operator does not name its file",
            'operator.defined_in = f"{path}:"',
            'operator.defined_in = ""',
        ),
        (
            "nested specs do not know the operators of the user's file",
            "        return _build(node, text, dim, operators, context)\n    return _literal",
            "        ours = {name: getattr(mixers, name) for name in available()}\n"
            "        return _build(node, text, dim, ours, context)\n    return _literal",
        ),
        ("of a file all operators are named", "if each not in available()]", "]"),
        ("abstract operators of a file are unknown", "if _is_module(n, v) and v.", "if _is_operator(n, v) and v."),
        ("errors of any file are a user's", "if frame.filename in files:", "if frame.filename:"),
        ("the first frame of a file is named", "for frame in reversed(traceback", "for frame in (traceback"),
        ("anything has a name", "if not isinstance(spec, str):", "if False:"),
        ("the nearest name is the first one", "lower[close[0]]", "valid[0]"),
    ),
    "arguments.py": (
        ("the text 'False' counts as true", "    if not isinstance(value, bool):", "    if False:"),
        ("head_dim is taken for the number of heads", "        return dim // size", "        return size"),
        ("even kernels are taken", "if any(size % 2 == 0 for size in sizes):", "if any(size < 1 for size in sizes):"),
    ),
    "operator.py": (
        (
            "repr leaves out what is not the default for a flag",
            "if value != parameter.default and not (",
            "if value != parameter.default and not isinstance(value, bool) and not (",
        ),
        (
            "repr leaves out out_dim",
            '(name in ("out_dim", "source_dim") and value == self.dim)',
            '(name in ("out_dim", "source_dim"))',
        ),
    ),
}
