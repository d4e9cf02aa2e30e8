"""Modules of other libraries, seen as token mixers: ours, on their parameters, at the level where places are known.

Nothing is imported here: a model's classes say where they come from.
"""

from collections.abc import Iterator

from torch import nn

from glocal.adapters.foreign import Foreign as Foreign
from glocal.adapters.foreign import NotSeen as NotSeen


def foreign(model: nn.Module, *, convolutions: bool = False) -> Iterator[tuple[str, Foreign | NotSeen]]:
    """What a model holds of timm, torchvision and transformers: by name, how to see it, or why it cannot be seen; with
    convolutions those of torch too."""
    libraries = {type(module).__module__.partition(".")[0] for module in model.modules()}
    if "timm" in libraries:
        from glocal.adapters import timm

        yield from timm.found(model)
    if "torchvision" in libraries:
        from glocal.adapters import torchvision

        yield from torchvision.found(model)
    if "transformers" in libraries:
        from glocal.adapters import transformers

        yield from transformers.found(model)
    if convolutions:
        from glocal.adapters import convolution

        yield from convolution.found(model)
