"""LocallyEnhancedAttention as its released layer computes it, written out densely: image by image, offset by offset."""

import pytest
import torch
from torch import nn

DIM = 16


def spec_of(grid_size, **arguments):
    options = {"grid_size": grid_size, "num_groups": 2, **arguments}
    return f"LocallyEnhancedAttention({', '.join(f'{k}={v!r}' for k, v in options.items())})"


def resized(table, n):
    """[L, C] linearly to 2n - 1 entries, by hand: centres at halves, the last entry repeated."""
    old, new, rows = len(table), 2 * n - 1, []
    for target in range(new):
        place = max((target + 0.5) * old / new - 0.5, 0.0)
        low = int(place)
        rows.append((1 - place + low) * table[low] + (place - low) * table[min(low + 1, old - 1)])
    return torch.stack(rows)


def normalised(parts, norm, seen=None):
    """Batch norm of the last axis over all images together, by the statistics that its mode asks for."""
    mean, var = norm.running_mean, norm.running_var
    if norm.training:
        rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        mean = rows.sum(0) / len(rows)
        var = (rows - mean).square().sum(0) / len(rows)
        if seen is not None:
            seen[norm] = (mean.detach(), var.detach() * len(rows) / (len(rows) - 1))
    return [(part - mean) / (var + 1e-5).sqrt() * norm.weight + norm.bias for part in parts]


def vectors_for_positions(mixer, height, width):
    """What is added to queries, keys and values: f(i, j) -> three vectors, or one for queries alone."""
    if mixer.position == "classification":
        table, middle = resized(mixer.relative.T, height * width), height * width - 1
        c = DIM // mixer.num_groups // 2
        return lambda i, j: (
            table[middle + i - j, :c],
            table[middle + j - i, c : -2 * c],
            table[middle + i - j, -2 * c :],
        )
    rows, columns = resized(mixer.rel_height, height), resized(mixer.rel_width, width)
    return lambda i, j: (rows[j // width - i // width + height - 1] + columns[j % width - i % width + width - 1],)


def written_out(mixer, images, seen=None):
    """U, B, w (None without U) and the softmax [G, N, N] of each image [H, W, C]."""
    groups, key_dim = mixer.num_groups, DIM // mixer.num_groups // 2
    qkv = normalised([image.flatten(0, 1) @ mixer.qkv_transform.weight.T for image in images], mixer.bn_qkv, seen)
    similarity, added = [], []
    for image, rows in zip(images, qkv, strict=True):
        count = len(rows)
        q, k, _ = rows.view(count, groups, 4 * key_dim).split([key_dim, key_dim, 2 * key_dim], -1)
        at = vectors_for_positions(mixer, *image.shape[:2])
        each = [[at(i, j) for j in range(count)] for i in range(count)]
        maps = [torch.einsum("igc,jgc->ijg", q, k)]
        maps.append(torch.stack([torch.stack([q[i] @ each[i][j][0] for j in range(count)]) for i in range(count)]))
        if mixer.position == "classification":
            maps.append(torch.stack([torch.stack([k[j] @ each[i][j][1] for j in range(count)]) for i in range(count)]))
            added.append(torch.stack([torch.stack([each[i][j][2] for j in range(count)]) for i in range(count)]))
        similarity.append(torch.cat(maps, -1))
    softmax = [
        part.unflatten(-1, (-1, groups)).sum(-2).softmax(1).movedim(-1, 0)
        for part in normalised(similarity, mixer.bn_similarity, seen)
    ]
    stacked = []
    for b, (rows, shares) in enumerate(zip(qkv, softmax, strict=True)):
        v = rows.view(len(rows), groups, 4 * key_dim)[..., 2 * key_dim :]
        sums = [torch.einsum("gij,jgc->igc", shares, v)]
        if added:
            sums.append(torch.einsum("gij,ijc->igc", shares, added[b]))
        stacked.append(torch.stack(sums, -1).flatten(1))  # the two of a channel side by side
    stacked = normalised(stacked, mixer.bn_output, seen)
    binary = [s.view(*image.shape, -1).sum(-1) for s, image in zip(stacked, images, strict=True)]
    if mixer.unary is None:
        return None, binary, None, softmax

    unary = []
    for image in images:
        planes, local = image.movedim(-1, 0)[None], mixer.x_transform[0]
        if mixer.unary == "deformable":
            ops = pytest.importorskip("torchvision").ops
            moves = nn.functional.conv2d(planes, local.conv_offset.weight, local.conv_offset.bias, padding=1)
            planes = ops.deform_conv2d(planes, moves, local.weight, padding=1)  # groups follow from the weight
        else:
            planes = nn.functional.conv2d(planes, local.weight, padding=1, groups=groups)
        planes = planes[0].movedim(0, -1)
        unary.append(planes @ mixer.x_transform[1].weight.T if groups > 1 else planes)
    unary = normalised(unary, mixer.bn_x, seen)

    gate = [torch.cat(both, -1).relu() @ mixer.reasoning[1].weight.T for both in zip(unary, binary, strict=True)]
    gate = [g.relu() @ mixer.projection[0].weight.T for g in normalised(gate, mixer.reasoning[2], seen)]
    gate = [g.sigmoid() for g in normalised(gate, mixer.projection[1], seen)]
    return unary, binary, gate, softmax


def outputs(mixer, images, seen=None):
    unary, binary, gate, _ = written_out(mixer, images, seen)
    found = binary if unary is None else [u + w * b for u, b, w in zip(unary, binary, gate, strict=True)]
    s = mixer.stride
    return [
        torch.stack(
            [
                torch.stack([y[i : i + s, j : j + s].mean((0, 1)) for j in range(0, y.shape[1], s)])
                for i in range(0, y.shape[0], s)
            ]
        )
        for y in found
    ]


def by_hand(mixer):
    return lambda x: torch.stack(outputs(mixer, list(x)))


CASES = [  # arguments, grid
    ({"grid_size": (3, 4)}, (3, 4)),
    ({"grid_size": 3, "num_groups": 4}, (2, 5)),
    ({"grid_size": (2, 3), "num_groups": 1, "stride": 2}, (5, 2)),
    ({"grid_size": (3, 4), "position": "detection"}, (3, 4)),
    ({"grid_size": (4, 2), "position": "detection", "num_groups": 4}, (2, 5)),
    ({"grid_size": 2, "position": "detection", "num_groups": 1, "stride": 2}, (3, 4)),
    ({"grid_size": (3, 4), "unary": None}, (3, 4)),
    ({"grid_size": 3, "position": "detection", "unary": None, "stride": 2}, (2, 5)),
    ({"grid_size": (3, 4), "unary": "deformable", "position": "detection"}, (3, 4)),
]
CLASSIFICATION, DETECTION = {"grid_size": (3, 4)}, {"grid_size": (3, 4), "position": "detection"}


def padded(images):
    grid = [max(image.shape[axis] for image in images) + 1 for axis in range(2)]
    x = 100 * torch.randn(len(images), *grid, DIM, dtype=torch.float64)
    valid = torch.zeros(len(images), *grid, dtype=torch.bool)
    for b, image in enumerate(images):
        x[b, : image.shape[0], : image.shape[1]] = image
        valid[b, : image.shape[0], : image.shape[1]] = True
    return x, valid


def moved(mixer, seen):
    """Running statistics after a call, from those before it and what a call saw."""
    expected = {}
    for name, norm in mixer.named_modules():
        if isinstance(norm, nn.BatchNorm1d):
            for buffer, new in zip(("running_mean", "running_var"), seen[norm], strict=True):
                expected[f"{name}.{buffer}"] = 0.9 * getattr(norm, buffer) + 0.1 * new
            expected[f"{name}.num_batches_tracked"] = norm.num_batches_tracked + 1
    return expected
