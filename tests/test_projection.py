"""The projection of attention may be adapted: it is called as a module, with its hooks."""

import pytest
import torch
from torch import nn

import glocal


def test_an_adapted_projection_is_called():
    """As LoRA, quantisation and hooks on `qkv` need it."""

    class Adapted(nn.Linear):
        def forward(self, tokens):
            return super().forward(tokens) + 1

    m, x = glocal.build("SelfAttention(num_heads=2)", 8), torch.randn(2, 5, 4, 8)
    plain, adapted = m(x), Adapted(8, 24)
    adapted.load_state_dict(m.qkv.state_dict())
    m.qkv = adapted
    shifted = glocal.build("SelfAttention(num_heads=2)", 8)
    shifted.load_state_dict(m.state_dict())
    with torch.no_grad():
        shifted.qkv.bias += 1
    torch.testing.assert_close(m(x), shifted(x))
    assert not torch.allclose(m(x), plain)
    seen = []
    shifted.qkv.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(shifted(x), m(x))
    assert seen


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_hook_may_change_what_goes_into_the_projection(impl):
    mixer, x = glocal.build("SelfAttention(num_heads=2)", 8), torch.randn(2, 5, 8)
    mixer.impl = impl
    expected = mixer(2 * x)
    mixer.qkv.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    torch.testing.assert_close(mixer(x), expected)


# planted by scripts/mutate
FAULTS = {
    ("mixers/_attention.py", "mixers/test_self_attention.py", "test_contract.py"): (
        ("scores are not scaled", "return out * self.scale if part == 0 else out", "return out"),
        ("the fast path scales twice", "is_causal=causal, scale=1.0)", "is_causal=causal)"),
        (
            "a row that sees nothing is NaN",
            "scores.masked_fill(~seen, torch.finfo(scores.dtype).min)",
            'scores.masked_fill(~seen, -float("inf"))',
        ),
        (
            "a row that sees nothing is the mean of what it may not see",
            "return masked(scores, seen).softmax(-1) * seen",
            "return masked(scores, seen).softmax(-1)",
        ),
        (
            "channels of a head lie apart",
            "self._inner).unflatten(-1, (self.num_heads, -1))",
            "self._inner).unflatten(-1, (-1, self.num_heads)).transpose(-1, -2)",
        ),
        ("keys are taken for values", "return self.heads(source, 2)", "return self.heads(source, 1)"),
    ),
    ("mixers/_attention.py", "test_contract.py -k=double_backward-SelfAttention"): (
        (
            "a second derivative of the fused kernel fails without saying what to do",
            "        out.register_hook(_no_second_derivative)",
            "        pass",
        ),
    ),
    "mixers/_attention.py": (
        ("an adapted projection is not called", "if type(projection) is nn.Linear and not ", "if not "),
        ("a projection's hooks are not called", " and not projection._forward_hooks", ""),
        ("a projection's hooks on what goes in are not called", " and not projection._forward_pre_hooks", ""),
    ),
    (
        "mixers/_focal.py",
        "mixers/test_focal_attention.py",
        "mixers/test_released_focal_attention.py",
        "test_contract.py",
    ): (
        (
            "the ring is moved to the start of every axis first",
            "product((expand, -expand), repeat=len(window))",
            "product((-expand, expand), repeat=len(window))",
        ),
        (
            "biases of the ring are those of the first slots",
            "self.relative_position_bias_table_to_neighbors[0, :, :, self._ring_kept]",
            "self.relative_position_bias_table_to_neighbors[0, :, :, : len(self._ring_kept)]",
        ),
        (
            "biases of pooled windows are mirrored",
            "place[:, None] - coarse + focal_window // 2",
            "place[:, None] + coarse + focal_window // 2",
        ),
        (
            "pooled windows stand where their first token does",
            "centres = [(1 - w) / (2 * w) for w in self._window]",
            "centres = [0 for w in self._window]",
        ),
        (
            "a window of padding alone is seen",
            "torch.cat([in_window.any(-1), tokens], 1)",
            "torch.cat([torch.ones_like(in_window[..., 0]), tokens], 1)",
        ),
        ("padding is pooled", "x = x.masked_fill(~valid[..., None], 0)", "pass"),
        (
            "sources of tokens are counted from the pooled ones' first",
            "torch.where(fine < 0, fine, fine + math.prod(counts))",
            "fine",
        ),
        (
            "the last column of a grid is outside",
            "inside & (at >= 0) & (at < size)",
            "inside & (at >= 0) & (at < size - (size > 1))",
        ),
        (
            "windows at the end that are filled in part are left out of the pooled ones",
            "tuple((n + w - 1) // w for n, w in zip(grid, self._window, strict=True))",
            "tuple(max(n // w, 1) for n, w in zip(grid, self._window, strict=True))",
        ),
        (
            "no gradient reaches the pooling",
            "pooled = self.pool_layers[0](in_window.transpose(-1, -2)).squeeze(-1)",
            "pooled = self.pool_layers[0](in_window.transpose(-1, -2)).squeeze(-1).detach()",
        ),
        (
            "queries of a subset have the places of the first ones",
            "window, place = window[queries], place[queries]",
            "window = window[queries]; place = place[: len(window)]",
        ),
    ),
}
