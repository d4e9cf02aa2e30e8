"""ViT, Swin and their like in transformers: from version 5 on, where attention has q_proj, k_proj, v_proj, o_proj."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from glocal.adapters.foreign import PADS_FIRST, Foreign, Joined, NotSeen, of_windows, on_grid, seen_as
from glocal.mixers import SelfAttention, WindowAttention

_PATCHES = ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding")


def found(model: nn.Module) -> Iterator[tuple[str, Foreign | NotSeen]]:
    """Every attention on the patches of an image."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not type(module).__module__.startswith("transformers.") or not type(module).__name__.endswith("Attention"):
            continue
        out = getattr(module, "o_proj", getattr(module, "out_proj", None))
        if out is None or not all(hasattr(module, f"{part}_proj") for part in "qkv"):
            continue
        if type(module).__name__ == "SwinAttention":
            yield name, seen_as(_of_swin, module, modules[name.rpartition(".")[0]])
            continue
        patches = _patches_of(name, modules)
        if patches is None:
            yield name, NotSeen("no patches of an image are known to be its tokens")
        else:
            yield name, seen_as(_of_attention, module, out, patches)


def _patches_of(name: str, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The convolution that makes the tokens of the innermost model around a module."""
    while name:
        name = name.rpartition(".")[0]
        for patches in _PATCHES:
            if isinstance(found := modules.get(f"{name}.{patches}" if name else patches), nn.Conv2d):
                return found
    return None


def _of_attention(attention: Any, out: Any, patches: nn.Module) -> Foreign | NotSeen:
    parts = [getattr(attention, f"{part}_proj") for part in "qkv"]
    if len({part.out_features for part in parts}) > 1:
        return NotSeen("shares keys and values among heads, which SelfAttention does not")
    heads = getattr(attention, "num_attention_heads", getattr(attention, "num_heads", None))
    if heads is None or out.out_features != out.in_features:
        return NotSeen("does not say how many heads it has, or changes the width")
    mixer = SelfAttention(parts[0].in_features, num_heads=heads, out_dim=out.in_features)  # type: ignore[abstract]
    mixer.qkv = Joined(*parts)  # type: ignore[assignment]
    mixer.proj = out
    return Foreign(mixer, attention, on_grid, lambda given, call: given[0], watched={"grid": patches})


def _of_swin(attention: Any, layer: Any) -> Foreign | NotSeen:
    grid, window = tuple(layer.input_resolution), min(layer.window_size, *layer.input_resolution)
    size = (window, window)
    bias = attention.relative_position_bias
    if tuple(bias.window_size) != size:
        return NotSeen(f"has a table for windows of {bias.window_size} and windows of {size}")
    shift = 0 if min(grid) <= window else layer.shift_size
    mixer = WindowAttention(  # type: ignore[abstract]  # `weights` is its `_weights`
        attention.o_proj.in_features,
        window_size=window,
        num_heads=attention.num_attention_heads,
        shift_size=shift,
        mask_padding=False,
    )
    mixer.qkv = Joined(attention.q_proj, attention.k_proj, attention.v_proj)  # type: ignore[assignment]
    mixer.proj = attention.o_proj
    mixer.relative_position_bias_table = bias.relative_position_bias_table

    def call(windows: Tensor, kept: dict[str, Any]) -> dict[str, Any] | str:
        tokens = kept["tokens"]
        if tokens.shape[1] != grid[0] * grid[1]:
            return f"was called on {tokens.shape[1]} tokens; only the grid that it was built for, {grid}, is known"
        if shift and any(n % window for n in grid):
            return PADS_FIRST.format(grid=grid, window=window)
        return {"x": tokens.unflatten(1, grid)}

    def output(given: Any, call: dict[str, Any]) -> Tensor:
        return of_windows(given[0], size, (shift, shift), grid)

    return Foreign(mixer, attention, call, output, watched={"tokens": layer.layernorm_before})
