"""What published networks share: stages between images and scores, and the methods that users of timm know.

B images, C channels, H W pixels, h w tokens.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glocal.arguments import positive, rate
from glocal.operator import undecayed_parts


class Classifier(nn.Module, ABC):
    """Abstract: images [B, in_chans, H, W] -> scores [B, num_classes], a stem, stages, a head.

    A family defines `stem` and `stages`, fills `feature_info`, and makes its own head; `needed`, `finish`, `pool` with
    `pools`, `map_of` and `no_weight_decay` where the defaults do not hold.

    Args:
        in_chans: channels of an image.
        num_classes: number of scores; 0: no scores but what the head is given.
        num_features: channels that the head is given.

    Attributes:
        feature_info: one dict a stage, as in timm: `num_chs` (channels), `reduction` (pixels along a side of a
            token), `module` (its name).
        grad_checkpointing: see `set_grad_checkpointing`.
        global_pool: how `pool` makes one vector of tokens, in timm's words: "avg", the mean; "token", the class token.
        pools: what that may be; the first is what it is.
        classifiers: names of the linear maps to scores, the one that `forward` uses first.
        after_stages: names of the parts that nothing before the end of the last stage needs.
    """

    pools: ClassVar[tuple[str, ...]] = ("avg",)
    classifiers: ClassVar[tuple[str, ...]] = ("head",)
    after_stages: ClassVar[tuple[str, ...]] = ("norm", "head")

    def __init__(self, *, in_chans: int, num_classes: int, num_features: int) -> None:
        super().__init__()
        self.in_chans, self.num_features = positive("in_chans", in_chans), positive("num_features", num_features)
        self.num_classes, self.global_pool = _classes(num_classes), self.pools[0]
        self.feature_info = FeatureInfo()
        self.grad_checkpointing = False

    # What a family writes.

    @abstractmethod
    def stem(self, x: Tensor) -> Tensor:
        """Images -> the tokens that the first stage takes."""

    @abstractmethod
    def stages(self) -> Sequence[nn.Module]:
        """What is called one after the other, tokens to tokens, one for each entry of `feature_info`."""

    def needed(self, image: Tensor) -> dict[str, Any]:
        """What the call of every block is given besides its tokens: nothing."""
        return {}

    def finish(self, x: Tensor) -> Tensor:
        """What the last stage gives -> `forward_features`: a norm, where there is one."""
        return x

    def pool(self, x: Tensor) -> Tensor:
        """`forward_features` -> what the classifier takes, [B, num_features]: the mean over all tokens."""
        return x.flatten(1, -2).mean(1)

    def map_of(self, x: Tensor, image: Tensor) -> Tensor:
        """What a stage gives -> its tokens as a map, [B, h, w, C]; class tokens, say, are left out."""
        return x

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone, besides those of one axis."""
        return undecayed_parts(self)

    # What is written once.

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens before the head: [B, in_chans, H, W] -> [B, h, w, num_features]."""
        needed = self.needed(self._images(x))
        x = self.stem(x)
        for stage in self.stages():
            x = self._through(stage, x, needed)
        return self.finish(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Scores of `forward_features`; with pre_logits what they are made of, [B, num_features]."""
        x = self.pool(x)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What stages give, as maps [B, C, h, w]: (forward_features(x), maps).

        Args:
            x: images [B, in_chans, H, W].
            indices: which stages: a number of last ones, positions (-1 is the last), or None for all.
            norm: whether the last stage's map is that after the final norm.
            stop_early: stages behind the last one asked for do not run; features are then what that stage gives.
            output_fmt: "NCHW", or "NHWC" for [B, h, w, C].
            intermediates_only: maps alone are returned.

        Raises:
            ValueError: stages that there are not, another output_fmt.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: {output_fmt!r}, must be 'NCHW' or 'NHWC'")
        stages, maps = self.stages(), []
        wanted = chosen(indices, len(stages))
        last = len(stages) - 1
        image = self._images(x)
        needed, x = self.needed(image), self.stem(image)
        for i, stage in enumerate(stages):
            x = self._through(stage, x, needed)
            if i in wanted:
                found = self.map_of(self.finish(x) if norm and i == last else x, image)
                maps.append(found.movedim(-1, 1) if output_fmt == "NCHW" else found)
            if stop_early and i == max(wanted):
                break
        if intermediates_only:
            return maps
        return self.finish(x) if i == last else x, maps

    def get_classifier(self) -> nn.Module:
        """The linear map to scores."""
        return self.get_submodule(self.classifiers[0])

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new linear map for another number of classes; 0: none, what it would be given is returned.

        Args:
            num_classes: number of scores.
            global_pool: one of `pools`; None: as it is. Norms stay where they are, as with timm.

        Raises:
            ValueError: another kind of pooling; nothing has changed then.
        """
        if global_pool is not None and global_pool not in self.pools:
            raise ValueError(
                f"global_pool: {global_pool!r}, {type(self).__name__} has {' and '.join(map(repr, self.pools))}; for "
                "tokens as they are take forward_features"
            )
        self.num_classes = _classes(num_classes)
        self.global_pool = global_pool or self.global_pool
        like = next(self.parameters())
        for name in self.classifiers:
            new = linear_or_none(self.num_features, num_classes)
            self.set_submodule(name, new.to(like.device, like.dtype).train(self.training))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps the inputs of blocks alone, and computes what is in them again: slower, smaller."""
        for part in self.modules():
            if hasattr(part, "grad_checkpointing"):
                part.grad_checkpointing = enable  # type: ignore[assignment]

    def _images(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_chans or 0 in x.shape[2:]:
            raise ValueError(f"x has shape {tuple(x.shape)}; this network takes images [B, {self.in_chans}, H, W]")
        return x

    def _through(self, stage: nn.Module, x: Tensor, needed: dict[str, Any]) -> Tensor:
        if isinstance(stage, Blocks | Stage):  # each of its blocks is checkpointed
            return stage(x, **needed)
        return run(stage, x, **needed, checkpointed=self.grad_checkpointing)


class Blocks(nn.Sequential):
    """Blocks one after the other, of which training may keep the inputs alone."""

    grad_checkpointing = False

    def forward(self, x: Tensor, **needed: Any) -> Tensor:  # type: ignore[override]
        for block in self:
            x = run(block, x, **needed, checkpointed=self.grad_checkpointing)
        return x


class Stage(nn.Module):
    """What makes a grid coarser, and blocks: tokens to tokens."""

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.downsample, self.blocks = downsample, Blocks(*blocks)

    def forward(self, x: Tensor, **needed: Any) -> Tensor:
        return self.blocks(self.downsample(x), **needed)


def run(block: nn.Module, x: Tensor, *, checkpointed: bool, **needed: Any) -> Tensor:
    """block(x, **needed); checkpointed, what it computes on the way is computed again for derivatives."""
    if not checkpointed or not torch.is_grad_enabled():
        return block(x, **needed)
    if any(True for _ in block.buffers()):
        kept = partial(_first_and_again, block)
        return checkpoint(block, x, use_reentrant=False, context_fn=kept, **needed)
    return checkpoint(block, x, use_reentrant=False, **needed)


def _first_and_again(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds a checkpointed block when it runs, and when it runs again for derivatives."""
    return nullcontext(), buffers_kept(block)


@contextmanager
def buffers_kept(block: nn.Module) -> Iterator[None]:
    """Buffers are afterwards what they were: statistics of batch norms count a batch once, however often computed."""
    before = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


class FeatureMaps(nn.Module):
    """Images -> maps of some stages, [B, C, h, w] each: a network without the parts that none of them needs.

    Args:
        model: the network; it is changed.
        out_indices: which stages, as `Classifier.forward_intermediates` has them, in order.

    Attributes:
        feature_info: those of the stages that are given.

    Raises:
        ValueError: stages that there are not.
    """

    def __init__(self, model: Classifier, out_indices: int | Sequence[int] | None = None) -> None:
        super().__init__()
        self.out_indices = chosen(out_indices, len(model.feature_info))
        self.feature_info = FeatureInfo(model.feature_info[i] for i in self.out_indices)
        unused = [info["module"] for info in model.feature_info[self.out_indices[-1] + 1 :]]
        for name in [*unused, *model.after_stages]:
            model.set_submodule(name, nn.Identity())
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(x, self.out_indices, stop_early=True, intermediates_only=True)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `Classifier.set_grad_checkpointing`."""
        self.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone."""
        return {f"model.{name}" for name in self.model.no_weight_decay() if f"model.{name}" in self.state_dict()}


class FeatureInfo(list[dict[str, Any]]):
    """One dict a stage: num_chs, reduction, module."""

    def channels(self) -> list[int]:
        """Channels of every map."""
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        """Pixels along a side of a token, of every map."""
        return [info["reduction"] for info in self]


def chosen(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Positions among `count` stages, in order, as `Classifier.forward_intermediates` takes them."""
    if indices is None:
        return list(range(count))
    given = range(count - indices, count) if isinstance(indices, int) else [i + count if i < 0 else i for i in indices]
    found = sorted(set(given))
    if not found or found[0] < 0 or found[-1] >= count:
        raise ValueError(
            f"indices: {indices!r} of {count} stages; must be a number of last ones, positions below {count}, or None"
        )
    return found


def drop_path_rates(last: float, depths: Sequence[int]) -> Iterator[float]:
    """Rates of stochastic depth of all blocks, from 0 in the first to `last`, growing linearly."""
    last, count = rate("drop_path_rate", last), sum(depths)
    return (last * i / max(1, count - 1) for i in range(count))


def mlp_width(dim: int, mlp_ratio: float) -> int:
    """Hidden channels of an MLP.

    Raises:
        ValueError: a ratio that is no number, or that leaves none.
    """
    if isinstance(mlp_ratio, bool) or not isinstance(mlp_ratio, int | float) or not 1 <= dim * mlp_ratio < math.inf:
        raise ValueError(f"mlp_ratio: {mlp_ratio!r}, must be a number that makes dim {dim} one channel or more")
    return round(dim * mlp_ratio)


def per_stage(name: str, value: Sequence[int], count: int | None = None) -> tuple[int, ...]:
    """One positive number for each of `count` stages, or of as many as there are numbers.

    Raises:
        ValueError: another number of them.
    """
    if not isinstance(value, list | tuple) or len(value) != (count or len(value)) or not value:
        stages = "stage" if count is None else f"of the {count} stages"
        raise ValueError(f"{name}: {value!r}, must have one number for each {stages}")
    return tuple(positive(name, number) for number in value)


def linear_or_none(dim: int, num_classes: int) -> nn.Module:
    """The map of [B, dim] to scores; without classes it changes nothing."""
    return nn.Linear(dim, num_classes) if num_classes else nn.Identity()


def start_linear_maps(model: nn.Module) -> None:
    """First values of all linear maps: truncated normal with deviation 0.02, biases 0."""
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _classes(num_classes: int) -> int:
    return 0 if num_classes == 0 and not isinstance(num_classes, bool) else positive("num_classes", num_classes)
