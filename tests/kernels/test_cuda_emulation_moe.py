"""The CUDA router and permutation against the torch form: on a GPU if there is one, else emulated on the CPU."""

import pytest
import torch
from cuda_emulator import DEVICE
from cuda_emulator import kernels as emulated

import prism_kernels
from prism_kernels.ops.moe_route import eager
from prism_kernels.ops.moe_route.op import MOST_EXPERTS, TILE

pytestmark = pytest.mark.slow

OPERATORS = ("moe_route_fwd.rows", "moe_permutation_fwd.out")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory):
    yield from emulated("moe_route", OPERATORS, tmp_path_factory.mktemp("emulated"))


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(DEVICE):
        yield


def route(kernels, logits, top_k):
    experts = torch.full((logits.shape[0], top_k), -7)
    probability, lse = torch.full_like(logits, torch.nan), torch.full_like(logits[:, 0], torch.nan)
    kernels.moe_route_fwd.rows(logits, experts, probability, lse)
    return eager.Choice(experts, probability, lse)


def permute(kernels, index, experts):
    offsets = torch.full((experts,), -7, dtype=torch.int32)
    permutation = torch.full((index.numel(),), -7, dtype=torch.int32)
    tiles = torch.full((-(-index.numel() // TILE), experts), -7, dtype=torch.int32)
    kernels.moe_permutation_fwd.out(index, tiles, offsets, permutation)
    return offsets, permutation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "T, E, K",
    [(1, 1, 1), (9, 4, 2), (8, 31, 3), (17, 32, 8), (5, 33, 33), (6, 128, 8), (3, 257, 4), (2, MOST_EXPERTS, 6)],
)
def test_route_is_the_torch_form(kernels, T, E, K, dtype):
    torch.manual_seed(E)
    z = torch.randn(T, E, dtype=dtype) * 3
    ours, theirs = route(kernels, z, K), eager.choose(z, K)
    assert torch.equal(ours.experts, theirs.experts)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.probability, theirs.probability, rtol=20 * eps, atol=eps**2)
    torch.testing.assert_close(ours.lse, theirs.lse, rtol=20 * eps, atol=10 * eps)
    again = route(kernels, z, K)
    assert all(torch.equal(a, b) for a, b in zip(ours, again))


@pytest.mark.parametrize("E", [4, 40])
def test_ties_broken_rows_and_forbidden_experts(kernels, E):
    z = torch.zeros(9, E)
    z[1, 2] = torch.nan
    z[2, 3] = torch.inf
    z[3, :2] = -torch.inf
    z[4] = -200.0
    z[4, 3] = 200.0
    z[5] = -torch.inf
    z[6, E - 1] = 1e-3
    ours, theirs = route(kernels, z, 3), eager.choose(z, 3)
    assert torch.equal(ours.experts, theirs.experts)
    torch.testing.assert_close(ours.probability, theirs.probability, rtol=1e-5, atol=0, equal_nan=True)
    finite = theirs.lse.isfinite()
    assert finite.tolist() == [True, False, False, True, True, False, True, True, True]
    torch.testing.assert_close(ours.lse[finite], theirs.lse[finite])
    assert not ours.lse[~finite].isfinite().any()


@pytest.mark.parametrize(
    "N, E", [(0, 3), (1, 1), (1000, 4), (1024, 5), (1025, 128), (4100, 6), (5000, 1), (2100, 300), (1500, MOST_EXPERTS)]
)
def test_permutation_is_the_torch_form(kernels, N, E):
    torch.manual_seed(N)
    index = torch.randint(E, (N, 1))
    for chosen in (index, torch.full_like(index, E - 1), torch.arange(N)[:, None] % E):
        ours, theirs = permute(kernels, chosen, E), eager.permute(chosen, E)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(2, MOST_EXPERTS + 1)}, r"expected logits of shape \(T, E\) with E from 1 to 512"),
        ({"experts": torch.zeros(2, 6).long()}, r"expected experts of shape \(2, K\) with K from 1 to 5"),
        ({"experts": torch.zeros(2, 2)}, "expected experts of dtype Long, got Float"),
        ({"probability": torch.zeros(2, 4)}, r"expected probability of shape \(2, 5\), got \(2, 4\)"),
        ({"lse": torch.zeros(2).double()}, "expected lse of dtype Float, got Double"),
        ({"logits": torch.zeros(5, 2).T}, "expected logits to be contiguous"),
    ],
)
def test_route_names_the_bad_argument(kernels, change, message):
    arguments = {
        "logits": torch.zeros(2, 5),
        "experts": torch.zeros(2, 2).long(),
        "probability": torch.zeros(2, 5),
        "lse": torch.zeros(2),
    }
    arguments = {name: value.to(DEVICE) for name, value in (arguments | change).items()}
    with pytest.raises(RuntimeError, match="moe_route_fwd: " + message):
        kernels.moe_route_fwd.rows(**arguments)


@pytest.fixture
def as_cuda(kernels):
    """Lets the operators call these kernels, also on the CPU."""
    if DEVICE == "cuda":
        yield
        return
    library = torch.library.Library("prism_kernels", "IMPL", "CPU")
    for name in OPERATORS:
        packet, _, overload = name.partition(".")
        library.impl(name, getattr(getattr(kernels, packet), overload))
    yield
    library._destroy()


def test_the_operators_on_these_kernels_are_those_on_torch(as_cuda):
    torch.manual_seed(0)
    x, router, bias = torch.randn(700, 16), torch.randn(6, 16), torch.randn(3, 6)
    arguments = (x, router, bias, torch.randint(3, (700,)), torch.rand(700), 2, 3, True)
    ours = torch.ops.prism_kernels.moe_route_fwd(*arguments, "cuda")
    theirs = torch.ops.prism_kernels.moe_route_fwd(*arguments, "torch")
    assert len(ours) == 9
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    index = ours[0].int().t().contiguous().t()
    for a, b in zip(*(torch.ops.prism_kernels.moe_permutation_fwd(index, 6, name) for name in ("cuda", "torch"))):
        assert torch.equal(a, b)
    many = torch.randint(2000, (30, 2))
    offsets, _ = torch.ops.prism_kernels.moe_permutation_fwd(many, 2000, "cuda")
    assert offsets[-1] == 60


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("T, E, K", [(16384, 4, 2), (65536, 128, 8)])
def test_public_ops_on_the_gpu(T, E, K):
    x, router = torch.randn(T, 64), torch.randn(E, 64)
    ours = prism_kernels.moe_route(x, router, K, backend="cuda")
    theirs = prism_kernels.moe_route(x, router, K, backend="torch")
    # softmax's rounding may swap experts of equal probability
    assert (ours.index == theirs.index).float().mean() > 0.999
    same = prism_kernels.Routing.from_topk(theirs.index, theirs.weight, E, backend="cuda")
    assert torch.equal(same.permutation, theirs.permutation) and torch.equal(same.offsets, theirs.offsets)
