"""The command that turns convolutions into attention, and back."""

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from glocal.cli.parsing import UserError, parse, said_in_one_line

if TYPE_CHECKING:
    from pathlib import Path

    from glocal.cli.commands import ConvertCommand
    from glocal.inference import Trained


def convert_command(name: str, arguments: Sequence[str]) -> int:
    """`glocal convert`."""
    from glocal.cli.commands import ConvertCommand

    command = parse(ConvertCommand, name, arguments)
    if command is None:
        return 0
    from dataclasses import asdict, replace

    import torch

    from glocal.checkpoint import check_folder
    from glocal.conversion import compare_conversion, to_attention, to_convolution

    with said_in_one_line(name):
        check_folder(command.out)
        if (command.out / "weights.safetensors").exists():
            raise UserError(f"--out: {str(command.out)!r} holds a network already; name another folder")
        if command.back and (there := _of_the_way_there(command)):
            raise UserError(f"{there[0]}: is of the way there, not of --back, which takes all back; leave it out")
        if command.head_dim is not None and not command.gated:
            raise UserError("--head-dim: no head has a gate; give --gated too, or leave it out")
        if command.head_dim is not None and command.head_dim < 1:
            raise UserError(f"--head-dim: {command.head_dim}; it must be 1 or more")
        if command.alpha is not None and not 0 < command.alpha < math.inf:
            raise UserError(f"--alpha: {command.alpha:g}; it must be above 0")
        network = _network(command)
        config = network.config.model
        if command.back:
            if config.convert is None:
                raise UserError(f"--back: {command.network} holds no converted network")
            config = config.unconverted()
            model = to_convolution(network.model)
            pair = (model, network.model)
        else:
            if config.convert is not None:
                raise UserError(f"{command.network}: is converted already; --back turns it into convolutions")
            config = replace(
                config,
                convert=command.encoding,
                convert_layers=command.layers,
                convert_alpha=command.alpha,
                convert_gated=command.gated,
                convert_head_dim=command.head_dim,
            )
            with torch.random.fork_rng():
                torch.manual_seed(0)  # queries and keys behind gates are random
                model = to_attention(
                    network.model,
                    encoding=command.encoding,
                    alpha=command.alpha,
                    layers=command.layers or "*",
                    gated=command.gated,
                    head_dim=command.head_dim,
                )
            pair = (network.model, model)
        like = next(model.parameters())
        images = torch.randn(2, network.in_chans, *network.img_size, generator=torch.Generator().manual_seed(0))
        report = compare_conversion(*pair, images.to(like))
        weights = command.out / "weights.safetensors"
        run = replace(network.config, model=config, weights=str(weights), new_head=False)
        command.out.mkdir(parents=True, exist_ok=True)
        _save(replace(network, model=model, config=run), command.out)
    if command.json:
        print(json.dumps(asdict(report), indent=1))
        return 0
    print(f"{report}\n\nnetwork: {weights}\ntrain on: glocal train --config {command.out / 'config.yaml'}")
    return 0


def _of_the_way_there(command: "ConvertCommand") -> list[str]:
    """Options given that --back has no use for."""
    given = {
        "--encoding": command.encoding != "quadratic",
        "--alpha": command.alpha is not None,
        "--layers": command.layers is not None,
        "--gated": command.gated,
        "--head-dim": command.head_dim is not None,
    }
    return [option for option, is_given in given.items() if is_given]


def _network(command: "ConvertCommand") -> "Trained":
    from pathlib import Path

    from glocal.inference import load_trained

    if command.network.startswith("timm:"):
        return _of_timm(command.network, command.pretrained)
    if command.pretrained:
        raise UserError("--pretrained: is for 'timm:NAME'; a run has weights of its own")
    return load_trained(Path(command.network))


def _of_timm(name: str, pretrained: bool) -> "Trained":
    """A network of timm's as a run would leave it, for the images and the classes that timm made it for."""
    from glocal.config import ModelConfig, RunConfig
    from glocal.inference import Trained
    from glocal.tasks.classification import build_model

    try:
        import timm
    except ImportError:
        raise UserError(f"{name}: timm is not installed; run: pip install timm") from None
    config, short = ModelConfig(model=name), name.removeprefix("timm:")
    about = timm.get_pretrained_cfg(short, allow_unregistered=True) if timm.is_model(short) else None
    chans, *size = about.input_size if about else (3, 224, 224)
    img_size, count = (size[0], size[1]), (about and about.num_classes) or 1000
    if pretrained and about and about.hf_hub_id:
        _ask_hub(name, about)
    model = build_model(config, in_chans=chans, num_classes=count, img_size=img_size, seed=0)
    if pretrained:
        try:
            model.load_state_dict(timm.create_model(short, pretrained=True).state_dict())
        except Exception as error:  # of the network, the hub or timm
            raise _not_had(name, error) from error
    mean, deviation = (about.mean, about.std) if about else ((0.5,) * chans, (0.5,) * chans)
    levels = [[255.0 * value for value in values] for values in (mean, deviation)]  # of grey, 0 to 255
    return Trained(model.eval(), RunConfig(model=config), tuple(map(str, range(count))), chans, img_size, *levels)


def _ask_hub(name: str, about: Any) -> None:
    """Refuses at once where there is no way to timm's weights; they may be on this machine already."""
    from glocal.models.pretrained import FILES, ask_hub

    try:
        ask_hub(about.hf_hub_id, about.hf_hub_filename or FILES[0], *FILES)
    except ImportError:
        return  # timm knows other ways, or says so
    except Exception as error:
        raise _not_had(name, error) from error


def _not_had(name: str, error: Exception) -> UserError:
    from glocal.models.pretrained import first_line

    return UserError(f"--pretrained: timm's weights of {name} cannot be had: {first_line(error)}")


def _save(network: "Trained", out: "Path") -> None:
    """What `load_trained` reads, and a configuration to train on with."""
    import yaml

    from glocal.checkpoint import save_weights, write_text
    from glocal.plain import to_plain

    about = {
        "config": to_plain(network.config),
        "classes": list(network.classes),
        "in_chans": network.in_chans,
        "img_size": list(network.img_size),
        "mean": network.mean,
        "deviation": network.deviation,
    }
    save_weights(out / "weights.safetensors", network.model.state_dict(), about)
    write_text(out / "config.yaml", yaml.safe_dump(to_plain(network.config), sort_keys=False))
