"""Every check of the contract can fail: for each there is an operator whose promise is broken."""

import dataclasses

import pytest
import torch

import glocal
from glocal import contract, mixers, operator


def instead(owner, name, make):
    """Replaces a method or function by what make(the real one) gives."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def fast(broken):
    """AveragePooling with broken(its output) as the fast path."""
    return instead(
        mixers.AveragePooling,
        "fast",
        lambda real: lambda self, x, values, **call: broken(real(self, x, values, **call)),
    )


def zeroed(aggregation):
    return dataclasses.replace(aggregation, weights=torch.zeros_like(aggregation.weights))


def all_real(real):
    """A padded batch of which every image is taken for full."""
    return lambda tokens, sources, past, valid, *others: real(
        tokens, sources, past, None if valid is None else torch.ones_like(valid), *others
    )


def placed(change):
    """AveragePooling with change(places of its sources)."""
    return instead(
        mixers.AveragePooling,
        "_weights",
        lambda real: (
            lambda self, x, **call: dataclasses.replace(
                found := real(self, x, **call), source_positions=change(found.source_positions)
            )
        ),
    )


def shuffled(real):
    """Of what is remembered, the order is lost: attention's rows still fit, its values do not."""
    return lambda self, name, new, limit=None: real(self, name, new, limit).flip(1 if name == "keys" else 2)


def branch(out):
    return out if out.sum() != 0 else -out


POOLING, CAUSAL = "AveragePooling()", "SelfAttention(num_heads=2, causal=True)"
BROKEN = {  # check -> spec, and what breaks its promise
    "forward_equals_definition": (POOLING, fast(lambda out: out + 1e-6)),
    "empty_batch": (POOLING, fast(lambda out: out + 0 * out[0])),
    "gradient": (POOLING, fast(lambda out: out + 0.1 * out.detach())),
    "double_backward": (
        CAUSAL,
        instead(mixers._attention, "_no_second_derivative", lambda real: lambda grad: None),
    ),
    "dense_says_the_same": (POOLING, instead(glocal.Aggregation, "coalesce", lambda real: zeroed)),
    "positions_are_those_of_the_grid": (
        POOLING,
        instead(
            mixers.AveragePooling,
            "_weights",
            lambda real: (
                lambda self, x, **call: dataclasses.replace(
                    found := real(self, x, **call), query_positions=found.query_positions.flip(-1)
                )
            ),
        ),
    ),
    "scores_make_the_weights": (
        "SelfAttention(num_heads=2)",
        instead(
            mixers.SelfAttention,
            "scores",
            lambda real: lambda self, x: {name: 2 * term for name, term in real(self, x).items()},
        ),
    ),
    "query_subset": (
        POOLING,
        instead(glocal.Aggregation, "select", lambda real: lambda self, queries: real(self, queries.flip(0))),
    ),
    "causal_reads_no_later_token": (
        CAUSAL,
        instead(mixers.self_attention, "_seen", lambda real: lambda *arguments: None),
    ),
    "pieces_equal_the_whole": (
        "LinearAttention(num_heads=2, causal=True)",
        instead(glocal.Cache, "put", lambda real: lambda *arguments: None),
    ),
    "padding_changes_nothing": ("SelfAttention(num_heads=2)", instead(mixers.self_attention, "_seen", all_real)),
    "looking_changes_nothing": (
        "DynamicDepthwiseConv(kernel_size=3)",
        instead(
            mixers.DynamicDepthwiseConv,
            "kernels",
            lambda real: lambda self, x, valid, update: real(self, x, valid, update=self.training),
        ),
    ),
    "forced_fast_never_falls_back": (
        POOLING,
        instead(mixers.AveragePooling, "fast", lambda real: lambda self, x, values, **call: self.reference(x, **call)),
    ),
    "float32": (POOLING, fast(lambda out: out * 1.001)),
    "float64": (POOLING, fast(lambda out: out.float().double())),
    "bfloat16": (POOLING, fast(lambda out: out * 1.05)),
    "autocast": (POOLING, fast(lambda out: out * 1.2)),
    "wrong_shapes_are_refused": (POOLING, instead(operator, "check_tokens", lambda real: lambda *arguments: None)),
    "state_dict_round_trip": (
        "AveragePooling(kernel_size=5)",
        instead(mixers.AveragePooling, "__repr__", lambda real: lambda self: "AveragePooling()"),
    ),
    "declared_cost": (POOLING, instead(mixers.AveragePooling, "macs", lambda real: lambda self, grid: 1)),
    "compiles": (POOLING, fast(branch)),
    "exports": (POOLING, fast(branch)),
}


ALSO = [  # further ways to break the same promise
    ("padding_changes_nothing", CAUSAL, instead(operator, "finite_outside", lambda real: lambda tokens, valid: tokens)),
    ("pieces_equal_the_whole", CAUSAL, instead(glocal.Cache, "join", shuffled)),
    ("positions_are_those_of_the_grid", POOLING, placed(lambda places: places.flip(-1))),
    ("positions_are_those_of_the_grid", POOLING, placed(lambda places: places.flip(0))),
    ("autocast", POOLING, fast(lambda out: out + 0 * (out - out.detach()).abs().sqrt())),  # only the gradient is NaN
]


@pytest.mark.parametrize(("check", "spec", "break_it"), [*((check, *BROKEN[check]) for check in BROKEN), *ALSO])
def test_every_check_of_the_contract_can_fail(check, spec, break_it, monkeypatch):
    promise = getattr(contract, check)
    grid = (6,) if "causal" in spec else (4, 3)
    assert contract.run(spec, promise, grid).state == "kept"
    break_it(monkeypatch)
    outcome = contract.run(spec, promise, grid)
    assert (outcome.state, outcome.check) == ("broken", check)
    assert outcome.sentence and not outcome.sentence.startswith(("TypeError", "AssertionError")), (
        "the breaking itself is broken"
    )


def test_every_check_of_the_contract_is_among_them():
    assert set(BROKEN) == {check.__name__ for spec in contract.examples() for check, _ in contract.cases(spec)}


# planted by scripts/mutate
FAULTS = {
    "contract/__init__.py": (
        (
            "a broken promise counts as refused",
            'return Outcome(*about, "broken", str(error))',
            'return Outcome(*about, "refused", str(error))',
        ),
        (
            "one of the checks runs on no grid",
            "yield from ((check, grid) for grid in grids if rank in (None, len(grid)))",
            "yield from ((check, grid) for grid in grids if rank in (None, len(grid)) and check is not exports)",
        ),
    ),
    "contract/paths.py": (
        (
            "the definition may be called by a forced fast path",
            "setattr(mixer, name, forbidden)",
            "setattr(mixer, name, getattr(mixer, name))",
        ),
    ),
    "contract/weights.py": (
        ("the places of the sources are not looked at", 'close("source_positions", places, expected, 1e-5)', "pass"),
        ("sources may run backwards", "true(bool((steps >= 0).all()),", "true(True,"),
        (
            "no operator's scores have to make its weights",
            "if not torch.allclose(found.weights.sum(-1), torch.ones((), dtype=torch.float64)):",
            "if True:",
        ),
    ),
    "contract/reading.py": (
        (
            "what stands in the padding is finite in every check",
            "    rubbish[..., 0], rubbish[..., 1] = torch.nan, torch.inf\n",
            "",
        ),
        (
            "weights above the diagonal and later tokens are not looked at",
            'return bool(getattr(mixer, "causal", False))',
            "return False",
        ),
    ),
    "contract/forms.py": (("gradients under autocast may be NaN", "true(bool(value.isfinite().all()),", "true(True,"),),
    "evidence.py": (
        ("values may differ by anything", "if not error <= relative * max(largest, 1e-3):", "if error < 0:"),
        (
            "a failed numerical derivative passes",
            "    except GradcheckError as error:\n",
            "    except GradcheckError as error:\n        return\n",
        ),
        ("bfloat16 may be off by the largest entry", "torch.finfo(dtype).eps * largest)", "largest)"),
    ),
}
