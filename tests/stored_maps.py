"""What tests of weights stored for a page share: the page's arithmetic, written again, and calls to store."""

import math

import numpy as np
import torch
from torch import nn

import glocal
from glocal.aggregation import Aggregation, grid_positions


def below(code, spread):
    """How far below the highest a code lies: equal steps of the weight near the top, of the score further down."""
    wide = spread / 64
    narrow = min(wide, 1.5 / 128)
    knee = math.log(wide / narrow) if wide > narrow else 0.0
    level = (1 - math.exp(-knee)) / narrow if narrow else 0.0
    return -math.log(max(1 - code * narrow, 1e-9)) if code < level else knee + (code - level) * wide


def at(array, head, query):
    return array[min(head, array.shape[0] - 1), min(query, array.shape[1] - 1)]


def table_row(table, head, query):
    low, step = (float(v) for v in table.scales[min(head, len(table.scales) - 1)])
    row = at(table.codes, head, query)
    return row.astype(float) if row.dtype == np.float32 else low + step * row.astype(float)


def score_row(rows, table, head, query):
    """The coded term, NaN where the softmax does not run, and the other."""
    codes, scales = at(rows.codes, head, query), at(rows.scales, head, query)
    other = np.zeros(len(codes)) if table is None else np.broadcast_to(table_row(table, head, query), len(codes))
    top = [scales[0] if table is None else min(scales[0], scales[3] - p) for p in other]
    term = [math.nan if c == 255 else t - below(int(c), float(scales[1])) for c, t in zip(codes, top, strict=True)]
    return np.array(term), other, scales


def of(entries, image):
    return entries[min(image, len(entries) - 1)] if entries else None


def slots(found, image, head, query, terms="both"):
    """One row as the page has it."""
    rows = of(found.rows, image)
    if found.kind == "mixture":
        share = found.shares["content share"][head]
        share = {"both": share, "content": 1, "position": 0}[terms]
        parts = [at(p.codes, head, query) * at(p.scales, head, query) for p in (rows, of(found.table, image))]
        return share * parts[0] + (1 - share) * parts[1]
    if found.kind != "scores":
        middle = 128 if found.kind == "signed" and rows.codes.dtype == np.uint8 else 0
        return (at(rows.codes, head, query).astype(float) - middle) * at(rows.scales, head, query)
    term, other, scales = score_row(rows, of(found.table, image), head, query)
    if terms == "both":
        return np.nan_to_num(np.exp(term + other - scales[4 if found.table else 2]))
    if terms == found.terms[0]:
        return np.nan_to_num(np.exp(term - scales[2]))
    return np.where(np.isnan(term), 0, np.exp(other - scales[5]))


def row_of(found, image, head, query, terms="both"):
    """[M] of one row."""
    values = slots(found, image, head, query, terms)
    if not found.index:
        return values
    total = np.zeros(found.sources.prefix + math.prod(found.sources.grid))
    index = at(of(found.index, image), head, query)
    for k in range(max(len(values), len(index))):
        if index[min(k, len(index) - 1)] >= 0:
            total[index[min(k, len(index) - 1)]] += values[min(k, len(values) - 1)]
    return total


def assert_near(found, row, of_row=128):
    assert np.abs(found - row).max() <= np.abs(row).max() / of_row + 1e-12


class Net(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x, **part.besides(x))
        return x


def recorded(mixer, x):
    with torch.no_grad(), glocal.inspect(mixer) as seen:
        mixer(x, **mixer.besides(x))
    return list(seen)


def aggregation(weights, index=None, queries=4):
    places, index = grid_positions((1, 4)), None if index is None else torch.tensor(index)
    return Aggregation(torch.tensor(weights), index, 4, places[:queries], places, (1, queries), (1, 4))
