"""Window attention, plain and shifted, with a relative position bias."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import extents, flag, per_axis, shift
from glocal.kernels import window_attention
from glocal.mixers._attention import Attention, masked_softmax, part_of, sum_of, table_parameter
from glocal.mixers._grid import Windows, masked_windows, pick_or_zero, rolled_windows


class WindowAttention(Attention):
    """Self-attention inside windows that tile the grid: A = softmax(q k^T / sqrt(D) + B) within a window.

    Weights: [B, heads, N, K], K places of a window: own for each image, head and query; local.

    Args:
        dim: channels C.
        window_size: places along all axes or each.
        num_heads, head_dim: one of them; head_dim 32 where neither is given.
        shift_size: moves the windows, on all axes longer than the window, so that they end at
            shift_size + m * window_size.
        qkv_bias: whether q, k and v have biases.
        position_bias: whether B is there; without it only the window's cut knows of positions.
        mask_padding: empty places of windows at the border are not seen. False: timm's behaviour at sizes that
            are no multiple of the window, where zero tokens take part and shifted windows wrap around.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S, C], any S. `relative_position_bias_table` [prod(2*window_size - 1), heads],
        row (dy + w - 1) * (2*w - 1) + dx + w - 1 for dy, dx = query - source.

    Cost: 4*N*C^2 + 2*P*K*C multiply-adds; P = N if all windows are full.

    Raises:
        ValueError: a shift that is not smaller than the window; `valid` with mask_padding=False.

    Source: Liu et al., Swin Transformer, ICCV 2021, arXiv 2103.14030, section 3.2.
    Differs from the paper: sizes that are no multiple of the window are defined, see mask_padding; the paper's
    mask of -100 is minus infinity.
    """

    examples = (
        "WindowAttention(window_size=4, num_heads=4)",
        "WindowAttention(window_size=(5, 3), num_heads=2, shift_size=2, qkv_bias=False)",
        "WindowAttention(window_size=4, num_heads=4, shift_size=2, mask_padding=False)",
        "WindowAttention(window_size=5, num_heads=4, shift_size=2, rank=1)",
        "WindowAttention(window_size=4, num_heads=4, shift_size=2, position_bias=False)",
    )
    undecayed = ("relative_position_bias_table",)

    def __init__(
        self,
        dim: int,
        *,
        window_size: int | Sequence[int] = 7,
        num_heads: int | None = None,
        head_dim: int | None = None,
        shift_size: int = 0,
        qkv_bias: bool = True,
        position_bias: bool = True,
        mask_padding: bool = True,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, num_heads=num_heads, head_dim=head_dim, qkv_bias=qkv_bias, rank=rank)
        self.window_size, self.mask_padding = window_size, flag("mask_padding", mask_padding)
        self._window = per_axis("window_size", window_size, rank)
        self.shift_size = shift(shift_size, self._window)
        self.position_bias = flag("position_bias", position_bias)
        entries = math.prod(2 * w - 1 for w in self._window)
        self.relative_position_bias_table = table_parameter(entries, self.num_heads) if position_bias else None

    def values(self, source: Tensor) -> Tensor:
        return self.heads(self._padded(source), 2)

    def scores(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> dict[str, Tensor]:
        windows = self._windows(x, valid)
        index, place = self._rows(windows, queries)
        q = self.heads(x, 0)
        k = pick_or_zero(self.heads(self._padded(x), 1), index)
        q = q if queries is None else q[:, queries]
        scores = {"content": torch.einsum("bngd,bnkgd->bgnk", q, k)}
        if self.position_bias:
            scores["position"] = self._bias(windows)[:, place].transpose(0, 1)  # [B|1, heads, N, K]
        return scores

    def weights(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> Aggregation:
        windows, grid = self._windows(x, valid), tuple(x.shape[1:-1])
        index = self._rows(windows, queries)[0][:, None]
        scores = self._scores(x, valid=valid, queries=queries)
        sources = grid if self.mask_padding else self._padded_grid(grid)
        places = grid_positions(grid, device=x.device)
        return Aggregation(
            masked_softmax(sum_of(scores), index >= 0),
            index,
            math.prod(sources),
            places if queries is None else places[queries],
            grid_positions(sources, device=x.device),
            grid if queries is None else (len(queries),),
            sources,
        )

    def fast(self, x: Tensor, *, valid: Tensor | None = None, pos_embed: Tensor | None = None) -> Tensor:
        qkv, table = self._qkv(x, pos_embed), self.relative_position_bias_table
        mixed = window_attention(
            qkv,
            None if table is None else table.to(qkv.dtype),  # under autocast another one
            num_heads=self.num_heads,
            window_size=self._window,
            shift_size=self.shift_size,
            extents=None if valid is None else extents(valid),
            rolled_size=None if self.mask_padding else x.shape[1:-1],
        )
        return self.proj(mixed)

    def unsupported(self, x: Tensor, *, valid: Tensor | None = None) -> str | None:
        self._refuse(valid)
        return None

    def macs(self, grid: Sequence[int]) -> int:
        n, padded = math.prod(grid), math.prod(grid if self.mask_padding else self._padded_grid(grid))
        sizes = self._window if self.mask_padding else [min(w, g) for w, g in zip(self._window, grid, strict=True)]
        return 2 * (n + padded) * self.dim**2 + 2 * n * math.prod(sizes) * self.dim

    def _qkv(self, x: Tensor, pos_embed: Tensor | None) -> Tensor:
        """Queries, keys and values of the tokens and of padding that takes part: one product where it can be one."""
        if pos_embed is None:
            return self.qkv(self._padded(x))
        placed, plain = self._padded(x + pos_embed), self._padded(x)
        parts = [part_of(self.qkv, t, part, self.dim) for part, t in enumerate((placed, placed, plain))]
        return torch.cat(parts, dim=-1)

    def _windows(self, x: Tensor, valid: Tensor | None) -> Windows:
        grid = x.shape[1:-1]
        if not self.mask_padding:
            self._refuse(valid)
            axes = [rolled_windows(n, w, self.shift_size, x.device) for n, w in zip(grid, self._window, strict=True)]
            return Windows(axes, self._padded_grid(grid))
        return cut_windows(grid, self._window, self.shift_size, valid, x.device)

    def _refuse(self, valid: Tensor | None) -> None:
        if valid is not None and not self.mask_padding:
            raise ValueError(
                "WindowAttention: valid was given, mask_padding=False lets padding be seen; use mask_padding=True"
            )

    def _rows(self, windows: Windows, queries: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B|1, N, K] sources in the window of each query, and [B|1, N] the query's own place there."""
        window, place = windows.where()
        if queries is not None:
            window, place = window[:, queries], place[:, queries]
        sources = windows.sources()
        batch = torch.arange(sources.shape[0], device=sources.device)[:, None]
        seen = windows.together()[window, place]
        return torch.where(seen, sources[batch, window], -1), place

    def _bias(self, windows: Windows) -> Tensor:
        """[heads, K, K]."""
        assert self.relative_position_bias_table is not None
        return self.relative_position_bias_table[windows.offsets(self._window)].movedim(-1, 0)

    def _padded_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return tuple(n if n <= w else (n + w - 1) // w * w for n, w in zip(grid, self._window, strict=True))

    def _padded(self, x: Tensor) -> Tensor:
        """Zero tokens at the ends where they take part."""
        if self.mask_padding:
            return x
        grid = x.shape[1:-1]
        more = [p - n for p, n in zip(self._padded_grid(grid), grid, strict=True)]
        return torch.nn.functional.pad(x, (0, 0, *(m for end in reversed(more) for m in (0, end))))


def cut_windows(
    grid: Sequence[int], window: Sequence[int], shift_size: int, valid: Tensor | None, device: torch.device
) -> Windows:
    """Windows with empty places masked; where they are shifted, by each image's own extent."""
    size = None if valid is None else extents(valid)
    axes = [
        masked_windows(n, w, shift_size, None if size is None else size[:, axis], device)
        for axis, (n, w) in enumerate(zip(grid, window, strict=True))
    ]
    return Windows(axes, grid)
