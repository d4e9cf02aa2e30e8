"""How an operator connects tokens: which positions and channels, with weights shared by whom, and from where.

The three principles of Han et al. 2022, arXiv 2106.04263 (sparse connectivity, weight sharing, dynamic weight),
measured: nothing is taken from what an operator says of itself.

Shape letters: B images, N outputs, M inputs (positions of the grids), C channels in, E channels out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from glocal.analysis.jacobian import Prepared, prepared
from glocal.analysis.rank import channel_rank, num_matrices, position_rank
from glocal.mixer import TokenMixer

SAME = 1e-7  # relative to the largest entry: what is equal, and what is zero, in float64
SAME_EIGENVALUE = 1e-5  # of matrices that are inverted on the way


@dataclass(frozen=True)
class Sharing:
    """What of the three principles the Jacobians of two images show by themselves.

    Attributes:
        positions: what an output reads: "itself"; "local", less than the grid is long along some axis; "sparse",
            at most half of all positions, but far ones too; "global".
        reads: the most positions that one output reads, of
        num_positions: M.
        channels: "separable" if every block of the Jacobian is P diag(a_ij) V with one P and one V of no more
            inner channels than C or E; else "dense".
        shared_over_positions: "yes" if the weights depend on the offset alone (away from borders), "periodically"
            if they repeat at some step along each axis, as windows do, or "no".
        shared_over_channels: "all" channels have the same weights, "groups" of them do (heads), or "no" two.
        groups: how many different weights there are among the channels; None where channels are dense.
        dynamic: whether weights change with the input: "no"; "per image", where they are still shared over
            positions; "per position".
        frozen: whether the weights were held still, as they are where a token mixer's Jacobian is taken. Otherwise
            the paths through which the input makes the weights are in it too.
    """

    positions: Literal["itself", "local", "sparse", "global"]
    reads: int
    num_positions: int
    channels: Literal["separable", "dense"]
    shared_over_positions: Literal["yes", "periodically", "no"]
    shared_over_channels: Literal["all", "groups", "no"]
    groups: int | None
    dynamic: Literal["no", "per image", "per position"]
    frozen: bool


@dataclass(frozen=True)
class Connectivity(Sharing):
    """The three principles of one operator, as found on one grid: what `Sharing` has, and what takes longer.

    Attributes:
        pattern_over_positions: as `shared_over_positions`, of what is read instead of the weights: "yes" if an output
            reads the same offsets wherever it stands, "periodically" where there are windows.
        made_by: the tokens that the weights of an output change with: "nothing", "itself" (the token in its place),
            "some of what it reads", "what it reads", all of that and nothing else, or "more than it reads".
        makers: how many these are at most.
        num_outputs: N.
        rank_positions: how many positions' worth of numbers of an image pass through the operator: the rank of the
            Jacobian of one image for each channel that passes, rounded up.
        num_channels: C or E, the smaller.
        rank_channels: how many channels pass: of the input, or of the output if these are fewer.
        matrices: how many channel matrices the blocks of the Jacobian are combinations of.
        all_matrices: whether these are C*E, so that any may stand anywhere, as in a linear layer over the image.
    """

    pattern_over_positions: Literal["yes", "periodically", "no"]
    made_by: Literal["nothing", "itself", "some of what it reads", "what it reads", "more than it reads"]
    makers: int
    num_outputs: int
    rank_positions: int
    num_channels: int
    rank_channels: int
    matrices: int
    all_matrices: bool

    @property
    def low_rank_positions(self) -> bool:
        """Whether fewer positions' worth of numbers pass than there are."""
        return self.rank_positions < min(self.num_positions, self.num_outputs)

    @property
    def keeps_positions(self) -> bool:
        """Whether there is an output for each input position."""
        return self.num_outputs == self.num_positions

    @property
    def low_rank_channels(self) -> bool:
        """Whether fewer channels pass than there are."""
        return self.rank_channels < self.num_channels

    def __str__(self) -> str:
        """One line."""
        over = {
            "yes": "shared by all positions",
            "periodically": "repeated over positions",
            "no": "own for each position",
        }
        among = {
            "all": "the same for all channels",
            "groups": f"own for each of {self.groups} groups of channels",
            "no": "own for each channel" if self.channels == "separable" else "own for each pair of channels",
        }
        return ", ".join(
            [
                f"{self.positions} ({self.reads} of {self.num_positions} positions)",
                f"channels {self.channels}",
                f"weights {over[self.shared_over_positions]}",
                among[self.shared_over_channels],
                "static" if self.dynamic == "no" else f"dynamic {self.dynamic}, made by {self.made_by}",
                *([f"rank {self.rank_positions} over positions"] if self.low_rank_positions else []),
                *([f"rank {self.rank_channels} over channels"] if self.low_rank_channels else []),
                *([] if self.frozen else ["by the whole Jacobian"]),
            ]
        )


def connectivity(operator: nn.Module, grid: Sequence[int] | None = None, *, dim: int | None = None) -> Connectivity:
    """Measures the three principles on two images of random tokens.

    Args:
        operator: any module with the call [B, *S, C] -> [B, *S', C'], images independent of each other in
            evaluation. It is not changed: a copy is measured, in float64, with noise on its parameters, so that
            nothing is equal or zero only because it starts so.
        grid: S; (8, 8) by default, (16,) for an operator of rank 1. Must be longer than a window to see its end, and
            twice as long to see it repeat.
        dim: C; the operator's own `dim` by default.

    Cost: two Jacobians, of M*C forward passes each where a mixer is affine in its values, else N*E backward passes;
    2*N*E*M*C numbers (16 MiB at 8x8 and 16 channels); and the weights of 2*M + 2 images.

    Raises:
        ValueError: an operator without `dim` where none is given.
    """
    run = prepared(operator, grid, dim=dim)
    found = _scaled(run)
    shown, read, out_grid, grid = _shown(run, found), _read(found), run.out_grid, run.grid
    made = torch.zeros_like(read) if shown.dynamic == "no" else run.makers()
    matrices = num_matrices(found[0])
    return Connectivity(
        **vars(shown),
        pattern_over_positions=_shared(read.double()[None, :, None, :, None], read, out_grid, grid),
        made_by=_made_by(made, read, alike=out_grid == grid),
        makers=int(made.sum(1).max()),
        num_outputs=math.prod(out_grid),
        rank_positions=position_rank(found[0]),
        num_channels=min(found.shape[2], found.shape[4]),
        rank_channels=channel_rank(found[0]),
        matrices=matrices,
        all_matrices=matrices == found.shape[2] * found.shape[4],
    )


def sharing(operator: nn.Module, grid: Sequence[int] | None = None, *, dim: int | None = None) -> Sharing:
    """The quicker half of `connectivity`, with the same arguments and errors."""
    run = prepared(operator, grid, dim=dim)
    return _shown(run, _scaled(run))


def _scaled(run: Prepared) -> Tensor:
    """Both Jacobians, with 1 as their largest entry."""
    found = run.jacobian()
    return found / found.abs().max().clamp(min=torch.finfo(found.dtype).tiny)


def _read(found: Tensor) -> Tensor:
    """Which outputs read which positions: bool [N, M]."""
    return found.abs().amax((0, 2, 4)) > SAME


def _shown(run: Prepared, found: Tensor) -> Sharing:
    read, out_grid, grid = _read(found), run.out_grid, run.grid
    positions = _positions(read, out_grid, grid)
    groups = _groups(found, itself=positions == "itself")
    shared = _shared(found, read, out_grid, grid)
    changes = bool((found[0] - found[1]).abs().max() > SAME)
    return Sharing(
        positions=positions,
        reads=int(read.sum(1).max()),
        num_positions=math.prod(grid),
        channels="dense" if groups is None else "separable",
        shared_over_positions=shared,
        shared_over_channels="all" if groups == 1 else "no" if groups in (None, found.shape[-1]) else "groups",
        groups=groups,
        dynamic="no" if not changes else "per position" if shared == "no" else "per image",
        frozen=isinstance(run.operator, TokenMixer),
    )


def connections(
    operator: nn.Module, grid: Sequence[int] = (8,), *, dim: int | None = None, image: int = 0
) -> tuple[list[list[float]], list[list[float]]]:
    """How strongly outputs read inputs along the middle of the grid, and channels channels, for a picture.

    Args:
        operator, grid, dim: as `connectivity`.
        image: 0 or 1, of the two that are measured.

    Returns:
        Positions along the last axis, through the middle of all others: one row for each output, one number for each
        input, the root of the sum of squares over channels. And channels of the output in the middle, in the same
        form: where the blocks are P diag(a_ij) V, the |a_ij| of the input that it reads most, in increasing order on
        a diagonal, up to a common factor for each channel; else the root of the sum of squares over the positions
        that it reads.
    """
    run = prepared(operator, grid, dim=dim)
    found, out_grid, grid = run.jacobian(), run.out_grid, run.grid
    found = found[[image, 1 - image]]
    block = found[0].permute(0, 2, 1, 3).unflatten(1, grid).unflatten(0, out_grid)  # [*S', *S, E, C]
    for axis, n in enumerate(out_grid[:-1]):
        block = block.select(0, n // 2).select(len(out_grid) - 1 - axis, grid[axis] // 2)
    middle = found[0, int(torch.arange(math.prod(out_grid)).view(out_grid)[tuple(n // 2 for n in out_grid)])]
    middle = middle.transpose(0, 1)  # [M, E, C]
    itself = bool((found[0].abs().amax((1, 3)) > 0).sum() == math.prod(out_grid))
    if _groups(found, itself=itself) is None or itself:
        channels = middle.square().sum(0).sqrt()
    else:
        most = middle[middle.square().sum((1, 2)).argmax()]
        values = torch.linalg.eigvals(most @ torch.linalg.pinv(found[0].sum((0, 2)))).abs()
        channels = torch.diag_embed(_rounded(values.sort().values))
    return block.square().sum((2, 3)).sqrt().tolist(), channels.tolist()


def _rounded(values: Tensor) -> Tensor:
    """Sorted values, of which those that are nearly equal are the same."""
    new = torch.ones(len(values), dtype=torch.bool)
    new[1:] = values.diff() > SAME_EIGENVALUE * values[-1]
    return values[new][new.cumsum(0) - 1]


def _positions(
    read: Tensor, out_grid: Sequence[int], grid: Sequence[int]
) -> Literal["itself", "local", "sparse", "global"]:
    """How far outputs read, from which read which, [N, M]."""
    if tuple(out_grid) == tuple(grid) and torch.equal(read, torch.eye(len(read), dtype=torch.bool)):
        return "itself"
    whole = torch.ones(len(read), dtype=torch.bool)  # whose sources reach from end to end along every axis
    for axis, n in enumerate(grid):
        others = [a + 1 for a in range(len(grid)) if a != axis]
        along = read.view(-1, *grid)
        along = along.any(others) if others else along
        place = torch.arange(n)
        first = torch.where(along, place, n).amin(1)
        last = torch.where(along, place, -1).amax(1)
        whole &= last - first == n - 1
    if not whole.any():
        return "local"
    return "global" if bool((read[whole].sum(1) > read.shape[1] / 2).any()) else "sparse"


def _made_by(
    made: Tensor, read: Tensor, *, alike: bool
) -> Literal["nothing", "itself", "some of what it reads", "what it reads", "more than it reads"]:
    """Which tokens make the weights, from which do and which are read, [N, M] each."""
    if not made.any():
        return "nothing"
    if alike and not (made & ~torch.eye(len(made), dtype=torch.bool)).any():
        return "itself"
    if torch.equal(made, read):
        return "what it reads"
    return "more than it reads" if (made & ~read).any() else "some of what it reads"


def _groups(found: Tensor, *, itself: bool) -> int | None:
    """How many different weights there are among the channels; None if the blocks have no common P and V.

    Where J_ij = P diag(a_ij) V, any two sums of blocks X, Y of full rank give Y X^+ = P diag(y / x) P^-1: such
    matrices commute, and have one eigenvalue for each different a.
    """
    blocks = found.permute(0, 1, 3, 2, 4).flatten(0, 2)
    blocks = blocks[blocks.abs().amax((1, 2)) > SAME]
    if itself:  # one block says nothing of a common P and V; it mixes channels, or it does not
        square = blocks.shape[1] == blocks.shape[2]
        if not square or (blocks - torch.diag_embed(blocks.diagonal(dim1=1, dim2=2))).abs().max() > SAME:
            return None
    generator = torch.Generator().manual_seed(0)
    shares = torch.randn(3, len(blocks), generator=generator, dtype=blocks.dtype)
    x, y, z = torch.einsum("sk,kec->sec", shares, blocks)
    back = torch.linalg.pinv(x)
    y, z = y @ back, z @ back
    size = (y @ z).abs().max()
    if (y @ z - z @ y).abs().max() > SAME_EIGENVALUE * size:
        return None
    values = torch.linalg.eigvals(y)
    # where more channels come out than go in, the others have eigenvalue 0
    values = values[values.abs().argsort(descending=True)][: min(found.shape[2], found.shape[4])]
    near = (values[:, None] - values).abs() <= SAME_EIGENVALUE * values.abs().max()
    return int((~near.tril(-1).any(1)).sum())  # those that no earlier one equals


def _shared(
    found: Tensor, read: Tensor, out_grid: Sequence[int], grid: Sequence[int]
) -> Literal["yes", "periodically", "no"]:
    """Whether the blocks J[i, j] of each image repeat when i and j move together along each axis."""
    rank = len(grid)
    if len(out_grid) != rank:
        return "no"
    e, c = found.shape[2], found.shape[4]
    blocks = found.permute(0, 1, 3, 2, 4).reshape(len(found), *out_grid, *grid, e, c)
    reads = read.sum(1).view(*out_grid)
    inside = reads == reads.max()  # of the others, something is cut off at the border
    steps = []
    for axis in range(rank):
        if grid[axis] == 1:
            continue
        stride = round(grid[axis] / out_grid[axis])
        periods = range(1, out_grid[axis] // 2 + 1)  # a longer one would not be seen twice
        step = next((p for p in periods if _repeats(blocks, inside, rank, axis, p, stride)), None)
        if step is None:
            return "no"
        steps.append(step)
    return "yes" if all(step == 1 for step in steps) else "periodically"


def _repeats(blocks: Tensor, inside: Tensor, rank: int, axis: int, step: int, stride: int) -> bool:
    """Whether J[i + step, j + step * stride] is J[i, j] along an axis, and not because there is nothing."""
    n, m, to = blocks.shape[1 + axis], blocks.shape[1 + rank + axis], 1 + rank + axis
    move = step * stride
    if move >= m:
        return False
    ahead = blocks.narrow(1 + axis, step, n - step).narrow(to, move, m - move)
    here = blocks.narrow(1 + axis, 0, n - step).narrow(to, 0, m - move)
    if step == 1:
        both = inside.narrow(axis, 1, n - 1) & inside.narrow(axis, 0, n - 1)
        if bool(both.any()):  # an output at the border may be weighted otherwise
            ahead, here = (t.movedim(0, rank)[both] for t in (ahead, here))
    return bool((ahead - here).abs().max() <= SAME) and bool(here.abs().max() > SAME)
