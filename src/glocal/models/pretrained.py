"""Weights of published models from a file, a folder or the hub, under our names, or another library's or release's."""

import re
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from torch import Tensor, nn

from glocal.checkpoint import CheckpointError, load_weights

FILES = ("model.safetensors", "weights.safetensors", "pytorch_model.bin")  # in a folder or a hub's repository
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def load(model: nn.Module, where: str | Path) -> None:
    """Gives a model of `glocal.models` all of its weights.

    Args:
        model: what `create_model` builds, under torch.device("meta") or not; its family's file in `glocal.models.keys`
            knows their names elsewhere.
        where: see `weights_file`.

    Raises:
        CheckpointError: there is no such file, it cannot be read, or it holds the weights of another network; the
            message names the first that differs.
    """
    file = weights_file(where)
    found = load_weights(file)
    if all(name.startswith("module.") for name in found):  # saved from within DataParallel
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    keys = import_module(f"glocal.models.keys.{type(model).__module__.rpartition('.')[2]}")
    source = next((source for source in keys.SOURCES.values() if source.marker in found), None)
    if source is not None:
        try:
            found = source.read(found)
        except ValueError as error:
            raise CheckpointError(f"{file}: weights of another network: {error}") from error
    own = model.state_dict()
    if (wrong := _difference(own, found)) is not None:
        raise CheckpointError(f"{file}: weights of another network: {wrong}")
    # a model without memory, made under torch.device("meta"), takes the tensors themselves
    meta = any(tensor.is_meta for tensor in own.values())
    model.load_state_dict({k: t.to(own[k].dtype) for k, t in found.items()} if meta else found, assign=meta)


def weights_file(where: str | Path) -> Path:
    """The file of weights that a path or a hub's id names; what is not on this machine is downloaded.

    Args:
        where: a file; a folder that holds model.safetensors, weights.safetensors or pytorch_model.bin; or, where no
            such path exists, the id "owner/name" of a model on the Hugging Face hub.

    Raises:
        CheckpointError: none of these.
    """
    if isinstance(where, bool):
        raise CheckpointError(
            f"pretrained: {where}; weights are not downloaded by a model's name: give a file, a folder, or the id "
            "owner/name of a model on the Hugging Face hub"
        )
    path = Path(where)
    if path.is_file():
        return path
    if path.is_dir():
        found = next((path / name for name in FILES if (path / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"pretrained: {path} holds none of {', '.join(FILES)}; name the file")
        return found
    # what ends as a file of weights does is a path with a typing error
    if path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt") or not _HUB_ID.fullmatch(str(where)):
        raise CheckpointError(f"pretrained: no file, folder or hub id {str(where)!r}; a hub id is written owner/name")
    return _from_hub(str(where))


def _from_hub(repo: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        raise CheckpointError(
            f"pretrained: {repo!r} is no path, and huggingface_hub is not installed; run: pip install huggingface-hub"
        ) from None
    for name in FILES:
        try:
            ask_hub(repo, name)
            return Path(hf_hub_download(repo, name))
        except EntryNotFoundError:
            continue
        except Exception as error:  # no network, no such repository, none of ours to read
            raise CheckpointError(f"pretrained: {repo!r} cannot be downloaded: {first_line(error)}") from error
    raise CheckpointError(f"pretrained: {repo!r} on the hub holds none of {', '.join(FILES)}")


def ask_hub(repo: str, *names: str) -> None:
    """Asks the hub once whether it is there, unless one of these files is on this machine.

    A download by the hub's own library asks again and again, for most of a minute.

    Raises:
        Exception: of the network: there is no way to the hub.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if any(isinstance(try_to_load_from_cache(repo, name), str) for name in names):
        return
    with suppress(HfHubHTTPError):  # an answer, too
        get_hf_file_metadata(hf_hub_url(repo, names[0]))


def first_line(error: Exception) -> str:
    """What an error says in one line; its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _difference(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """The first name in which weights differ from a network's, in words."""
    for name in own:
        if name not in found:
            return f"{name} is missing"
        if found[name].shape != own[name].shape:
            return f"{name} has shape {tuple(found[name].shape)}, this network's {tuple(own[name].shape)}"
    return next((f"{name} is not one of this network" for name in found if name not in own), None)
