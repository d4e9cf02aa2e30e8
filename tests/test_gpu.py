"""Every example on a GPU: the contract in all dtypes, compilation, and attention by each of the library's back ends."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import glocal
from glocal import contract
from glocal.evidence import close, random_mixer, tokens, with_grads

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

CHECKS = (
    contract.forward_equals_definition, contract.empty_batch, contract.padding_changes_nothing,
    contract.pieces_equal_the_whole, contract.forced_fast_never_falls_back, contract.looking_changes_nothing,
    contract.gradient, contract.float32, contract.float64, contract.bfloat16, contract.autocast,
)  # fmt: skip
CASES = [
    pytest.param(spec, check, grid, id=f"{check.__name__}-{'x'.join(map(str, grid))}-{spec}")
    for spec in contract.examples()
    for check, grid in contract.cases(spec)
    if check in CHECKS
]
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
ATTENTIONS = (
    "SelfAttention(num_heads=2)",
    "SelfAttention(num_heads=2, causal=True)",
    "RelativeAttention(grid_size=(8, 8), num_heads=2)",
    "WindowAttention(window_size=8, shift_size=3, num_heads=2)",
)


@pytest.fixture(autouse=True)
def _tensors_are_made_on_the_gpu():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # as for matrix products by default
    with torch.device("cuda"):
        yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(("spec", "check", "grid"), CASES)
def test_the_contract_on_a_gpu(spec, check, grid):
    outcome = contract.run(spec, check, grid)
    assert outcome.state != "broken", outcome.sentence


def on_both(spec):
    """The operator here and on the CPU, with the same tokens and what the CPU's definition gives in float64."""
    grid = (13, 7) if contract.fits(spec, (13, 7)) else (21,)
    with torch.device("cpu"):
        mixer, x = random_mixer(spec), tokens(2, *grid)
        expected = with_grads(mixer, mixer.reference, x)
    return copy.deepcopy(mixer).cuda(), x.cuda(), {name: value.cuda() for name, value in expected.items()}


@pytest.mark.parametrize("spec", contract.examples())
def test_the_same_numbers_as_on_the_cpu(spec):
    mixer, x, expected = on_both(spec)
    for name, value in with_grads(mixer, mixer, x).items():
        close(name, value, expected[name], 1e-9)


@pytest.mark.parametrize("spec", contract.examples())
def test_compiled(spec):
    mixer, x, expected = on_both(spec)
    if "compiles" in mixer.exempt:
        pytest.skip(mixer.exempt["compiles"])
    torch._dynamo.reset()
    mixer = mixer.float()
    found = with_grads(mixer, torch.compile(mixer, fullgraph=True), x.float())
    close("the output", found["the output"], expected["the output"], 2e-3)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("spec", ATTENTIONS)
def test_every_back_end_of_sdpa_against_float64(spec, backend, dtype, padded):
    mixer = glocal.build(spec, 64).to(dtype)
    exact = copy.deepcopy(mixer).double()
    x = torch.randn(3, 8, 8, 64, dtype=dtype)
    valid = torch.ones(3, 8, 8, dtype=torch.bool)
    valid[1, 5:], valid[2, :, 3:] = False, False
    call = {"valid": valid} if padded else {}
    results = []
    for net, path, given in ((exact, exact.reference, x.double()), (mixer, mixer, x)):
        given = given.clone().requires_grad_()
        try:
            with sdpa_kernel(backend):
                out = path(given, **call)[valid if padded else ...]
                grads = torch.autograd.grad(out.double().square().sum(), [given, *net.parameters()])
        except RuntimeError as error:
            if any(words in str(error) for words in ("No available kernel", "No viable backend")):
                pytest.skip(f"{backend.name} does not take this")
            raise
        results.append([out, *grads])
    allowed = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    for i, (expected, found) in enumerate(zip(*results, strict=True)):
        assert found.isfinite().all(), f"result {i} is not finite"
        close(f"result {i}", found, expected, allowed)
