"""What the tests of the padded attentions share: an oracle that pads with torch and adds up place by place."""

from itertools import product

import torch
from torch.nn import functional as F

MODES = {"zeros": "constant", "replicate": "replicate", "reflect": "reflect", "circular": "circular"}


def by_loop(score, kernel, *, stride, dilation, padding, groups, mode):
    """A convolution's place for every query, head by head; `score(head, place, query)`, both in tokens of x.

    `padding` has a pair for each axis. Returns a function of x, value [K, groups, c, o] and bias.
    """
    heads = len(list(product(*map(range, kernel))))

    def oracle(x, value, bias):
        grid = x.shape[1:-1]
        sides = [n for pair in reversed(padding) for n in pair]
        padded = F.pad(x.movedim(-1, 1), sides, MODES[mode]).movedim(1, -1)
        places = list(product(*(range(-a, n + b) for n, (a, b) in zip(grid, padding, strict=True))))
        read = padded.flatten(1, -2).unflatten(-1, (groups, -1))  # [B, E, g, c]
        out = [
            (n + sum(pair) - d * (k - 1) - 1) // s + 1
            for n, pair, d, k, s in zip(grid, padding, dilation, kernel, stride, strict=True)
        ]
        rows = []
        for number in product(*map(range, out)):
            query = [i * s for i, s in zip(number, stride, strict=True)]
            total = 0
            for head in range(heads):
                shares = torch.stack([score(head, place, query) for place in places]).softmax(0)
                mixed = (shares[:, None, None] * read).sum(1)
                total = total + (mixed[..., None] * value[head]).sum(2).flatten(1)
            rows.append(total if bias is None else total + bias)
        return torch.stack(rows, 1).view(len(x), *out, -1)

    return oracle


CASES = [  # grid, kernel, stride, dilation, padding, groups, out_dim, mode
    ((3, 4), (3, 3), (1, 1), (1, 1), (1, 1), 1, 4, "zeros"),
    ((3, 4), (2, 3), (1, 1), (1, 2), (1, 2), 2, 6, "zeros"),
    ((4, 3), (3, 2), (2, 1), (1, 1), (1, 0), 4, 4, "zeros"),
    ((4, 5), (1, 1), (2, 3), (1, 1), (0, 0), 1, 2, "zeros"),
    ((4, 4), (2, 2), (2, 2), (1, 1), (0, 0), 4, 8, "replicate"),
    ((3, 4), (1, 3), (1, 2), (1, 1), (1, 2), 2, 2, "reflect"),
    ((3, 3), (2, 2), (1, 1), (1, 1), (1, 2), 1, 3, "circular"),
    ((6,), (3,), (1,), (2,), (2,), 1, 4, "zeros"),
    ((7,), (2,), (2,), (1,), (1,), 4, 4, "reflect"),
    ((5,), (4,), (1,), (1,), (3,), 2, 6, "circular"),
]


def spec_of(name, kernel, stride, dilation, padding, groups, out_dim, mode, **more):
    given = {"kernel_size": kernel, "stride": stride, "dilation": dilation, "padding": padding, "groups": groups}
    given |= {"out_dim": out_dim, "padding_mode": mode, "rank": len(kernel)} | more
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in given.items())})"
