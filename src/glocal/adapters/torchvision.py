"""torchvision's ViT and Swin."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from glocal.adapters.foreign import PADS_FIRST, Foreign, NotSeen, on_grid, seen_as
from glocal.mixers import SelfAttention, WindowAttention


def found(model: nn.Module) -> Iterator[tuple[str, Foreign | NotSeen]]:
    """Every attention inside a VisionTransformer, every shifted window attention."""
    for name, module in model.named_modules():
        kind = type(module).__name__ if type(module).__module__.startswith("torchvision.") else ""
        if kind == "ShiftedWindowAttention":
            yield name, seen_as(_of_windows, module)
        elif kind == "ShiftedWindowAttentionV2":
            yield name, NotSeen("compares by cosine, which WindowAttention does not")
        elif kind == "VisionTransformer":
            for inner, part in module.named_modules():
                if isinstance(part, nn.MultiheadAttention):
                    yield f"{name}.{inner}" if name else inner, seen_as(_of_attention, part, module)


class _InProjection(nn.Module):
    """The projection that nn.MultiheadAttention keeps as bare parameters."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.weight, self.bias = attention.in_proj_weight, attention.in_proj_bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def _of_attention(attention: nn.MultiheadAttention, model: Any) -> Foreign:
    mixer = SelfAttention(attention.embed_dim, num_heads=attention.num_heads)  # type: ignore[abstract]
    mixer.qkv = _InProjection(attention)  # type: ignore[assignment]
    mixer.proj = attention.out_proj
    return Foreign(mixer, attention, on_grid, lambda given, call: given[0], watched={"grid": model.conv_proj})


def _of_windows(attention: Any) -> Foreign | NotSeen:
    if len({*attention.shift_size}) > 1:
        return NotSeen(f"moves its windows by {attention.shift_size}, WindowAttention by the same along all axes")
    mixer = WindowAttention(  # type: ignore[abstract]  # `weights` is its `_weights`
        attention.proj.in_features,
        window_size=tuple(attention.window_size),
        num_heads=attention.num_heads,
        shift_size=attention.shift_size[0],
        mask_padding=False,
    )
    mixer.qkv, mixer.proj = attention.qkv, attention.proj
    mixer.relative_position_bias_table = attention.relative_position_bias_table

    def call(x: Tensor, kept: dict[str, Any]) -> dict[str, Any] | str:
        grid = tuple(x.shape[1:3])
        if attention.shift_size[0] and any(n % w for n, w in zip(grid, attention.window_size, strict=True)):
            return PADS_FIRST.format(grid=grid, window=tuple(attention.window_size))
        return {"x": x}

    return Foreign(mixer, attention, call, lambda given, call: given)
