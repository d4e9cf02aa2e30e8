"""What a run is made of, as plain data: what the command line fills in, what results keep, what decides whether a
finished run may be used again."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ModelConfig:
    """A network.

    Args:
        layout: One entry a stage, joined by "-": C (MBConv), T (attention) or an operator's spec.
        dims: Width of every stage; None chooses by the number of stages.
        depths: Blocks in every stage; None chooses by the number of stages.
    """

    layout: str = "C-C-T-T"
    dims: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TrainConfig:
    """A recipe.

    Args:
        epochs: Passes over the training images.
        batch_size: Images a step.
        lr: Peak learning rate of AdamW, reached after the warm-up.
        weight_decay: On parameters with two axes or more; the others have none.
        warmup: Share of all steps in which the learning rate rises from 0; it falls along a cosine after that.
        label_smoothing: Probability mass moved from the right class to all of them.
        max_grad_norm: Gradients longer than this are shortened to it.
        crop_padding: Largest random shift of a training image, in pixels; 0 for none.
        flip: Whether training images are mirrored at random.
    """

    epochs: int = 3
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    label_smoothing: float = 0.1
    max_grad_norm: float = 1.0
    crop_padding: int = 0
    flip: bool = False


@dataclass(frozen=True)
class RunConfig:
    """One training run: the same configuration on the same machine and versions gives the same result.

    Args:
        data: A probe's name or a folder, as the user gave it.
        model: The network.
        train: The recipe.
        seed: Of the initial weights, the order of images and the augmentation.
    """

    data: str = "recall"
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0


@dataclass(frozen=True)
class CompareConfig:
    """Trains several layouts on the same data, several times each, and says how they compare."""

    data: str = "recall"
    """The probe `recall` (generated), or a folder: MNIST-like idx files, or class folders of images with or
    without `train` and `test` above them."""

    layouts: tuple[str, ...] = ("C-C-C-C", "C-C-T-T", "T-T-T-T")
    """Networks to compare. One entry a stage: C (convolution, MBConv), T (attention over the whole image), or an
    operator such as 'NeighborhoodAttention(kernel_size=5)'."""

    seeds: int = 3
    """How often to train each layout: with the seeds 0, 1, ..."""

    epochs: int | None = None
    """Passes over the training images; by default as many as the probe needs, and 3 for a folder."""

    out: Path = Path("glocal-compare")
    """Folder for report.html and results.json. Runs that are finished there are not repeated."""
