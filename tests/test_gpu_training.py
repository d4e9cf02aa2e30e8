"""What training on a GPU needs of it and of the kernels: back ends that are right, no growing memory, no waiting."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import glocal
from glocal.training import NotFinite, train

from .small_run import Stop, StopAt, easy, run

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
BACK_ENDS = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
ERRORS = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of a tensor, relative to its norm
SPECS = (
    "DepthwiseConv(kernel_size=7)",
    "DynamicDepthwiseConv(kernel_size=7)",
    "InhomogeneousDepthwiseConv(kernel_size=7, num_groups=2)",
    "NeighborhoodAttention(kernel_size=7, num_heads=2)",
    "NeighborhoodAttention(kernel_size=5, num_heads=2, border='shifted')",
    "WindowAttention(window_size=7, num_heads=2, shift_size=3)",
    "RelativeAttention(grid_size=(15, 13), num_heads=2)",
    "QuadraticAttention(num_heads=3)",
)
STEPS = 1000


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [49, 64, 196])
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=lambda b: b.name)
def test_every_back_end_of_the_library_is_right_or_refuses(back_end, tokens, biased, dtype, record_property):
    q, k, v, upstream = torch.randn(4, 8, 3, tokens, 32, device="cuda").to(dtype).unbind(0)
    bias = torch.randn(1, 3, tokens, tokens, device="cuda").to(dtype) if biased else None
    leaves = [t.requires_grad_() for t in (q, k, v) + ((bias,) if biased else ())]
    exact = [t.detach().double().requires_grad_() for t in leaves]

    def results(tensors, above, chosen):
        with sdpa_kernel(chosen):
            out = scaled_dot_product_attention(*tensors[:3], attn_mask=tensors[3] if biased else None)
        return [out, *torch.autograd.grad(out, tensors, above)]

    try:
        found = results(leaves, upstream, back_end)
    except RuntimeError as why:
        pytest.skip(f"refused: {why}".splitlines()[0])
    wanted = results(exact, upstream.double(), SDPBackend.MATH)
    for name, a, b in zip(("y", "q", "k", "v", "bias"), found, wanted, strict=False):
        off = ((a.double() - b).norm() / b.norm()).item()
        record_property(name, off)
        assert off <= ERRORS[dtype], f"{name}: off by {off:.1e} of its norm"  # NaN is no less


def step(mixer, x, upstream):
    return torch.autograd.grad(mixer(x), [x, *mixer.parameters()], upstream)


@pytest.mark.parametrize("spec", SPECS)
def test_memory_does_not_grow(spec, record_property):
    mixer = glocal.build(spec, 32).to("cuda", torch.bfloat16)
    x = torch.randn(4, 15, 13, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(x)
    for _ in range(10):
        step(mixer, x, upstream)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(STEPS):
        step(mixer, x, upstream)
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    record_property("bytes", after)
    assert after == before


@pytest.mark.parametrize("spec", SPECS)
def test_a_step_can_be_captured_and_replayed(spec):
    """A graph of the device holds all of it, so the host neither waits for the device nor works for each call."""
    mixer = glocal.build(spec, 32).to("cuda", torch.bfloat16)
    x = torch.randn(4, 15, 13, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(x)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(mixer, x, upstream)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(mixer, x, upstream)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(found, step(mixer, x, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_network_learns_and_goes_on_after_an_interruption(precision, tmp_path):
    config = run(epochs=6, precision=precision, crop_padding=1, flip=False)
    with pytest.raises(Stop):
        train(config, easy(), tmp_path, listener=StopAt(7), checkpoint_seconds=0)
    result = train(config, easy(), tmp_path)
    assert [epoch.epoch for epoch in result.epochs] == [1, 2, 3, 4, 5, 6]
    assert result.test_accuracy == result.train_accuracy == 100
    assert result.epochs[-1].train_loss < 0.5 * result.epochs[0].train_loss


@pytest.mark.parametrize("seconds", [0, 30])
def test_a_loss_that_is_not_finite_is_not_kept(seconds, tmp_path):
    """Without states within an epoch it is read when the next step is already on its way."""
    with pytest.raises(Stop):
        train(run(lr=1e30, warmup=1.0), easy(), tmp_path, listener=StopAt(1), checkpoint_seconds=0)
    with pytest.raises(NotFinite, match=r"the loss is (nan|inf) at step \d+ of 12"):
        train(run(lr=1e30, warmup=1.0), easy(), tmp_path, checkpoint_seconds=seconds)
    [kept] = (tmp_path / "checkpoints").iterdir()
    assert all(value.isfinite().all() for value in load_file(kept / "weights.safetensors").values())
