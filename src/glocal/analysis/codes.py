"""One byte for each entry of a row, and back: weights in equal steps, scores in steps that grow as weights fall.

A score s counts in its softmax by exp(s - highest), so that one that lies d below the highest may be off by exp(d)
times as much. Steps are therefore `STEP` * exp(d) wide near the top, and where that would be wider than 1/`PARTS` of
the row's range, as wide as this. Where a second term is known, "the highest" is for each entry the lower of two: the
highest content, and what would make the sum the highest sum; so the softmax of the content alone and that of the sum
are both met.

Shape letters: G heads, Q queries, K entries of a row.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

STEP = 1.5 / 128  # of a score at the top: the weight is off by half of it at most, relative to the largest
PARTS = 64  # of a row's range, so that scores themselves are off by 1/128 of it at most
EMPTY = 255  # the code of an entry that the softmax leaves out
FINE = 0.002  # the widest step of a table of 16 bits
ROUND = 2.0**-10  # scales of scores are multiples of it: their last bits would fill a page, and say nothing


@dataclass(frozen=True)
class Rows:
    """Coded rows of one image.

    Args:
        codes: uint8 [G|1, Q|1, K]; of a table uint16; float32 where values are kept as they are.
        scales: float32. Of weights [G|1, Q|1, 1]: the value of one step (signed codes count from 128). Of scores
            [G|1, Q|1, 3]: the highest of the term, its range, and the logarithm of the softmax's denominator, so that
            what all entries are off by does not add up. Beside a second term [G|1, Q|1, 6]: also the highest sum, and
            the denominators of the sum and of the second term. Of a table [G|1, 2]: the lowest value, and the step.
    """

    codes: np.ndarray
    scales: np.ndarray

    def decoded(self) -> Tensor:
        """The values of a table."""
        if self.codes.dtype == np.float32:
            return torch.from_numpy(self.codes).double()
        low, step = torch.from_numpy(self.scales).double()[:, None, None].unbind(-1)
        return low + step * torch.from_numpy(self.codes.astype(np.float64))


def coded_weights(weights: Tensor, signed: bool, *, shared: bool = False) -> Rows:
    """[G|1, N|1, K] in 255 steps of the largest, or 127 to either side; as they are where queries share a row.

    What is largest of a shared row may lie outside for some queries, and such rows are few.
    """
    w = weights.detach().double().cpu()
    if shared:
        return Rows(w.float().numpy(), np.ones((*w.shape[:2], 1), np.float32))
    steps = 127 if signed else 255
    scale = w.abs().amax(-1, keepdim=True).float() / steps
    codes = torch.where(scale > 0, w / scale, 0).round() + (128 if signed else 0)
    return Rows(codes.clamp(0, 255).to(torch.uint8).numpy(), scale.numpy())


def table_of(term: Tensor) -> Rows:
    """A term [G|1, N|1, K] that the other is coded beside: 16 bits where steps are fine enough, else 32.

    One step for a whole head, so that what is equal stays equal and compresses.
    """
    t = term.detach().double().cpu()
    low, high = t.amin((1, 2)).float(), t.amax((1, 2)).float()
    step = (high - low) / 65535
    scales = torch.stack([low, step], -1).numpy()
    if float(step.max()) > FINE:
        return Rows(t.float().numpy(), scales)
    low, step = low.double()[:, None, None], step.double()[:, None, None]
    codes = torch.where(step > 0, (t - low) / step, 0).round().clamp(0, 65535)
    return Rows(codes.to(torch.int32).numpy().astype(np.uint16), scales)


def coded_scores(term: Tensor, other: Tensor | None, seen: Tensor, over: Tensor) -> Rows:
    """A term [G|1, N|1, K] of a softmax, beside what a page has of the other.

    Args:
        term: what is coded.
        other: the decoded second term.
        seen: bool, broadcastable: the entries that are shown.
        over: bool, broadcastable: those that the softmax runs over; with some operators more.
    """
    t, seen, over = torch.broadcast_tensors(term.detach().double().cpu(), seen.cpu(), over.cpu())
    if other is not None:
        t, seen, over, other = torch.broadcast_tensors(t, seen, over, other)
    highest = _highest(t, seen)
    bound, scales = highest, [highest, _denominator(t, over)]
    if other is not None:
        highest_sum = _highest(t + other, seen)
        bound = torch.minimum(highest, highest_sum - other)
        scales += [highest_sum, _denominator(t + other, over), _denominator(other, over)]
    below = torch.where(seen, bound - t, 0).clamp(min=0)
    spread = _upwards(below.amax(-1, keepdim=True))
    scales.insert(1, spread)
    codes = torch.where(seen, _level(below, spread).round(), EMPTY).to(torch.uint8)
    return Rows(codes.numpy(), torch.cat(scales, -1).float().numpy())


def _highest(t: Tensor, seen: Tensor) -> Tensor:
    """Of every row, or a little more; 0 where nothing is seen."""
    return _upwards(t.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True).nan_to_num(neginf=0))


def _upwards(values: Tensor) -> Tensor:
    """The next multiple of `ROUND`, or of less for small ones, as float32 holds it."""
    unit = torch.where(values.abs() > 64 * ROUND, ROUND, ROUND**2)
    return ((values / unit).ceil() * unit).float().double()


def _denominator(t: Tensor, seen: Tensor) -> Tensor:
    found = t.masked_fill(~seen, -torch.inf).logsumexp(-1, keepdim=True).nan_to_num(neginf=0)
    return (found / ROUND).round() * ROUND


def _steps(spread: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The narrow and the wide step, how far down the wide ones begin, and at which level."""
    wide = spread / PARTS
    narrow = wide.clamp(max=STEP)
    knee = torch.where(wide > narrow, (wide / narrow).log(), 0)
    return narrow, wide, knee, torch.where(narrow > 0, (1 - (-knee).exp()) / narrow, 0)


def _level(below: Tensor, spread: Tensor) -> Tensor:
    narrow, wide, knee, level = _steps(spread)
    near = (1 - (-below).exp()) / narrow
    far = level + (below - knee) / wide
    return torch.where(spread > 0, torch.where(below < knee, near, far), 0)
