"""Batch norm for weight paths: can be looked at without moving its statistics, and counts real tokens only."""

import torch
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm1d):
    """Normalises the last axis over all others; parameters and buffers of torch.nn.BatchNorm1d.

    In training it uses the statistics of the call, over the positions where `valid` is True, and moves the
    running ones only if told to.
    """

    def forward(self, x: Tensor, valid: Tensor | None = None, *, update: bool = False) -> Tensor:
        """x [..., C], valid [...] or None -> [..., C].

        Raises:
            ValueError: one real value per channel in training, whose variance is zero by definition.
        """
        assert self.running_mean is not None and self.running_var is not None
        if not self.training:
            return self._normalise(x, self.running_mean, self.running_var)
        if x.numel() == 0:
            return self._normalise(x, torch.zeros_like(self.running_mean), torch.ones_like(self.running_var))
        axes = tuple(range(x.dim() - 1))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if valid is None:
            count = x[..., 0].numel()
            if count == 1:
                raise ValueError(
                    "BatchNorm: one value per channel in training (batch 1 and one pooled or single position); "
                    "use a larger batch, or eval()"
                )
            mean = wide.mean(axes)
            variance = (wide - mean).square().mean(axes)
            unbiased = variance.detach() * (count / (count - 1))
        else:
            real = valid[..., None].to(wide.dtype)
            count = real.sum()
            total = count.clamp(min=1)  # no real token at all: nothing to normalise, and no NaN
            mean = (wide * real).sum(axes) / total
            variance = ((wide - mean).square() * real).sum(axes) / total
            unbiased = variance.detach() * total / (total - 1).clamp(min=1)
        if update:
            self.move(mean, unbiased, None if valid is None else count > 1)
        return self._normalise(x, mean, variance)

    @torch.no_grad()
    def move(self, mean: Tensor, unbiased: Tensor, some: Tensor | bool | None) -> None:
        """Moves the running statistics towards those of a call; not where `some` is False."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        if self.momentum is None:  # the plain average of all batches so far
            share = 1 / self.num_batches_tracked.to(self.running_mean)
        else:  # not through float32, or statistics in float64 would be moved by another number
            share = torch.full((), self.momentum, dtype=self.running_mean.dtype, device=self.running_mean.device)
        if some is not None:  # one value has no variance to learn from
            share = share * some
        self.running_mean.lerp_(mean.detach().to(self.running_mean), share)
        self.running_var.lerp_(unbiased.to(self.running_var), share)

    def _normalise(self, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        scale = self.weight * (variance + self.eps).rsqrt()
        return (x * scale + (self.bias - mean * scale)).to(x.dtype)


def normalise(norm: nn.Module, x: Tensor, valid: Tensor | None, *, update: bool) -> Tensor:
    """A weight path's batch norm, also where torch's converter has put SyncBatchNorm in its place.

    Raises:
        ValueError: SyncBatchNorm in training with padding, or asked to look without moving its statistics: it can
            do neither.
    """
    if isinstance(norm, BatchNorm):
        return norm(x, valid, update=update)
    if norm.training and (valid is not None or not update):
        raise ValueError(
            f"{type(norm).__name__}: in training it counts padding and cannot be looked at without moving its "
            "statistics; leave BatchNorm in place, or call eval()"
        )
    return norm(x.flatten(0, -2)).view(x.shape)
