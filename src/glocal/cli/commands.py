"""What the commands take that are no study: their options, as the command line fills them in."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from glocal.config import RunConfig


@dataclass(frozen=True)
class TrainCommand:
    """Trains one network and keeps all of it in a folder."""

    run: RunConfig = field(default_factory=RunConfig)

    config: Path | None = None
    """A YAML file with any of these options, such as the config.yaml of another run; what stands on the command line
    counts more."""

    out: Path = Path("glocal-run")
    """Folder for the run: config.yaml, metrics.jsonl, TensorBoard's files, checkpoints, weights.safetensors; and
    heads.jsonl, the centres and spreads of quadratic attentions after every epoch, if there are any."""

    resume: bool = False
    """Go on with the run in this folder, exactly as if it had not been interrupted."""


@dataclass(frozen=True)
class EvaluateCommand:
    """Tests a trained network."""

    run: tyro.conf.Positional[Path]
    """The folder of a run, or its weights.safetensors."""

    data: str | None = None
    """Images to test on: their test split. By default what the run was trained on."""

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class PredictCommand:
    """Says what a trained network sees in images."""

    run: tyro.conf.Positional[Path]
    """The folder of a run, or its weights.safetensors."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, or folders of them."""

    json: bool = False
    """Print JSON, with the probability of every class."""


@dataclass(frozen=True)
class ConvertCommand:
    """Turns the convolutions of a network into attention that computes the same, or such attention back, and says for
    each layer what it became. What is written is a run to evaluate and predict with, and to train on:
    `glocal train --config OUT/config.yaml`."""

    network: tyro.conf.Positional[str]
    """The folder of a run, its weights.safetensors, or 'timm:NAME'."""

    out: Path = Path("glocal-converted")
    """Folder for weights.safetensors and config.yaml."""

    encoding: Literal["quadratic", "learned"] = "quadratic"
    """Heads with a centre and a spread (quadratic), or with tables of scores (learned)."""

    alpha: float | None = None
    """How sharp heads are; by default so that rounding is all that changes. 1 to 4 lets them move in training."""

    layers: tuple[str, ...] | None = None
    """Names of the convolutions to convert, or patterns such as 'layer1.*'; by default all."""

    gated: bool = False
    """Give every head a gate, shut at first, through which it can learn to attend by content."""

    head_dim: int | None = None
    """Channels of the queries and keys behind the gates, for each head; 32 by default."""

    back: bool = False
    """The other way: attention whose heads sit on their taps into convolutions."""

    pretrained: bool = False
    """Take timm's trained weights for 'timm:NAME'."""

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class CheckDataCommand:
    """Says what a data set holds, and what is wrong with it."""

    data: tyro.conf.Positional[str]
    """A probe, `digits`, or a folder."""

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class ListCommand:
    """All operators: the weights they store at batch 2 on 8 x 8 tokens, and what is measured of them."""

    json: bool = False
    """Print JSON."""

    html: Path | None = None
    """A file to write: a page with a picture of what each operator connects."""

    graph: Path | None = None
    """A file to write: a page that explains in pictures, in English and Chinese, how operators are related; and two
    more tables, in which operator stands where and what each step between them changes."""


@dataclass(frozen=True)
class CheckOperatorCommand:
    """Runs the contract that every operator keeps on one of them, and says in words what is broken, where, and by
    how much."""

    operator: tyro.conf.Positional[str]
    """Such as 'SelfAttention(num_heads=4)', or 'path/to/file.py:Shift(step=2)' for one of your own."""

    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class ExplainPathCommand:
    """Which path an operator takes, and why not the other."""

    operator: tyro.conf.Positional[str]
    """Such as 'WindowAttention(window_size=7)'."""

    shape: tuple[int, ...] = (1, 56, 56, 64)
    """Of the tokens: batch, lengths of the grid, channels."""

    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Of tokens and parameters."""

    impl: Literal["auto", "fast", "reference"] = "auto"
    """What the operator is asked for."""

    training: bool = False
    """In training instead of evaluation."""


@dataclass(frozen=True)
class ExploreCommand:
    """Writes a page in which one chooses a place of an image and sees what every layer and head of a model reads
    there."""

    model: tyro.conf.Positional[str | None] = None
    """The folder of a run or its weights.safetensors, a published model of this library by name, 'timm:NAME', or
    'hf:FOLDER' with a model of transformers."""

    images: tuple[Path, ...] = ()
    """Image files, or folders of them. By default five test images of the run's own data, or digits."""

    out: Path = Path("glocal-explore.html")
    """The page to write."""

    weights: Path | None = None
    """A file of weights for a model that is given by name; without one they are random, and the page says so."""

    layers: tuple[str, ...] = ()
    """Which layers, by patterns of their names such as 'stages.2.*'; all by default."""

    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """What to compute in."""

    seed: int = 0
    """Of random weights."""

    lesson: bool = False
    """Write a page that needs no model instead: a convolution, and the attention heads that equal it."""
