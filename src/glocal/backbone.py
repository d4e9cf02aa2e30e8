"""Backbone: stem, stages of blocks from a layout such as C-C-T-T, head. Images or signals in, class scores out.

B samples, *S their grid, H W (pixels or tokens of images) or T (samples or tokens of signals), C channels.
"""

import difflib
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from glocal.arguments import check_valid, positive
from glocal.blocks import Block, MBConv, mean_of, normed, strided
from glocal.operator import undecayed_parts
from glocal.spec import available, build

# What a letter stands for; C is CoAtNet's convolution block and has no mixer of its own.
LETTERS = {"C": "MBConv", "T": "RelativeAttention"}


def parse_layout(text: str) -> tuple[str, ...]:
    """Splits a layout at '-' outside parentheses and quotes: "C-C-T-T" -> ("C", "C", "T", "T").

    Args:
        text: One entry a stage: C, T, or an operator's spec, such as "C-NeighborhoodAttention(kernel_size=5)-T-T".
            A spec that begins with a path is quoted: "C-'my-ops/shift.py:Shift(step=2)'-T-T".

    Raises:
        ValueError: An entry is empty, or is neither a letter nor the name of an operator; the message names the
            nearest valid one.
    """
    if not isinstance(text, str):
        raise ValueError(f"layout {text!r}: must be text, one entry for every stage, as in C-C-T-T")
    entries, depth, quote, start = [], 0, "", 0
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "-" and depth == 0:
            entries.append(text[start:i])
            start = i + 1
        else:
            depth += {"(": 1, ")": -1}.get(character, 0)
    entries = [entry.strip() for entry in [*entries, text[start:]]]
    if quote or depth != 0:
        what = f"the quote {quote}" if quote else "a parenthesis"
        raise ValueError(f"layout {text!r}: {what} is not closed")
    for entry in entries:
        _check_entry(entry, text)
    return tuple(entry.strip("'\"") if entry[0] in "'\"" else entry for entry in entries)


def _check_entry(entry: str, layout: str) -> None:
    if not entry:
        raise ValueError(f"layout {layout!r}: an entry is empty; write one for every stage, as in C-C-T-T")
    name = entry.partition("(")[0].strip()
    of_a_file = ".py:" in entry  # a user's operator; `build` opens the file
    if entry in LETTERS or name in available() or of_a_file:
        return
    if set(name) <= set(LETTERS):
        raise ValueError(f"layout {layout!r}: {name!r} is no operator; did you mean {'-'.join(name)!r}?")
    if len(name) == 1:
        near = name.upper() if name.upper() in LETTERS else None
        hint = f"did you mean {near!r}? " if near else ""
        raise ValueError(
            f"layout {layout!r}: unknown letter {name!r}; {hint}valid are C (convolution, MBConv), "
            "T (attention, RelativeAttention) and the names of operators"
        )
    raise ValueError(f"layout {layout!r}: unknown operator {name!r}; {_nearest_operator(name)}")


def _nearest_operator(name: str) -> str:
    lower = {operator.lower(): operator for operator in available()}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.4)
    valid = f"valid are C, T, {', '.join(available())}"
    return f"did you mean {lower[near[0]]!r}? {valid}" if near else valid


def default_strides(img_size: Sequence[int], stages: int) -> tuple[int, ...]:
    """Stride of every stage, after a stem that halves the image.

    From 128 pixels on every stage halves the grid, as in CoAtNet. A smaller image would end as a single token, so
    only the first stages do, as long as the shorter side keeps four tokens: a 32 x 32 image ends as 4 x 4.
    """
    if min(img_size) >= 128:
        return (2,) * stages
    side, strides = -(-min(img_size) // 2), []
    for _ in range(stages):
        strides.append(2 if side >= 7 else 1)
        side = -(-side // strides[-1])
    return tuple(strides)


def default_dims(stages: int) -> tuple[int, ...]:
    """Width of every stage: 64 in the first half of them, 128 in the second; trains on two CPU cores."""
    return tuple(64 if i < (stages + 1) // 2 else 128 for i in range(stages))


class Backbone(nn.Module):
    """Stem, stages and head: images [B, in_chans, H, W] or signals [B, in_chans, T] -> [B, num_classes].

    The stem is CoAtNet's: 3x3 convolution with stride 2, BN, GELU, 3x3 convolution. Every stage consists of
    blocks of one kind, its first block with the stage's stride and width. The head takes the mean over the grid, LN
    and a linear map. Any size works at run time; grids shrink to ceil(n / stride). For signals every kernel has one
    axis. Padded batches are told by `valid`:

        net = glocal.Backbone("C-LSTM(bidirectional=True)-T-T", in_chans=2, num_classes=5, img_size=64, rank=1)
        signals, lengths = torch.randn(8, 2, 64), torch.randint(1, 65, (8,))
        scores = net(signals, torch.arange(64) < lengths[:, None])

    Args:
        layout: One entry a stage; see `parse_layout`.
        in_chans: Channels of an image.
        num_classes: Number of scores.
        img_size: Pixels a side or (height, width) that relative-position tables are made for; for signals their
            length, as (length,) or with rank=1.
        rank: 2 for images, 1 for signals; what img_size says by default.
        dims: Width of every stage.
        depths: Blocks in every stage.
        strides: Stride of every stage; `default_strides` if not given.
        stem_dim: Width of the stem; half of the first stage's if not given, as the stem has four times the tokens.
        mlp_ratio: Hidden width over width: of the MLPs in blocks with a mixer, and inside convolution blocks.
        conv: Further arguments of `MBConv`, such as {"stride_in": "depthwise"}.
        drop_path: Rate of stochastic depth in the last block; it grows linearly from 0 in the first.
        layer_scale: Initial value of the factors on every branch; None: there are none.
        skip: False leaves out every skip path, also those that pool and widen; then no branch is dropped.
        mlp: False leaves out the MLP half of blocks with a mixer. Convolution blocks have none of their own and stay.
        positions: False builds operators without their position terms, by their argument `position_bias`; operators
            without that argument stay. `ablatable` says which of the three change anything here.

    Attributes:
        feature_info: One dict a stage, as in timm: `num_chs` (channels), `reduction` (pixels a token), `module`.

    Raises:
        ValueError: The layout names something unknown, or a sequence has another length than the layout; an
            operator asks for a position bias that `positions` takes away; at run time, an input of another rank.

    Source: Dai, Liu, Le, Tan, "CoAtNet", NeurIPS 2021, arXiv 2106.04803, section 2 and table 3.
    """

    def __init__(
        self,
        layout: str = "C-C-T-T",
        *,
        in_chans: int,
        num_classes: int,
        img_size: int | Sequence[int],
        rank: int | None = None,
        dims: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        stem_dim: int | None = None,
        mlp_ratio: float = 4,
        conv: dict[str, Any] | None = None,
        drop_path: float = 0,
        layer_scale: float | None = None,
        skip: bool = True,
        mlp: bool = True,
        positions: bool = True,
    ):
        super().__init__()
        entries = parse_layout(layout)
        if rank not in (None, 1, 2):
            raise ValueError(f"rank is {rank}; it must be 2 (images) or 1 (signals)")
        positive("in_chans", in_chans), positive("num_classes", num_classes)
        grid = (img_size,) * (rank or 2) if isinstance(img_size, int) else tuple(img_size)
        whole = all(isinstance(n, int) and n >= 1 for n in grid)
        if len(grid) not in (1, 2) or not whole or len(grid) != (rank or len(grid)):
            raise ValueError(f"img_size is {img_size}; it must be (height, width) or, for signals, (length,)")
        dims = default_dims(len(entries)) if dims is None else tuple(dims)
        depths = (1,) * len(entries) if depths is None else tuple(depths)
        strides = default_strides(grid, len(entries)) if strides is None else tuple(strides)
        for name, values in (("dims", dims), ("depths", depths), ("strides", strides)):
            if len(values) != len(entries):
                raise ValueError(
                    f"{name} is {values}, {len(values)} values; layout {layout!r} has {len(entries)} stages"
                )
            if min(values) < 1:
                raise ValueError(f"{name} is {values}; every value must be at least 1")
        self.layout = layout
        both: dict[str, Any] = {"layer_scale": layer_scale, "skip": skip}
        conv = {"expand_ratio": mlp_ratio, "rank": len(grid)} | both | (conv or {})
        block = {"mlp_ratio": mlp_ratio, "mlp": mlp} | both
        dim = max(1, dims[0] // 2) if stem_dim is None else stem_dim
        self.stem = Stem(in_chans, dim, rank=len(grid))
        grid = tuple(-(-side // 2) for side in grid)
        reduction = 2
        stages, self.feature_info = [], []
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        for i, entry in enumerate(entries):
            blocks: list[nn.Module] = []
            for j in range(depths[i]):
                stride = strides[i] if j == 0 else 1
                grid = tuple(-(-side // stride) for side in grid)
                place: dict[str, Any] = {"out_dim": dims[i], "stride": stride, "drop_path": next(rates)}
                if entry == "C":
                    blocks.append(MBConv(dim, **place | conv))
                else:
                    mixer, mixer_dim = _mixer(entry, dim, dims[i], grid, positions)
                    blocks.append(Block(dim, mixer, mixer_dim=mixer_dim, **place | block))
                dim = dims[i]
            reduction *= strides[i]
            stages.append(Stage(*blocks))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self.stages = nn.ModuleList(stages)
        self.head = Head(dim, num_classes)

    def features(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> list[torch.Tensor]:
        """The output of every stage, [B, H_i, W_i, C_i] or [B, T_i, C_i]: channels last, as all tokens here.

        Args:
            x: Images [B, in_chans, H, W] or signals [B, in_chans, T].
            valid: As in `forward`. Of a stage's tokens those are real that `valid` is True of at every
                `reduction`-th pixel.
        """
        outputs = []
        x, valid = self._stem(x, valid)
        for stage in self.stages:
            x, valid = stage(x, valid), _real_after(stage, valid)
            outputs.append(x)
        return outputs

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Class scores [B, num_classes] of images [B, in_chans, H, W] or signals [B, in_chans, T].

        Args:
            x: Images or signals of one size, smaller ones padded at their ends with anything.
            valid: bool [B, H, W] or [B, T], True at real pixels or samples: those from the first up to the
                sample's own size. Scores are then those of each sample alone; in training, batch norms count real
                tokens only.

        Raises:
            ValueError: `valid` of another shape, or an operator that would let padding through, which says so.
        """
        x, valid = self._stem(x, valid)
        for stage in self.stages:
            x, valid = stage(x, valid), _real_after(stage, valid)
        return self.head(x, valid)

    def _stem(self, x: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        if valid is not None:
            valid = check_valid("Backbone", valid, (x.shape[0], *x.shape[2:]))
        return self.stem(x, valid), strided(valid, 2)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone, besides those of one axis; timm's optimizers ask."""
        return undecayed_parts(self)

    @property
    def ablatable(self) -> tuple[str, ...]:
        """Those of "skip", "mlp" and "positions" whose removal changes this network; an ablation of others is idle."""
        blocks = [block for stage in self.stages for block in stage.children()]
        there = {
            "skip": any(getattr(block, "shortcut", None) is not None for block in blocks),
            "mlp": any(getattr(block, "mlp", None) is not None for block in blocks),
            "positions": any(getattr(part, "position_bias", False) for part in self.stages.modules()),
        }
        return tuple(name for name, changes in there.items() if changes)


class Stage(nn.Sequential):
    """Blocks one after the other, each told which of its tokens are real."""

    @property
    def stride(self) -> int:
        """Of all blocks together."""
        strides: list[int] = [block.stride for block in self]  # type: ignore[misc]
        return math.prod(strides)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        for block in self:
            x, valid = block(x, valid), _real_after(block, valid)
        return x


def _real_after(part: nn.Module, valid: torch.Tensor | None) -> torch.Tensor | None:
    """Which tokens that a block or a stage gives are real."""
    return strided(valid, part.stride)  # type: ignore[arg-type]


class Stem(nn.Module):
    """CoAtNet's S0: 3x3 convolution with stride 2, BN, GELU, 3x3 convolution.

    Shape: [B, in_chans, H, W] -> [B, ceil(H / 2), ceil(W / 2), dim]; with rank 1 [B, in_chans, T] ->
    [B, ceil(T / 2), dim], by kernels of height 1. Between the convolutions are hidden_dim channels, dim by default.
    """

    def __init__(self, in_chans: int, dim: int, rank: int = 2, *, hidden_dim: int | None = None):
        super().__init__()
        self.in_chans, self.rank = in_chans, rank
        hidden = dim if hidden_dim is None else hidden_dim
        kernel, padding = (3, 1) if rank == 2 else ((1, 3), (0, 1))
        self.conv1 = nn.Conv2d(in_chans, hidden, kernel, stride=2, padding=padding, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden, eps=1e-3, momentum=0.1)
        self.act: nn.Module = nn.GELU()
        self.conv2 = nn.Conv2d(hidden, dim, kernel, padding=padding, bias=False)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        if x.ndim != self.rank + 2:
            needed = "signals [B, C, T]" if self.rank == 1 else "images [B, C, H, W]"
            raise ValueError(f"x has shape {tuple(x.shape)}; this network takes {needed}: see img_size")
        if x.shape[1] != self.in_chans or 0 in x.shape[2:]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this network takes {self.in_chans} channels of a pixel or more"
            )
        x = x if valid is None else x.masked_fill(~valid[:, None], 0)  # the convolution's own padding
        valid = strided(valid, 2)
        x = x[:, :, None] if self.rank == 1 else x
        # In channels_last memory the output is already laid out as tokens.
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.act(normed(self.norm1, self.conv1(x), valid))
        x = x if valid is None else x.masked_fill(~valid.view(len(x), 1, *x.shape[2:]), 0)
        x = self.conv2(x).movedim(1, -1)
        return x[:, 0] if self.rank == 1 else x


class Head(nn.Module):
    """Mean over the grid's real tokens, LN, linear map: [B, *S, dim] -> [B, num_classes]."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        return self.fc(self.norm(mean_of(x, valid)))


def _mixer(entry: str, dim: int, out_dim: int, grid: tuple[int, ...], positions: bool) -> tuple[nn.Module, int]:
    """The operator of a Block, built for its output grid, and the width that it takes."""
    spec = LETTERS.get(entry, entry)
    context: dict[str, Any] = {"rank": len(grid), "grid_size": grid}
    if not positions:
        context["position_bias"] = False
    mixer = build(spec, out_dim, out_dim=out_dim, **context)
    _fits_a_block(mixer, entry, len(grid))
    mixer_dim = out_dim
    widens = "out_dim" in inspect.signature(type(mixer)).parameters
    if dim != out_dim and widens:  # as CoAtNet's attention does in the first block of a stage
        mixer = build(spec, dim, out_dim=out_dim, **context)
        mixer_dim = dim
    if getattr(mixer, "out_dim", out_dim) != out_dim or getattr(mixer, "stride", 1) != 1:
        raise ValueError(f"{entry}: a block's operator keeps width and grid; leave out_dim and stride to the stage")
    if not positions and any(getattr(part, "position_bias", False) for part in mixer.modules()):
        raise ValueError(f"{entry}: asks for a position bias, positions=False takes it away; leave one of them out")
    return mixer, mixer_dim


def _fits_a_block(mixer: nn.Module, entry: str, rank: int) -> None:
    """Refuses an operator that a block could not call, or whose output it could not add."""
    name = type(mixer).__name__
    if getattr(mixer, "needs_source", False):
        raise ValueError(
            f"{name}: reads a source besides its tokens, and a layout has none; {entry} cannot be an entry"
        )
    own = getattr(mixer, "rank", None)
    if own not in (None, rank):
        raise ValueError(f"{name}: works on grids of rank {own}, this network's have rank {rank}: see img_size")
    out_grid = getattr(mixer, "out_grid", None)
    some = (4,) * rank
    if out_grid is not None and getattr(mixer, "stride", 1) == 1 and tuple(out_grid(some)) != some:
        raise ValueError(f"{name}: makes a grid of {tuple(out_grid(some))} of {some}; an entry keeps the grid: {entry}")
