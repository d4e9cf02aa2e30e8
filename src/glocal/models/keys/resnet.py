"""ResNet's weights as transformers saves them; timm's and torchvision's names are ours."""

from collections.abc import Mapping

from torch import Tensor

from glocal.models.keys import Source, renamed


def _transformers() -> list[tuple[str, str]]:
    """Theirs, ours: there stages and a block's convolutions count from 0."""
    pairs = [("resnet.embedder.embedder.convolution", "conv1"), ("resnet.embedder.embedder.normalization", "bn1")]
    for stage in range(4):
        theirs, ours = f"resnet.encoder.stages.{stage}.layers.{{j}}", f"layer{stage + 1}.{{j}}"
        pairs += [
            (f"{theirs}.shortcut.convolution", f"{ours}.downsample.0"),
            (f"{theirs}.shortcut.normalization", f"{ours}.downsample.1"),
        ]
        for k in range(3):
            pairs += [
                (f"{theirs}.layer.{k}.convolution", f"{ours}.conv{k + 1}"),
                (f"{theirs}.layer.{k}.normalization", f"{ours}.bn{k + 1}"),
            ]
    return [*pairs, ("classifier.1", "fc")]


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `ResNetForImageClassification` under our names.

    Raises:
        ValueError: a name that transformers' network does not have.
    """
    return renamed(state, _transformers())


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of `ResNetForImageClassification`."""
    return renamed(state, [(ours, theirs) for theirs, ours in _transformers()])


SOURCES = {
    "transformers": Source("resnet.embedder.embedder.convolution.weight", from_transformers, to_transformers),
}
