"""Published architectures by name: `create_model("all_attention_quadratic")`, `list_models("all*")`.

Every family is a file with a table `MODELS`: a name and what builds it, a class with some of its arguments filled in.
What the name leaves open can be given beside it, as keywords or in its text, "all_attention_quadratic(depth=3)".
"""

import fnmatch
import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from torch import nn

from glocal.arguments import flag
from glocal.models import all_attention, coatnet, coatnet_rw, dwnet, focal, lesa, resnet, swin, vit, volo
from glocal.models.classifier import Classifier, FeatureMaps
from glocal.spec import name_and_literals, nearest

_MODELS: dict[str, Callable[..., Classifier]] = {
    **all_attention.MODELS,
    **coatnet.MODELS,
    **coatnet_rw.MODELS,
    **dwnet.MODELS,
    **focal.MODELS,
    **lesa.MODELS,
    **resnet.MODELS,
    **swin.MODELS,
    **vit.MODELS,
    **volo.MODELS,
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` knows and the pattern fits, in order: `list_models("all_attention*")`."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def defaults(name: str) -> dict[str, Any]:
    """Arguments of a model, and their values where none are given.

    Raises:
        ValueError: an unknown name; the nearest is named.
    """
    if name not in _MODELS:
        raise ValueError(f"model: unknown name {name!r}; {nearest(name, _MODELS)}")
    found = inspect.signature(_MODELS[name]).parameters.values()
    return {p.name: p.default for p in found if p.kind is not p.POSITIONAL_ONLY}


def create_model(
    name: str,
    pretrained: str | Path | Literal[False] | None = None,
    *,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **arguments: Any,
) -> nn.Module:
    """Builds a published architecture: images [B, in_chans, H, W] -> scores [B, num_classes].

    Args:
        name: one of `list_models()`, alone or with arguments in text: "all_attention_quadratic(dim=64, depth=3)",
            where values are literals. What stands there counts more than a keyword.
        pretrained: weights to load, all of them: a file (safetensors; .pth and the like, of which only tensors are
            read), a folder that holds one, or the id "owner/name" of a model on the Hugging Face hub, which is then
            downloaded. Names as here, as in the official release or, of families it has, as in timm,
            torchvision or transformers. None or, as in timm, False: random weights.
        features_only: maps of stages instead of scores, a list of [B, C, h, w]; `feature_info` of what is returned
            says which channels and strides they have.
        out_indices: which stages, with features_only: a number of last ones, positions (-1 is the last), None for all.
        **arguments: as the family's class has them: num_classes, in_chans, img_size, drop_path_rate and its own.

    Raises:
        ValueError: an unknown name or argument (the nearest is named), values that the model refuses, or weights that
            cannot be read or belong to another network.
    """
    name, own = name_and_literals(name)
    arguments = {**arguments, **own}
    valid = defaults(name)
    for key in arguments:
        if key not in valid:
            raise ValueError(f"{name}: has no argument {key!r}; {nearest(key, valid)}")
    try:
        model = _MODELS[name](**arguments)
    except TypeError as error:
        raise ValueError(f"{name}: cannot be built: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if pretrained is not None and pretrained is not False:
        import_module("glocal.models.pretrained").load(model, pretrained)
    if flag("features_only", features_only):
        return FeatureMaps(model, out_indices)
    if out_indices is not None:
        raise ValueError(f"{name}: out_indices is {out_indices}, and scores are of no stage; give features_only=True")
    return model
