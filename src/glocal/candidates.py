"""What a comparison compares: every network of the asked layouts, operators and models, made for the data and the
budget."""

import dataclasses
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glocal.analysis import cost
from glocal.backbone import Backbone, parse_layout
from glocal.budget import Of, base_widths, fit, reference
from glocal.checkpoint import write_text
from glocal.config import CompareConfig, ModelConfig
from glocal.data import ImageData
from glocal.tasks.classification import build_model

DEFAULT_LAYOUTS = ("C-C-C-C", "C-C-C-T", "C-C-T-T", "C-T-T-T", "T-T-T-T")
_LAYOUT_OF_MIXERS = "C-C-T-T"
_BASE_DIMS = (64, 64, 128, 128)  # trains on two CPU cores
_BASE_DIMS_OF_PROBES = (32, 32, 64, 64)  # which ask less


@dataclass(frozen=True)
class Entry:
    """A candidate as asked for.

    Args:
        name: What tables call it.
        layout: Of a network of ours; None for a whole model.
        model: A whole model; None for one of ours.
    """

    name: str
    layout: str | None
    model: str | None = None


@dataclass(frozen=True)
class Network:
    """A candidate made for some data.

    Args:
        config: How to build it.
        macs: Multiply-adds of one image.
        params: Trainable parameters.
        ablatable: Which ablations would change anything.
        resized: Whether its size was made to meet the budget.
    """

    config: ModelConfig
    macs: int
    params: int
    ablatable: tuple[str, ...]
    resized: bool


class WidthRefused(ValueError):
    """A network cannot be built with these widths; with others it may."""


def entries(config: CompareConfig) -> list[Entry]:
    """All candidates, in the order of the tables.

    Raises:
        ValueError: A layout cannot be read, a mixer has no T to stand for, or one is named twice.
    """
    layouts = config.layouts or (() if config.mixers or config.models else DEFAULT_LAYOUTS)
    found = [Entry(layout, layout) for layout in layouts]
    hosts = [layout for layout in layouts if "T" in parse_layout(layout)] or [_LAYOUT_OF_MIXERS]
    for mixer in config.mixers:
        for host in hosts:
            stages = [_quoted(mixer if entry == "T" else entry) for entry in parse_layout(host)]
            found.append(Entry(f"{mixer} in {host}", "-".join(stages)))
    found += [Entry(model, None, model) for model in config.models]
    names = [entry.name for entry in found]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is named twice; name every candidate once")
    for entry in found:
        if entry.layout is not None:
            parse_layout(entry.layout)
    return found


def _quoted(entry: str) -> str:
    if ".py:" not in entry or entry[0] in "'\"":
        return entry
    return f'"{entry}"' if "'" in entry else f"'{entry}'"


class Networks:
    """Makes the networks of a comparison.

    What was found out once is kept in a file: counting multiply-adds a dozen times for each network takes seconds.

    Args:
        file: Where it is kept; None keeps nothing.
        code: A name for the code in use; what other code found is not used.
    """

    def __init__(self, file: Path | None = None, code: str = ""):
        self._file, self._code = file, code
        self._known: dict[str, Any] = {}
        with suppress(OSError, ValueError, AttributeError):
            kept = json.loads(file.read_text("utf-8")) if file is not None else {}
            self._known = dict(kept["found"]) if kept.get("code") == code else {}

    def keep(self) -> None:
        """Writes the file; networks of a user's files are left out, as these may change."""
        if self._file is not None:
            found = {key: value for key, value in self._known.items() if ".py" not in key}
            write_text(self._file, json.dumps({"code": self._code, "found": found}, indent=0))

    def network(self, entry: Entry, data: ImageData, *, of: Of, width: float) -> Network:
        """The network of an entry for these images, at the budget.

        The budget is what C-C-T-T costs at the base widths times `width`: it does not depend on the other candidates.

        Raises:
            ValueError: It cannot be built or run for these images, or no width meets the budget.
        """
        if entry.layout is None:
            return self.made_for(ModelConfig(model=entry.model), data, resized=False)
        layout, target = entry.layout, self.budget(data, of=of, width=width)
        dims, mlp_ratio = self._once(
            f"sizes {layout} {target} {of} {_form(data)} {base_dims(data, width)}",
            lambda: self._sizes(layout, target, of, data, base_dims(data, width)),
        )
        return self.made_for(ModelConfig(layout=layout, dims=tuple(dims), mlp_ratio=mlp_ratio), data, resized=True)

    def budget(self, data: ImageData, *, of: Of, width: float) -> int:
        """Multiply-adds or parameters that every network of ours has, within 2 %."""
        base = base_dims(data, width)
        return self._once(f"budget {of} {_form(data)} {base}", lambda: reference(**_form(data), base_dims=base, of=of))

    def ablated(self, whole: Network, without: str, data: ImageData) -> Network:
        """A network without skip paths, MLPs or positions, of the same widths as the whole."""
        changed: dict[str, Any] = {without: False}
        return self.made_for(dataclasses.replace(whole.config, **changed), data, whole.resized)

    def made_for(self, config: ModelConfig, data: ImageData, resized: bool) -> Network:
        """A network of given sizes, measured on these images.

        Raises:
            ValueError: It cannot be built or run for them.
        """
        macs, params, ablatable = self._once(f"measured {config} {_form(data)}", lambda: _measured(config, data))
        return Network(config, macs, params, tuple(ablatable), resized)

    def _sizes(self, layout: str, target: int, of: Of, data: ImageData, base: tuple[int, ...]) -> tuple[Any, float]:
        try:
            fitted = fit(layout, target, of, **_form(data), base_dims=base)
        except Exception:
            with suppress(WidthRefused):  # one that cannot run at all is told of in its own words
                _measured(ModelConfig(layout, dims=base_widths(len(parse_layout(layout)), base)), data)
            raise
        return fitted.dims, fitted.mlp_ratio

    def _once(self, key: str, find: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]


def base_dims(data: ImageData, width: float) -> tuple[int, ...]:
    """Widths of the stages of the network that is the budget, in steps of a head's 32 channels."""
    base = _BASE_DIMS_OF_PROBES if data.kind in ("probe", "digits") else _BASE_DIMS
    return tuple(max(32, round(dim * width / 32) * 32) for dim in base)


def _form(data: ImageData) -> dict[str, Any]:
    """What a network is made for."""
    return {"in_chans": data.in_chans, "num_classes": len(data.classes), "img_size": data.img_size}


def _measured(config: ModelConfig, data: ImageData) -> tuple[int, int, tuple[str, ...]]:
    """Multiply-adds, trainable parameters, what can be ablated; building it once finds mistakes before training."""
    try:
        model = build_model(config, **_form(data), seed=0).eval()
    except ValueError as error:
        raise WidthRefused(str(error)) from error
    image = torch.zeros(1, data.in_chans, *data.img_size)
    try:
        with torch.random.fork_rng(), torch.inference_mode():
            scores = model(image)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
        line = str(error).strip().splitlines()
        raise ValueError(
            f"{config.name}: cannot run on images {tuple(image.shape)}: {line[0] if line else error!r}"
        ) from error
    shape, expected = getattr(scores, "shape", type(scores).__name__), (1, len(data.classes))
    if shape != expected:
        raise ValueError(f"{config.name}: gives {shape} for one image; it must give scores {expected}")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return cost.macs(model, image), trainable, model.ablatable if isinstance(model, Backbone) else ()
