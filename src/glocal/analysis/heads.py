"""Where do heads look? Centres and precision matrices of the quadratic attentions in a model, as plain numbers.

Training writes them to a run's heads.jsonl, a line before the first step and one after every epoch, if the model has
such heads:

    {"epoch": 0, "layers": {"blocks.0.attn": {"centers": [[row, column], ...],
                                              "precision": [[[a, b], [b, c]], ...]}, ...}}

`epoch` counts finished epochs, 0 before training; the keys of `layers` are the names of modules in the model; both
lists have an entry for each head. Lengths are in tokens of the layer's input. A head's weight falls with the distance
d = source - query - centre as exp(-d^T P d / 2), P its precision. Sequences have one number where images have two.
With an average of the weights (`ema`), it is the average's heads that are told, as it is what is tested and kept.
"""

from torch import nn

from glocal.mixers import GatedPaddedAttention, PaddedQuadraticAttention
from glocal.mixers._quadratic import QuadraticScores


def quadratic_heads(model: nn.Module) -> dict[str, dict[str, list]]:
    """Centres [heads, rank] and precision [heads, rank, rank] of every quadratic attention, by module name."""
    found = {}
    named = dict(model.named_modules())
    for name, module in named.items():
        if isinstance(module, QuadraticScores):
            centres = module.attention_centers
        elif isinstance(module, PaddedQuadraticAttention):
            centres = module.centers
        else:
            continue
        around = name.rpartition(".")[0]
        if isinstance(named[around], GatedPaddedAttention):
            name = around  # which is the operator
        found[name] = {"centers": centres.tolist(), "precision": module.precision().tolist()}
    return found
