"""`glocal explore`: a page of what every layer and head of a model reads."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glocal.cli.parsing import UserError, parse, said_in_one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from glocal.cli.commands import ExploreCommand
    from glocal.data import ImageData
    from glocal.inspection import Inspection

_SHOWN = 5  # images where none are named
_PHOTO = 3 * 100 * 100  # values of an image from which on a page keeps it as JPEG
_RANDOM = "Its weights are random: nothing here was learned."


@dataclass(frozen=True)
class _Loaded:
    """A model with what is needed to show it images.

    Args:
        mean, deviation: of every channel, in grey levels 0 to 255.
        classes: name of every score, if that is known.
        notes: sentences for the page.
        epochs: where its heads were after each epoch.
        data: what it was trained on, (config, source); None if that is unknown.
    """

    model: "nn.Module"
    title: str
    in_chans: int
    img_size: tuple[int, int]
    mean: list[float]
    deviation: list[float]
    classes: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    run: Any = None


def explore_command(name: str, arguments: Sequence[str]) -> int:
    """`glocal explore`."""
    from glocal.cli.commands import ExploreCommand

    command = parse(ExploreCommand, name, arguments)
    if command is None:
        return 0
    from glocal.checkpoint import write_text

    with said_in_one_line(name):
        _check_out(command.out)
        if not 0 <= command.seed < 2**63:
            raise UserError(f"--seed: {command.seed}; it must be 0 or more and below 2**63")
        if command.lesson and command.model is not None:
            raise UserError(f"--lesson is a page without a model; leave out {command.model}, or --lesson")
        page, said = (_lesson(), "") if command.lesson else _page(command)
        command.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(command.out, page)
    print(f"{said}page: {command.out} ({len(page) / 1e6:.1f} MB)")
    return 0


def _check_out(out: Path) -> None:
    """Refuses what cannot be written before anything is computed."""
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder; name a file in it, such as {out / 'explore.html'}")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"--out: {out} cannot be written, {above} is a file; name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"--out: {out} cannot be written, {above} may not be changed; name another place")


def _lesson() -> str:
    from glocal.report.lesson import lesson_page

    return lesson_page()


def _page(command: "ExploreCommand") -> tuple[str, str]:
    """The page, and what to print of it."""
    import torch

    from glocal.analysis.maps import maps
    from glocal.inspection import inspect
    from glocal.report.explorer import explorer
    from glocal.tasks.classification import normaliser

    loaded = _load(command)
    names, pixels = _images(command, loaded)
    dtype, device = getattr(torch, command.dtype), next(loaded.model.parameters()).device
    model = loaded.model.to(dtype).eval()
    x = normaliser(loaded.mean, loaded.deviation, device)(pixels).to(dtype)
    with torch.no_grad(), inspect(model, convolutions=True) as seen:
        output = model(x)
    scores = getattr(output, "logits", output)
    calls = _chosen(seen, command.layers)
    layers, refused = maps(calls)
    notes = [f"{', '.join(p.replace('`', '') for p in loaded.notes)}"] if loaded.notes else []
    page = explorer(
        loaded.title,
        _pictures(names, pixels, scores if isinstance(scores, torch.Tensor) else None, loaded.classes),
        layers,
        notes=notes,
        refused={**seen.refused, **refused},
        epochs=loaded.epochs,
    )
    worst = max(layers, key=lambda layer: layer.error)
    said = [f"{len(layers)} layers on {len(names)} images; rebuilt within {worst.error:.1e} ({worst.name})"]
    said += [f"not shown: {each}: {why}" for each, why in {**seen.refused, **refused}.items()]
    return page, "\n".join(said) + "\n"


def _chosen(seen: "Inspection", patterns: Sequence[str]) -> list[Any]:
    if not seen.calls and seen.refused:
        (name, why), *others = seen.refused.items()
        more = f" (and {len(others)} more)" if others else ""
        raise UserError(f"nothing to show: {name} {why}{more}")
    if not seen.calls:
        raise UserError(
            "nothing to show: the model has no token mixer of this library, no attention of timm, torchvision or "
            "transformers that it reads, and no convolution that reads beyond its token; "
            "give a model that has, such as timm:vit_tiny_patch16_224"
        )
    if not patterns:
        return list(seen)
    names = list(dict.fromkeys(call.name for call in seen))
    for pattern in patterns:
        if not any(fnmatchcase(each, pattern) for each in names):
            raise UserError(f"--layers: {pattern!r} is the name of none; there are {', '.join(names)}")
    return [call for call in seen if any(fnmatchcase(call.name, pattern) for pattern in patterns)]


# Models.


def _load(command: "ExploreCommand") -> _Loaded:
    name = command.model
    if name is None:
        raise UserError("name a model: the folder of a run, a model's name, 'timm:NAME' or 'hf:FOLDER'; or --lesson")
    kind, _, rest = name.partition(":")
    if kind == "timm":
        return _of_timm(command, rest)
    if kind == "hf":
        return _of_transformers(command, Path(rest))
    path = Path(name)
    if path.exists() or not re.fullmatch(r"\w+(\(.*\))?", name):  # a model's name may bring arguments
        if command.weights is not None:
            raise UserError(f"--weights: {name} has weights of its own; leave it out")
        return _of_run(path)
    return _of_ours(command, name)


def _of_run(path: Path) -> _Loaded:
    from glocal.inference import load_trained

    trained = load_trained(path)
    folder = path if path.is_dir() else path.parent
    return _Loaded(
        trained.model,
        f"{trained.config.model.name} ({folder.name})",
        trained.in_chans,
        trained.img_size,
        trained.mean,
        trained.deviation,
        trained.classes,
        epochs=_epochs(folder / "heads.jsonl"),
        run=trained.config,
    )


def _epochs(path: Path) -> list[dict[str, Any]]:
    """Where heads were after each epoch: a line of JSON each."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            epoch = json.loads(line)
            found.append({"epoch": int(epoch["epoch"]), "layers": dict(epoch["layers"])})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: no record of an epoch ({error}); remove the file") from error
    return found


def _of_ours(command: "ExploreCommand", name: str) -> _Loaded:
    import torch

    from glocal.arguments import per_axis
    from glocal.models import create_model, defaults
    from glocal.spec import name_and_literals

    with torch.random.fork_rng():
        torch.manual_seed(command.seed)
        model = create_model(name)
    base, own = name_and_literals(name)
    made_for = {**defaults(base), **own}
    height, width = per_axis("img_size", made_for["img_size"], 2)
    return _with_weights(command, model, name, made_for["in_chans"], (height, width))


def _of_timm(command: "ExploreCommand", name: str) -> _Loaded:
    try:
        import timm
    except ImportError:
        raise UserError(f"timm:{name}: timm is not installed; run: pip install timm") from None
    from glocal.config import ModelConfig
    from glocal.tasks.classification import build_model

    about = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    in_chans, *size = getattr(about, "input_size", (3, 224, 224))
    classes = getattr(about, "num_classes", 1000) or 1000
    model = build_model(
        ModelConfig(model=f"timm:{name}"),
        in_chans=in_chans,
        num_classes=classes,
        img_size=(size[0], size[1]),
        seed=command.seed,
    )
    mean, deviation = (getattr(about, part, (0.5,) * in_chans) for part in ("mean", "std"))
    return _with_weights(command, model, f"timm:{name}", in_chans, (size[0], size[1]), mean, deviation)


def _of_transformers(command: "ExploreCommand", folder: Path) -> _Loaded:
    if not (folder / "config.json").is_file():
        raise UserError(f"hf:{folder}: no config.json there; give a folder that save_pretrained wrote")
    try:
        transformers = import_module("transformers")  # needed here only
    except ImportError:
        raise UserError(f"hf:{folder}: transformers is not installed; run: pip install transformers") from None
    import torch

    of = transformers.AutoModelForImageClassification
    own = next(folder.glob("*.safetensors"), None)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(command.seed)
            if own is None:
                model = of.from_config(transformers.AutoConfig.from_pretrained(folder, local_files_only=True))
            else:
                model = of.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"hf:{folder}: cannot be built: {error}") from error
    config, size = model.config, model.config.image_size
    size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    preprocessor, mean, deviation = folder / "preprocessor_config.json", (0.5,) * 3, (0.5,) * 3
    if preprocessor.exists():
        about = json.loads(preprocessor.read_text("utf-8"))
        mean, deviation = about.get("image_mean", mean), about.get("image_std", deviation)
    classes = tuple(config.id2label[i] for i in range(len(config.id2label)))
    loaded = _with_weights(
        command, model, f"hf:{folder.name}", config.num_channels, size, mean, deviation, random=own is None
    )
    return _Loaded(**{**vars(loaded), "classes": () if loaded.notes else classes})


def _with_weights(
    command: "ExploreCommand",
    model: "nn.Module",
    title: str,
    in_chans: int,
    img_size: tuple[int, int],
    mean: Sequence[float] | None = None,
    deviation: Sequence[float] | None = None,
    random: bool = True,
) -> _Loaded:
    """A model by name: with the weights of a file, or with those it has, which may be random."""
    from glocal.tasks.classification import start_from

    if command.weights is not None:
        start_from(model, command.weights)
    mean, deviation = mean or (0.5,) * in_chans, deviation or (0.5,) * in_chans
    notes = [_RANDOM] if random and command.weights is None else []
    levels = [[255 * v for v in values] for values in (mean[:in_chans], deviation[:in_chans])]
    return _Loaded(model, title, in_chans, img_size, levels[0], levels[1], notes=notes)


# Images.


def _images(command: "ExploreCommand", loaded: _Loaded) -> tuple[list[str], "Tensor"]:
    """Names, and uint8 [B, C, H, W] as the model takes them."""
    import numpy as np
    import torch

    from glocal.data.decoding import read_image
    from glocal.inference import image_files

    if not command.images:
        return _own_images(loaded)
    files = image_files(command.images)
    mode = "L" if loaded.in_chans == 1 else "RGB"
    pixels = np.stack([np.array(read_image(file, mode, loaded.img_size)) for file in files])
    images = torch.from_numpy(pixels).reshape(len(files), *loaded.img_size, loaded.in_chans).movedim(-1, 1)
    return [file.name for file in files], images


def _own_images(loaded: _Loaded) -> tuple[list[str], "Tensor"]:
    """Test images of as many classes as there are, at most `_SHOWN`."""
    from glocal.data import load
    from glocal.data.splits import as_form
    from glocal.runs import images_of

    try:
        data: ImageData = load("digits" if loaded.run is None else loaded.run.data.source)
    except ValueError as error:
        raise UserError(f"the run's own images are not there ({error}); name others with --images") from error
    data = data if loaded.run is None else images_of(loaded.run, data)
    labels = data.test_labels.tolist()
    first = list({label: labels.index(label) for label in labels}.values())[:_SHOWN]
    data = as_form(data, loaded.in_chans, loaded.img_size)
    return [f"test image {i} ({data.classes[labels[i]]})" for i in first], data.test_images[first]


def _pictures(names: Sequence[str], pixels: "Tensor", scores: "Tensor | None", classes: Sequence[str]) -> list[Any]:
    import io

    from PIL import Image

    from glocal.report.explorer import Picture

    found = []
    for i, (name, image) in enumerate(zip(names, pixels, strict=True)):
        file, array = io.BytesIO(), image.movedim(0, -1).numpy()
        drawn = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        drawn.save(file, "png" if array.size < _PHOTO else "jpeg", quality=92)
        note = ""
        if scores is not None and scores.dim() == 2 and len(classes) == scores.shape[1]:
            probability, best = scores[i].float().softmax(-1).max(-1)
            note = f"seen as {classes[int(best)]} ({100 * probability:.0f} %)"
        found.append(Picture(name, file.getvalue(), note))
    return found
