"""Image classification: the network of a configuration, the loss, and predictions. B images, C channels, H W pixels."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.backbone import Backbone
from glocal.checkpoint import CheckpointError, load_weights
from glocal.config import ModelConfig, TrainConfig
from glocal.conversion import to_attention
from glocal.models import create_model, list_models
from glocal.spec import build, nearest

_BATCH = 256  # images; large enough to be quick, small enough for any memory
Normalise = Callable[[Tensor], Tensor]


def build_model(
    config: ModelConfig, *, in_chans: int, num_classes: int, img_size: tuple[int, int], seed: int | None = None
) -> nn.Module:
    """The network of a configuration: [B, in_chans, H, W] -> scores [B, num_classes].

    Args:
        config: A layout, or a whole model by name. Ours are given in_chans, num_classes and img_size, a user's class
            as far as its constructor has them, timm's always the first two.
        in_chans: Channels of an image.
        num_classes: Number of classes.
        img_size: Height and width.
        seed: Of the initial weights; PyTorch's random state is left as it was. None draws from that state.

    Raises:
        ValueError: The configuration names something unknown, or cannot be built for these images, or what it builds
            does not give such scores for them.
    """
    if seed is not None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build_model(config, in_chans=in_chans, num_classes=num_classes, img_size=img_size)
    if config.convert is not None:
        plain = config.unconverted()
        model = build_model(plain, in_chans=in_chans, num_classes=num_classes, img_size=img_size)
        return to_attention(
            model,
            encoding=config.convert,
            layers=config.convert_layers or "*",
            alpha=config.convert_alpha,
            gated=config.convert_gated,
            head_dim=config.convert_head_dim,
        )
    made_for: dict[str, Any] = {"in_chans": in_chans, "num_classes": num_classes, "img_size": img_size}
    if config.model is None:
        return Backbone(
            config.layout,
            **made_for,
            dims=config.dims,
            depths=config.depths,
            mlp_ratio=config.mlp_ratio,
            drop_path=config.drop_path,
            layer_scale=config.layer_scale,
            skip=config.skip,
            mlp=config.mlp,
            positions=config.positions,
        )
    kind, _, name = config.model.partition(":")
    if kind == "timm":
        model = _of_timm(name, made_for)
    elif ".py:" in config.model:
        model = build(config.model, **made_for)
    else:
        model = _of_ours(config.model, made_for)
    _try(model, config.name, (in_chans, *img_size), num_classes)
    return model


def _try(model: nn.Module, name: str, shape: tuple[int, ...], num_classes: int) -> None:
    """Gives a network that is no layout of ours one image, so that what does not fit is said before training."""
    training = {module: module.training for module in model.modules()}
    image = torch.zeros(1, *shape)
    try:
        with torch.random.fork_rng(), torch.no_grad():  # no inference mode: lazy layers make their parameters now
            scores = model.eval()(image)
    except Exception as error:  # whatever somebody else's code raises
        raise ValueError(f"{name}: cannot run on images {tuple(image.shape)}: {_first_line(error)}") from error
    finally:
        for module, before in training.items():
            module.training = before
    if not isinstance(scores, Tensor) or scores.shape != (1, num_classes):
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"{name}: gives {found} for one image; it must give scores (1, {num_classes})")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _of_ours(text: str, made_for: dict[str, Any]) -> nn.Module:
    name = text.partition("(")[0].strip()
    if name not in list_models():
        other = "or write 'timm:NAME' or 'path/to/file.py:Class(...)'"
        raise ValueError(f"model: {name!r} is none; {nearest(name, list_models())}; {other}")
    return create_model(text, **made_for)


def _of_timm(name: str, made_for: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ValueError(f"timm:{name}: timm is not installed; run: pip install timm") from None
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean 'timm:{near[0]}'?" if near else "timm.list_models() lists all names"
        raise ValueError(f"timm:{name}: timm has no such model; {hint}")
    try:
        try:
            return timm.create_model(name, pretrained=False, **made_for)
        except TypeError:  # made for any size
            del made_for["img_size"]
            return timm.create_model(name, pretrained=False, **made_for)
    except Exception as error:  # timm's families each have their own
        raise ValueError(f"timm:{name}: cannot be built for these images: {_first_line(error)}") from error


def start_from(model: nn.Module, path: Path, *, new_head: bool = False) -> None:
    """Gives `model` the weights of a file; a head of another size, or with `new_head` any, stays as it is.

    Raises:
        CheckpointError: The weights are not those of such a network; the message names the first that differs.
    """
    weights = load_weights(path)
    own = model.state_dict()
    head = _head(model)
    unknown = [name for name in weights if name not in own]
    missing = [name for name in own if name not in weights]
    unlike = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    wrong = [name for name in [*missing, *unknown, *unlike] if not name.startswith(head)]
    if wrong:
        name = wrong[0]
        if name in unlike:
            what = f"{name} has shape {tuple(weights[name].shape)}, this network's {tuple(own[name].shape)}"
        else:
            what = f"{name} is {'missing' if name in missing else 'not one of this network'}"
        raise CheckpointError(f"{path}: weights of another network: {what} ({len(wrong)} such names)")
    left = {*unlike, *(name for name in weights if new_head and name.startswith(head))}
    fitting = {name: value for name, value in weights.items() if name in own and name not in left}
    model.load_state_dict(fitting, strict=False)


def _head(model: nn.Module) -> str:
    """Prefix of the last linear map's names: in our networks head.fc, in others what timm calls the classifier."""
    about: Any = getattr(model, "default_cfg", None) or {}
    if isinstance(about.get("classifier"), str):
        return about["classifier"] + "."
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return f"{linear[-1]}." if linear else "head."


class Criterion:
    """The training loss of a batch, with the mixing of images that a recipe asks for.

    Args:
        recipe: Label smoothing, mixup and cutmix (torchvision's; a batch has one of them), class balance.
        labels: int64 [N] of all training images, for the balance: an image counts N / (classes * images of its class).
        num_classes: Number of classes.
        device: Where scores are.

    Source: Zhang et al., "mixup", ICLR 2018, arXiv 1710.09412; Yun et al., "CutMix", ICCV 2019, arXiv 1905.04899.
    """

    def __init__(self, recipe: TrainConfig, labels: Tensor, num_classes: int, device: torch.device):
        self._smoothing = recipe.label_smoothing
        self._mixers: list[Any] = []
        if recipe.mixup or recipe.cutmix:
            from torchvision.transforms import v2

            if recipe.mixup:
                self._mixers.append(v2.MixUp(alpha=recipe.mixup, num_classes=num_classes))
            if recipe.cutmix:
                self._mixers.append(v2.CutMix(alpha=recipe.cutmix, num_classes=num_classes))
        self._weight = None
        if recipe.class_balanced:
            counts = torch.bincount(labels, minlength=num_classes)
            self._weight = (len(labels) / (num_classes * counts.clamp(min=1))).float().to(device)

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Float images and labels int64 [B], mixed to soft labels [B, classes] if the recipe says so."""
        if not self._mixers:
            return images, labels
        return self._mixers[int(torch.randint(len(self._mixers), ()))](images, labels)

    def __call__(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of scores [B, classes]; with class balance weighted by what every image counts."""
        if self._weight is None:
            return F.cross_entropy(scores.float(), labels, label_smoothing=self._smoothing)
        # Not PyTorch's `weight`: that scales the smoothed classes, so that rare ones would be the target of all images.
        losses = F.cross_entropy(scores.float(), labels, label_smoothing=self._smoothing, reduction="none")
        counts = labels @ self._weight if labels.is_floating_point() else self._weight[labels]
        return (counts * losses).sum() / counts.sum()


@dataclass(frozen=True)
class Predictions:
    """What a network says of images, in their order.

    Args:
        predicted: Class with the highest score, int64 [N].
        loss: Cross-entropy of the true class, float32 [N].
    """

    predicted: Tensor
    loss: Tensor


def predict(model: nn.Module, images: Tensor, labels: Tensor, normalise: Normalise) -> Predictions:
    """Predictions for uint8 images [N, C, H, W] with labels int64 [N], in evaluation mode."""
    model.eval()
    predicted, losses = [], []
    with torch.inference_mode():
        for batch, answers in zip(images.split(_BATCH), labels.split(_BATCH), strict=True):
            scores = model(normalise(batch)).float()
            predicted.append(scores.argmax(1))
            losses.append(F.cross_entropy(scores, answers.to(scores.device), reduction="none"))
    return Predictions(torch.cat(predicted).cpu(), torch.cat(losses).cpu())


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Percent of labels that were predicted."""
    return 100 * (predicted == labels).sum().item() / len(labels)


def normaliser(mean: list[float], deviation: list[float], device: torch.device) -> Normalise:
    """uint8 [B, C, H, W] to float, less `mean` and over `deviation` in every channel."""
    shift, scale = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, deviation))
    return lambda images: (images.to(device).float() - shift) / scale
