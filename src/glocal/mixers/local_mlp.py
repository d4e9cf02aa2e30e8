"""Local MLP: window attention with learned weights in place of computed ones."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import flag, per_axis, resolve_heads, shift
from glocal.mixer import TokenMixer
from glocal.mixers._grid import Windows, pick, pick_or_zero
from glocal.mixers.window_attention import cut_windows
from glocal.positions.relative import relative_index


class LocalMLP(TokenMixer):
    """Local MLP: a learned matrix for each head mixes the places of every window.

    Weights: [1, heads, N, K], K places of a window. Static, own for each head and place, shared by all windows; by
    places too if told to.

    Args:
        dim: channels C.
        window_size: places along all axes or each.
        num_heads, head_dim: one of them; head_dim 32 where neither is given.
        shift_size: as `WindowAttention`.
        shared_positions: one weight for each offset of two places, not for each two: a convolution inside every window.
        projection: linear layers `v` before and `proj` after, as around attention. False inside a block that has
            pointwise convolutions of its own.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S, C], any S; empty places of windows at the border count as zero.
        `weight` [heads, K, K]: query place, source place; with shared_positions [heads, *(2 * window - 1)], query less
        source in the middle.

    Cost: N*K*C multiply-adds, and 2*N*C^2 for the projections.

    Raises:
        ValueError: heads that do not divide dim; a shift that is not smaller than the window.

    Source: Han et al., On the Connection between Local Attention and Dynamic Depth-wise Convolution, ICLR 2022,
    arXiv 2106.04263, appendix (Local MLP in the Swin skeleton).
    Differs from the paper: nothing known; its code was not released.
    """

    examples = (
        "LocalMLP(window_size=4, num_heads=4)",
        "LocalMLP(window_size=(3, 5), num_heads=2, shift_size=1, projection=False)",
        "LocalMLP(window_size=5, num_heads=4, shift_size=2, rank=1)",
        "LocalMLP(window_size=(2, 4), num_heads=2, shift_size=1, shared_positions=True)",
    )

    def __init__(
        self,
        dim: int,
        *,
        window_size: int | Sequence[int] = 7,
        num_heads: int | None = None,
        head_dim: int | None = None,
        shift_size: int = 0,
        shared_positions: bool = False,
        projection: bool = True,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, rank=rank)
        self.window_size, self.projection = window_size, flag("projection", projection)
        self._window = per_axis("window_size", window_size, rank)
        self.shift_size = shift(shift_size, self._window)
        self.num_heads = resolve_heads(dim, num_heads, head_dim)
        places = math.prod(self._window)
        # as a linear layer over the places of a window
        bound = places**-0.5
        self.shared_positions = flag("shared_positions", shared_positions)
        shape = [2 * n - 1 for n in self._window] if shared_positions else (places, places)
        self.weight = nn.Parameter(torch.empty(self.num_heads, *shape).uniform_(-bound, bound))
        self.v = nn.Linear(dim, dim) if projection else nn.Identity()
        self.proj = nn.Linear(dim, dim) if projection else nn.Identity()

    def values(self, source: Tensor) -> Tensor:
        return self.v(source.flatten(1, -2)).unflatten(-1, (self.num_heads, -1))

    def weights(self, x: Tensor, *, valid: Tensor | None = None) -> Aggregation:
        grid = tuple(x.shape[1:-1])
        windows = self._windows(x, valid)
        window, place = windows.where()
        sources = windows.sources()
        batch = torch.arange(sources.shape[0], device=x.device)[:, None]
        positions = grid_positions(grid, device=x.device)
        return Aggregation(
            self._matrices()[:, place].transpose(0, 1),
            sources[batch, window][:, None],
            math.prod(grid),
            positions,
            positions,
            grid,
            grid,
        )

    def project(self, mixed: Tensor) -> Tensor:
        return self.proj(mixed)

    def fast(self, x: Tensor, values: Tensor, *, valid: Tensor | None = None) -> Tensor:
        windows = self._windows(x, valid)
        sources = windows.sources()
        v = pick_or_zero(values, sources)
        mixed = torch.einsum("gqk,bwkgd->bwqgd", self._matrices().to(v.dtype), v)
        window, place = windows.where()
        tokens = pick(mixed.flatten(1, 2).flatten(2), window * sources.shape[-1] + place)
        return self.proj(tokens)

    def macs(self, grid: Sequence[int]) -> int:
        n = math.prod(grid)
        return n * math.prod(self._window) * self.dim + (2 * n * self.dim**2 if self.projection else 0)

    def _matrices(self) -> Tensor:
        """[heads, K, K]."""
        if not self.shared_positions:
            return self.weight
        return self.weight.flatten(1)[:, relative_index(self._window, device=self.weight.device)]

    def _windows(self, x: Tensor, valid: Tensor | None) -> Windows:
        return cut_windows(x.shape[1:-1], self._window, self.shift_size, valid, x.device)
