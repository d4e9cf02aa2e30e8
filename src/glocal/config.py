"""What runs and studies are made of, as plain data: what the command line fills in, what a run's folder keeps as
config.yaml, what decides whether a finished run may be used again."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

Precision = Literal["no", "bf16", "fp16"]


def _hold(config: Any, names: Sequence[str], holds: Callable[[Any], bool], words: str) -> None:
    """Refuses what makes no sense, wherever it comes from: the command line, a file or a program."""
    for name in names:
        if not holds(value := getattr(config, name)):
            raise ValueError(f"{name}: {value}; it must be {words}")


@dataclass(frozen=True)
class DataConfig:
    """Images, and which of them are used for what."""

    source: Annotated[str, tyro.conf.arg(name="data")] = "recall"
    """A probe (`recall`, `texture`), `digits`, or a folder: MNIST-like idx files, or class folders of images with or
    without `train` and `test` above them."""

    fraction: float = 1.0
    """Share of the training images to train on, the same of every class."""

    folds: int = 0
    """Parts for cross-validation over all images; 0 keeps the split that the data brings."""

    fold: int = 0
    """Which of these parts is the test."""

    validation: bool = False
    """Test on validation images instead: the data's own, or a tenth of the training images."""

    in_chans: int | None = None
    """Channels of an image, if not the data's own: 3 repeats grey."""

    img_size: tuple[int, int] | None = None
    """Height and width to resize to, if not the data's own."""

    def __post_init__(self) -> None:
        _hold(self, ("fraction",), lambda share: 0 < share <= 1, "above 0 and at most 1")
        _hold(self, ("folds",), lambda folds: folds == 0 or folds >= 2, "at least 2, or 0 for one split")
        _hold(self, ("fold",), lambda fold: 0 <= fold < max(1, self.folds), "0 or more and below the number of folds")
        _hold(self, ("in_chans",), lambda chans: chans in (None, 1, 3), "1 (grey) or 3 (colour)")
        _hold(self, ("img_size",), lambda size: size is None or min(size) >= 1, "two whole numbers, 1 or more")


@dataclass(frozen=True)
class ModelConfig:
    """A network."""

    layout: str = "C-C-T-T"
    """One entry a stage: C (convolution, MBConv), T (attention over the whole image), or an operator such as
    'NeighborhoodAttention(kernel_size=5)'."""

    model: str | None = None
    """A whole network instead of a layout: a name of ours, with arguments or without, such as
    'all_attention_quadratic(dim=64, depth=3)'; 'timm:NAME'; or 'path/to/file.py:Class(...)'."""

    dims: tuple[int, ...] | None = None
    """Width of every stage."""

    depths: tuple[int, ...] | None = None
    """Blocks in every stage."""

    mlp_ratio: float = 4
    """Hidden width over width, in the MLPs and in MBConv."""

    drop_path: float = 0
    """Probability that the last block is skipped for an image in training; rises from 0 over the blocks."""

    layer_scale: float | None = None
    """First value of a learned scale on every branch; none by default."""

    skip: bool = True
    """Whether blocks have their skip path."""

    mlp: bool = True
    """Whether blocks around an operator have their MLP."""

    positions: bool = True
    """Whether operators know relative positions."""

    convert: Literal["quadratic", "learned"] | None = None
    """Turn convolutions into attention that computes the same and learns on: heads with centres and spreads
    (quadratic), or with tables of scores (learned)."""

    convert_layers: tuple[str, ...] | None = None
    """Names of the convolutions to turn into attention, or patterns such as 'stages.0.*'; by default all."""

    convert_alpha: float | None = None
    """How sharp these heads are; by default so that rounding is all that changes. 1 to 4 lets them move."""

    convert_gated: bool = False
    """Give every such head a gate, shut at first, through which it can learn to attend by content."""

    convert_head_dim: int | None = None
    """Channels of the queries and keys behind these gates, for each head; 32 by default."""

    def __post_init__(self) -> None:
        if self.convert is None:
            options = ("convert_layers", "convert_alpha", "convert_gated", "convert_head_dim")
            for unused in (name for name in options if getattr(self, name) not in (None, False)):
                raise ValueError(f"{unused}: nothing is converted; give convert too, or leave it out")
        if self.convert_head_dim is not None and not self.convert_gated:
            raise ValueError("convert_head_dim: no head has a gate; give convert_gated too, or leave it out")
        _hold(self, ("convert_head_dim",), lambda dim: dim is None or dim >= 1, "1 or more")
        _hold(self, ("convert_alpha",), lambda alpha: alpha is None or 0 < alpha < math.inf, "above 0")
        if self.model is not None:
            own = (f for f in dataclasses.fields(self) if f.name != "model" and not f.name.startswith("convert"))
            for unused in (f.name for f in own if getattr(self, f.name) != f.default):
                raise ValueError(f"{unused}: {self.model!r} is a whole network, which has none; leave it out")
        _hold(self, ("mlp_ratio",), lambda ratio: 0 < ratio < math.inf, "above 0")
        _hold(self, ("drop_path",), lambda share: 0 <= share < 1, "0 or more and below 1")
        _hold(self, ("dims", "depths"), lambda sizes: sizes is None or min(sizes, default=0) >= 1, "1 or more each")

    @property
    def name(self) -> str:
        """What tables call it."""
        name = self.model or self.layout
        return name if self.convert is None else f"{name} as {'gated ' if self.convert_gated else ''}attention"

    def unconverted(self) -> "ModelConfig":
        """Of the network before its convolutions are turned into attention."""
        own = {f.name: f.default for f in dataclasses.fields(self) if f.name.startswith("convert")}
        return dataclasses.replace(self, **own)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TrainConfig:
    """A recipe."""

    epochs: int = 3
    """Passes over the training images."""

    batch_size: int = 64
    """Images a step."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum 0.9."""

    lr: float = 2e-3
    """Peak learning rate, reached after the warm-up."""

    weight_decay: float = 0.05
    """On parameters with two axes or more; the others have none."""

    warmup: float = 0.1
    """Share of all steps in which the learning rate rises from 0; it falls along a cosine after that."""

    label_smoothing: float = 0.1
    """Probability mass moved from the right class to all of them."""

    max_grad_norm: float = 1.0
    """Gradients longer than this are shortened to it; 0 for no limit."""

    crop_padding: int = 0
    """Largest random shift of a training image, in pixels."""

    flip: bool = False
    """Whether training images are mirrored at random."""

    randaugment: int = 0
    """RandAugment's operations on every training image; 0 for none."""

    mixup: float = 0
    """Alpha of mixup; 0 for none. With cutmix, every batch has one of the two."""

    cutmix: float = 0
    """Alpha of cutmix; 0 for none."""

    class_balanced: bool = False
    """Whether every class counts the same in the loss, however many images it has."""

    ema: float = 0
    """Decay of an average of the weights, which is then tested and kept; 0 for none."""

    precision: Precision = "no"
    """Mixed precision: no (float32), bf16, or fp16 (on a GPU)."""

    def __post_init__(self) -> None:
        _hold(self, ("epochs", "batch_size"), lambda count: count >= 1, "at least 1")
        _hold(self, ("lr",), lambda value: 0 < value < math.inf, "above 0")
        not_negative = ("weight_decay", "max_grad_norm", "crop_padding", "randaugment", "mixup", "cutmix")
        _hold(self, not_negative, lambda value: 0 <= value < math.inf, "0 or more")
        _hold(self, ("warmup",), lambda share: 0 <= share <= 1, "from 0 to 1")
        _hold(self, ("label_smoothing", "ema"), lambda share: 0 <= share < 1, "0 or more and below 1")


@dataclass(frozen=True)
class RunConfig:
    """Trains one network: the same configuration on the same machine and versions gives the same weights."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    seed: int = 0
    """Of the initial weights, the order of images and the augmentation."""

    weights: str | None = None
    """A file of weights to start from; a head of another size is made anew."""

    new_head: bool = False
    """Whether the head is made anew even where that of `weights` would fit."""

    def __post_init__(self) -> None:
        _hold(self, ("seed",), lambda seed: 0 <= seed < 2**63, "0 or more and below 2**63")


@dataclass(frozen=True)
class RecallCommand:
    """Trains small networks to answer a question from another token of a sequence, and shows accuracy by distance."""

    mixers: tuple[str, ...] = (
        "DepthwiseConv(kernel_size=15, rank=1)",
        "DynamicConv(kernel_size=15, num_heads=4, rank=1)",
        "LSTM(bidirectional=True)",
        "MultiScaleAttention(num_heads=4, rank=1)",
        "SelfAttention(num_heads=4)",
    )
    """Operators for sequences, one network for each."""

    length: int = 48
    """Tokens of a sequence."""

    steps: int = 1500
    """Training steps of 128 sequences."""

    seeds: int = 3
    """How often to train each: with the seeds 0, 1, ..."""

    out: Path = Path("glocal-recall")
    """Folder for report.html, results.json and the runs. Runs that are finished there are not repeated."""


@dataclass(frozen=True)
class CompareConfig:
    """Trains several networks on the same data, several times each, and says how they compare."""

    data: tuple[str, ...] = ("recall", "texture")
    """What to train on: the probes `recall` and `texture` (generated), `digits`, or folders: MNIST-like idx files, or
    class folders of images with or without `train` and `test` above them."""

    layouts: tuple[str, ...] = ()
    """Networks to compare. One entry a stage: C (convolution, MBConv), T (attention over the whole image), or an
    operator such as 'NeighborhoodAttention(kernel_size=5)'. By default C-C-C-C to T-T-T-T."""

    mixers: tuple[str, ...] = ()
    """Operators to compare: each in turn stands for T in the layouts (in C-C-T-T, if none are named)."""

    models: tuple[str, ...] = ()
    """Whole networks beside them: a name of ours, with arguments or without, such as
    'all_attention_quadratic(dim=64, depth=3)'; 'timm:NAME'; or 'path/to/file.py:Class(...)', built with num_classes,
    in_chans and img_size as far as it takes them. They keep their size."""

    seeds: tuple[int, ...] = (3,)
    """How often to train each: with the seeds 0, 1, ...; one number, or one for each of the data fractions."""

    epochs: int | None = None
    """Passes over the training images; by default as many as a probe needs, 6 for images, 20 for digits. With a share
    f of the images, 1 / sqrt(f) times as many."""

    budget: Literal["macs", "params"] = "macs"
    """What is made equal, within 2 %, by the widths: multiply-adds or parameters. The measure is C-C-T-T."""

    widths: tuple[float, ...] = (1.0,)
    """Repeats the study with networks this many times as wide."""

    data_fractions: tuple[float, ...] = (1.0,)
    """Repeats the study with these shares of the training images."""

    folds: int = 0
    """Cross-validation: every seed trains this often, so that each image is tested once; 0 for one split."""

    tune: Literal["lr"] | None = None
    """lr: the same three learning rates for each, chosen on validation images."""

    then: str | None = None
    """Data to train every finished network on afterwards, with a new head."""

    ablate: tuple[Literal["skip", "mlp", "positions"], ...] = ()
    """Repeats every layout without these."""

    precision: Precision = "no"
    """Mixed precision of all runs: no (float32), bf16, or fp16 (on a GPU)."""

    out: Path = Path("glocal-compare")
    """Folder for report.html, results.json and the runs. Runs that are finished there are not repeated."""
