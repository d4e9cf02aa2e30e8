"""Rotary positions: queries and keys are turned by their place, so that a score depends on the offset alone.

They cannot be added: the rotation multiplies q and k of every head, after their projections. `RotaryAttention` is the
operator; these two functions are what any other attention needs.

Shape letters: B batch, P tokens in front, N tokens of the grid, D channels of a head.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from glocal.aggregation import grid_positions
from glocal.arguments import one_of, positive

Pairing = Literal["interleaved", "halves"]
PAIRINGS = ("interleaved", "halves")


def rotary_angles(
    grid: Sequence[int],
    head_dim: int,
    *,
    offset: int | Tensor = 0,
    num_prefix: int = 0,
    grid_size: Sequence[int] | None = None,
    extents: Tensor | None = None,
    temperature: float = 10000.0,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """By how much each pair of channels of each token is turned: [P + N, D/2], or [B, P + N, D/2].

    In a sequence pair i of place m is turned by m * temperature^(-2i / D). In an image the first half of the pairs is
    turned by the row, the second by the column, each as in a sequence of D/2 channels (axial).

    Args:
        grid: (T,) or (H, W).
        head_dim: channels D of a head, a multiple of 2 in a sequence, of 4 in an image.
        offset: the first token's place in a sequence, an int or one for each sequence [B].
        num_prefix: class tokens in front, which are not turned.
        grid_size: the grid that a model was trained on; places are scaled to it, as in EVA-02. None: they are counted.
        extents: int [B, rank], each image's own size, by which its places are scaled; with grid_size.
        temperature: the longest wavelength over 2 pi.
        device: of the result.
        dtype: float32, or float64; large angles have no sines in 16 bits.

    Raises:
        ValueError: a head_dim that cannot be cut into pairs for each axis; an offset in an image, or with grid_size;
            a grid_size of another rank; extents without one.

    Source: Su et al., RoFormer, 2021, arXiv 2104.09864, section 3.2; axial as timm's `RotaryEmbeddingCat` with
    in_pixels=False, whose ref_feat_shape is grid_size.
    """
    rank = len(grid)
    check_head_dim(head_dim, rank, temperature)
    if (isinstance(offset, Tensor) or offset) and (rank > 1 or grid_size is not None):
        what = f"the grid has rank {rank}" if rank > 1 else "grid_size scales places by the sequence's length"
        raise ValueError(f"offset: was given, {what}; an offset counts the tokens that came before in a sequence")
    if grid_size is not None and len(grid_size) != rank:
        raise ValueError(f"grid_size: {tuple(grid_size)}, the grid is {tuple(grid)}; give as many axes")
    if extents is not None and grid_size is None:
        raise ValueError("extents: were given without grid_size, to which they scale places; give it too, or neither")
    share = torch.arange(head_dim // (2 * rank), device=device).to(dtype) / (head_dim // (2 * rank))
    wave = temperature**-share
    places = grid_positions(grid, device=device).to(dtype)  # [N, rank]
    if isinstance(offset, Tensor) and offset.dim():
        places = places + offset.to(device=places.device, dtype=dtype)[:, None, None]
    else:
        places = places + offset
    if grid_size is not None:
        reference = torch.tensor(tuple(grid_size), device=device).to(dtype)
        if extents is None:
            places = places / _as_tensor(grid, places) * reference
        else:
            places = places / extents.clamp(min=1).to(dtype)[:, None] * reference
    angles = (places[..., None] * wave).flatten(-2)
    return torch.nn.functional.pad(angles, (0, 0, num_prefix, 0))


def rotate(t: Tensor, angles: Tensor, *, pairing: Pairing = "interleaved") -> Tensor:
    """Turns pairs of channels: (a, b) -> (a cos - b sin, a sin + b cos).

    Args:
        t: queries or keys [..., D]; the product of two turned vectors depends on the difference of their angles alone.
        angles: broadcastable to [..., D/2], from `rotary_angles`: as they are for heads [B, G, N, D], and as
            `angles[:, None]` for [B, N, G, D].
        pairing: which channels are a pair: "interleaved", 2i and 2i + 1 (RoFormer, GPT-J, EVA), or "halves",
            i and i + D/2 (GPT-NeoX, LLaMA, DINOv3). A checkpoint has one of them.

    Returns:
        t's shape and dtype; computed in that of the angles, or wider.

    Raises:
        ValueError: an odd number of channels, or angles for another number of pairs.
    """
    one_of("pairing", pairing, PAIRINGS)
    if t.shape[-1] != 2 * angles.shape[-1]:
        raise ValueError(f"angles: for {angles.shape[-1]} pairs, t has {t.shape[-1]} channels; they need half as many")
    cos, sin = angles.cos(), angles.sin()
    a, b = t.unflatten(-1, (-1, 2)).unbind(-1) if pairing == "interleaved" else t.chunk(2, -1)
    turned = a * cos - b * sin, a * sin + b * cos
    out = torch.stack(turned, -1).flatten(-2) if pairing == "interleaved" else torch.cat(turned, -1)
    return out.to(t.dtype)


def check_head_dim(head_dim: int, rank: int, temperature: float) -> None:
    """A head's channels are pairs for each axis."""
    positive("head_dim", head_dim)
    if rank not in (1, 2):
        raise ValueError(f"grid: has {rank} axes; rotary positions are for sequences (T,) and images (H, W)")
    if head_dim % (2 * rank):
        what = "pairs" if rank == 1 else "pairs for rows and for columns"
        raise ValueError(
            f"head_dim: {head_dim} channels of a head cannot be cut into {what}; give a multiple of {2 * rank}, by "
            "head_dim or another num_heads"
        )
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature!r}, must be positive")


def _as_tensor(grid: Sequence[int], like: Tensor) -> Tensor:
    """[rank]; by stack, since lengths may be symbolic."""
    return torch.stack([like.new_ones(()) * n for n in grid])
