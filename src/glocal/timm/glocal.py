"""What timm knows of our models. timm lists models under the last part of their module's name, hence this file's."""

from collections.abc import Callable
from typing import Any

from timm.models import generate_default_cfgs, is_model, register_model, resolve_pretrained_cfg
from torch import nn

from glocal.arguments import per_axis
from glocal.models import create_model, defaults, list_models
from glocal.models.classifier import Classifier


def _cfg(name: str) -> dict[str, Any]:
    """What a published model takes and gives, as timm writes it down; images below 224 pixels are not cropped."""
    own = defaults(name)
    size = per_axis("img_size", own["img_size"], 2)
    return {
        "input_size": (own["in_chans"], *size),
        "num_classes": own["num_classes"],
        "crop_pct": 0.875 if min(size) >= 224 else 1.0,
    }


def _entry(name: str) -> Callable[..., nn.Module]:
    """What timm calls to build a model."""

    def entry(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,  # of what timm itself downloads
        **arguments: Any,
    ) -> nn.Module:
        cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
        where = (cfg.file or cfg.hf_hub_id) if pretrained else None
        if pretrained and not where:
            raise RuntimeError(
                f"{name}: no weights are known by its name; give pretrained_cfg_overlay={{'file': PATH}} or "
                "{'hf_hub_id': 'owner/name'}, or pretrained=False"
            )
        if arguments.get("drop_rate") == 0 and "drop_rate" not in defaults(name):
            del arguments["drop_rate"]  # timm's training script always gives it
        model: Any
        classes = arguments.get("num_classes", cfg.num_classes)
        if where and classes != cfg.num_classes and not arguments.get("features_only"):  # timm's way to fine-tune
            model = create_model(name, where, **{**arguments, "num_classes": cfg.num_classes})
            model.reset_classifier(classes)
        else:
            model = create_model(name, where, **arguments)
        described = cfg.to_dict()
        if isinstance(model, Classifier):
            described["classifier"] = model.classifiers if len(model.classifiers) > 1 else model.classifiers[0]
        model.pretrained_cfg = model.default_cfg = described
        return model

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = __name__
    entry.__doc__ = f"glocal.create_model({name!r}, ...), as timm calls it."
    return entry


ADDED = tuple(name for name in list_models() if not is_model(name))
default_cfgs = generate_default_cfgs({name: _cfg(name) for name in ADDED})  # where timm looks for them
for _name in ADDED:
    globals()[_name] = register_model(_entry(_name))
