"""timm's ViT and Swin, and the models that are built of their parts."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from glocal.adapters.foreign import Foreign, NotSeen, of_windows, on_grid, seen_as
from glocal.mixers import SelfAttention, WindowAttention


def found(model: nn.Module) -> Iterator[tuple[str, Foreign | NotSeen]]:
    """Every attention inside a VisionTransformer, every Swin block."""
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind == "vision_transformer.VisionTransformer":
            yield from _of_transformer(name, module)
        elif kind == "swin_transformer.SwinTransformerBlock":
            yield f"{name}.attn", seen_as(_of_swin, module)


def _kind(module: nn.Module) -> str:
    """Such as "swin_transformer.SwinTransformerBlock"; "" if it is not timm's."""
    for each in type(module).__mro__:
        if each.__module__.startswith("timm."):
            return f"{each.__module__.rpartition('.')[2]}.{each.__name__}"
    return ""


def _of_transformer(name: str, model: Any) -> Iterator[tuple[str, Foreign | NotSeen]]:
    patches = getattr(model.patch_embed, "proj", None)
    for inner, module in model.named_modules():
        kind = _kind(module)
        if kind.rpartition(".")[2] not in ("Attention", "AttentionRope", "EvaAttention"):
            continue
        where = f"{name}.{inner}" if name else inner
        if kind.rpartition(".")[2] != "Attention":
            yield where, NotSeen(f"is timm's {type(module).__name__}, which this library does not read")
        elif patches is None:
            yield where, NotSeen("its model makes patches in a way that does not tell their grid")
        else:
            yield where, seen_as(_of_attention, module, patches)


def _of_attention(attention: Any, patches: nn.Module) -> Foreign | NotSeen:
    if not all(isinstance(getattr(attention, part, None), nn.Identity) for part in ("q_norm", "k_norm")):
        return NotSeen("normalises queries and keys, which SelfAttention does not")
    if getattr(attention, "gate", None) is not None:
        return NotSeen("has a gate on its output, which SelfAttention has not")
    if not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity):
        return NotSeen("normalises what it mixed, which SelfAttention does not")
    dim, inner = attention.qkv.in_features, attention.proj.in_features
    if attention.proj.out_features != inner:
        return NotSeen(f"has heads of {inner} channels in all and gives {attention.proj.out_features}")
    mixer = SelfAttention(dim, num_heads=attention.num_heads, out_dim=inner, qkv_bias=attention.qkv.bias is not None)  # type: ignore[abstract]
    mixer.qkv, mixer.proj = attention.qkv, attention.proj
    return Foreign(mixer, attention, on_grid, lambda out, call: out, watched={"grid": patches})


def _of_swin(block: Any) -> Foreign | NotSeen:
    attention, shift = block.attn, tuple(block.shift_size)
    inner = attention.proj.in_features
    if inner != attention.qkv.in_features:
        return NotSeen(f"has heads of {inner} channels in all on tokens of {attention.qkv.in_features}")
    moved = {s for s, n, w in zip(shift, block.input_resolution, block.window_size, strict=True) if n > w}
    if len(moved) > 1 or any(s for s in shift if s not in moved):
        return NotSeen(f"moves its windows by {shift}, WindowAttention by the same along all axes")
    mixer = WindowAttention(  # type: ignore[abstract]  # `weights` is its `_weights`
        inner,
        window_size=block.window_size,
        num_heads=attention.num_heads,
        shift_size=max(shift),
        qkv_bias=attention.qkv.bias is not None,
        mask_padding=False,
    )
    mixer.qkv, mixer.proj = attention.qkv, attention.proj
    mixer.relative_position_bias_table = attention.relative_position_bias_table

    def call(windows: Tensor, kept: dict[str, Any]) -> dict[str, Any] | str:
        return {"x": kept["tokens"]}

    def output(windows: Tensor, call: dict[str, Any]) -> Tensor:
        return of_windows(windows, block.window_size, block.shift_size, tuple(call["x"].shape[1:3]))

    return Foreign(mixer, attention, call, output, watched={"tokens": block.norm1})
