"""Every example on a GPU: the same numbers as on the CPU, forward and backward, eager and compiled."""

import copy

import pytest
import torch

from glocal import contract
from glocal.evidence import random_mixer, tokens, with_grads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def on_gpu(spec, dtype):
    mixer = random_mixer(spec)
    grid = (13, 7) if contract.fits(spec, (13, 7)) else (21,)
    x = tokens(2, *grid)
    expected = with_grads(mixer, mixer.reference, x)
    return copy.deepcopy(mixer).to("cuda", dtype), x.to("cuda", dtype), expected


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 2e-3), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("spec", contract.examples())
def test_same_numbers_as_on_the_cpu(spec, dtype, relative):
    mixer, x, expected = on_gpu(spec, dtype)
    found = with_grads(mixer, mixer, x)
    for name in expected if dtype != torch.bfloat16 else ["the output"]:
        largest = max(expected[name].abs().max().item(), 1e-3)
        assert (found[name].cpu().double() - expected[name]).abs().max() <= relative * largest, name


@pytest.mark.parametrize("spec", contract.examples())
def test_compiled(spec):
    mixer, x, expected = on_gpu(spec, torch.float32)
    if "compiles" in mixer.exempt:
        pytest.skip(mixer.exempt["compiles"])
    torch._dynamo.reset()
    found = with_grads(mixer, torch.compile(mixer, fullgraph=True), x)
    largest = expected["the output"].abs().max().item()
    assert (found["the output"].cpu().double() - expected["the output"]).abs().max() <= 2e-3 * largest
