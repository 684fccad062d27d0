"""The CUDA kernels of group_advantage and prism_advantage against their references: on a GPU if there is one, else
emulated."""

import itertools

import pytest
import torch
from cuda_emulator import DEVICE, as_cuda_backend, needs_gpu

from prism_kernels import group_advantage, prism_advantage
from prism_kernels.ops.group_advantage.op import BASELINES, SCALES
from prism_kernels.ops.group_advantage.reference import group_advantage_reference
from prism_kernels.ops.prism_advantage.op import INVALID, MODES, NORMALIZE
from prism_kernels.ops.prism_advantage.reference import prism_advantage_reference

pytestmark = pytest.mark.slow

ORDERS = ("rising", "apart", "mixed")
OPERATORS = ("group_advantage_fwd.cuda", "prism_advantage_fwd.cuda")
# groups smaller and larger than a window of 32, and groups that several blocks share
SIZES = (8, 1, 16, 33, 2, 1, 300, 1500, 5, 64)
COEFFICIENTS = {
    "alpha": 0.3,
    "format_penalty": 1.4,
    "align_coef": 0.7,
    "wrong_penalty": 0.9,
    "w_acc": 0.8,
    "w_fmt": 0.2,
    "eps": 1e-4,
}


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory):
    yield from as_cuda_backend("group_advantage", OPERATORS, tmp_path_factory.mktemp("emulated"))


@pytest.fixture(autouse=True)
def cuda_backend(monkeypatch):
    for op in ("group_advantage", "prism_advantage"):
        monkeypatch.setattr(f"prism_kernels.ops.{op}.resolve", lambda *_: "cuda")
    # as on a GPU, even where the kernels are emulated
    monkeypatch.setattr("prism_kernels.check.reads_values", lambda _: False)


def ids_of(sizes, order, rng):
    """Group ids: ascending, contiguous but not ascending, or mixed."""
    n = sum(sizes)
    places = torch.arange(len(sizes)) * (n // max(len(sizes), 1))
    if order == "apart":
        places = places[torch.randperm(len(sizes), generator=rng)]
    ids = torch.repeat_interleave(places, torch.tensor(sizes, dtype=torch.int64))
    return ids[torch.randperm(n, generator=rng)] if order == "mixed" else ids


def rewards(sizes=SIZES, order="rising", dtype=torch.float64, seed=0, invalid=0.3):
    rng = torch.Generator().manual_seed(seed)
    ids = ids_of(sizes, order, rng)
    n = ids.numel()
    reward = torch.randn(n, generator=rng).to(dtype)
    valid = torch.rand(n, generator=rng) >= invalid
    reward[~valid] = torch.nan
    return reward.to(DEVICE), ids.to(DEVICE), valid.to(DEVICE)


def scores(sizes=SIZES, order="rising", dtype=torch.float64, seed=0):
    """As in test_prism_advantage: one group without a valid sample, invalid scores are NaN and inf."""
    perception, ids, ok = rewards(sizes, order, dtype, seed)
    rng = torch.Generator().manual_seed(seed + 1)
    n = ids.numel()
    reasoning = torch.randn(n, generator=rng).to(DEVICE, dtype)
    if len(sizes) > 3:
        ok[ids == ids.unique()[3]] = False
    accuracy = (torch.rand(n, generator=rng) < 0.5).to(DEVICE, dtype) * ok
    perception[~ok], reasoning[~ok] = torch.nan, torch.inf
    return perception, reasoning, ids, ok, accuracy


def close(ours, exact, dtype=torch.float64):
    tiny = 1e-11 if dtype == torch.float64 else 3e-7
    torch.testing.assert_close(ours.cpu().double(), exact, rtol=tiny, atol=tiny)


# baseline and scale choose the formula, order of the ids the path through the kernel
@pytest.mark.grid
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("order", ORDERS)
def test_group_advantage_matches_float64(baseline, scale, order):
    for dtype, masked in ((torch.float64, True), (torch.float32, False)):
        reward, ids, valid = rewards(order=order, dtype=dtype, invalid=0.3 if masked else 0)
        options = {"baseline": baseline, "scale": scale, "eps": 1e-3}
        ours = group_advantage(reward, ids, valid=valid if masked else None, **options)
        assert ours.dtype == dtype and not ours[~valid].any()
        close(ours, group_advantage_reference(reward.cpu(), ids.cpu(), valid=valid.cpu(), **options), dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("invalid", INVALID)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_prism_advantage_matches_float64(mode, invalid, normalize):
    for order, dtype in zip(ORDERS, (torch.float64, torch.float32, torch.float64)):
        perception, reasoning, ids, ok, accuracy = scores(order=order, dtype=dtype)
        if order == "apart":
            perception, reasoning, ok = perception.nan_to_num(0.3), reasoning.nan_to_num(0.4, 0.4, 0.4), None
        options = {"mode": mode, "invalid": invalid, "normalize": normalize, **COEFFICIENTS}
        ours = prism_advantage(perception, reasoning, ids, format_ok=ok, accuracy=accuracy, **options)
        columns = [None if x is None else x.cpu() for x in (perception, reasoning, ids, ok, accuracy)]
        options |= {"format_ok": columns[3], "accuracy": columns[4]}
        close(ours, prism_advantage_reference(*columns[:3], **options), dtype)


@pytest.mark.parametrize("sizes", [(), (1,), (1,) * 70, (31, 33), (255, 1, 256), (3000,), (1023, 1025, 1024)], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_odd_sizes(sizes, order):
    reward, ids, valid = rewards(sizes, order)
    for scale in SCALES:
        wanted = group_advantage_reference(reward.cpu(), ids.cpu(), valid=valid.cpu(), scale=scale)
        close(group_advantage(reward, ids, valid=valid, scale=scale), wanted)
    perception, reasoning, ids, ok, accuracy = scores(sizes, order)
    options = {"format_ok": ok, "accuracy": accuracy, "mode": "rlvr_v2", "invalid": "below_min"}
    cpu = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    wanted = prism_advantage_reference(perception.cpu(), reasoning.cpu(), ids.cpu(), **cpu)
    close(prism_advantage(perception, reasoning, ids, **options), wanted)


@pytest.mark.parametrize("blocks", ["1", "2", "9"])
@pytest.mark.parametrize("order", ORDERS)
def test_any_number_of_blocks(monkeypatch, blocks, order):
    monkeypatch.setenv("PRISM_EMULATED_BLOCKS", blocks)
    for scale in SCALES:
        reward, ids, valid = rewards((16,) * 300, order)
        close(
            group_advantage(reward, ids, valid=valid, scale=scale),
            group_advantage_reference(reward.cpu(), ids.cpu(), valid=valid.cpu(), scale=scale),
        )


@pytest.mark.parametrize("order", ["rising", "mixed"])
def test_many_groups_whatever_the_order(order):
    """The sort keeps the samples' order within a group: the same sums, the same bits."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 16, generator=rng)
    ids = torch.arange(4096)[:, None].expand(4096, 16)
    if order == "mixed":
        # rank by rank: every group's samples are 4,096 apart
        x, ids = x.T, ids.T
    ours = group_advantage(x.reshape(-1).to(DEVICE), ids.reshape(-1).to(DEVICE)).cpu().reshape(x.shape)
    ours, x = (ours.T, x.T) if order == "mixed" else (ours, x)
    wanted = ((x - x.double().mean(1, keepdim=True)) / (x.double().std(1, keepdim=True) + 1e-6)).float()
    torch.testing.assert_close(ours, wanted, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_alignment_stride_and_dtype(dtype):
    reward, ids, valid = rewards(order="mixed", dtype=dtype)
    wanted = group_advantage(reward, ids, valid=valid)
    assert wanted.dtype == torch.float32
    pairs = torch.stack((reward, reward), 1)[:, 0]
    shifted = torch.cat((valid[:1], valid))[1:]
    assert torch.equal(group_advantage(pairs, ids.int(), valid=shifted), wanted)


def test_the_bits_do_not_depend_on_the_order():
    reward, ids, valid = rewards(order="apart")
    order = torch.argsort(ids, stable=True)
    ours = group_advantage(reward, ids, valid=valid)
    assert torch.equal(ours[order], group_advantage(reward[order], ids[order], valid=valid[order]))


def test_equal_rewards_give_exactly_zero():
    reward = torch.full((480,), 0.1, device=DEVICE)
    assert not group_advantage(reward, torch.arange(480, device=DEVICE) % 3).any()


# where values are not read (a GPU), a bad id gives NaN in its row and changes no other
@pytest.mark.parametrize("order", ORDERS)
def test_bad_ids_give_nan(order):
    reward, ids, _ = rewards(order=order, invalid=0)
    n = ids.numel()
    bad = torch.zeros(n, dtype=torch.bool, device=DEVICE)
    bad[[0, 5, n // 2, n - 1]] = True
    broken = ids.clone()
    broken[bad] = torch.tensor([-1, n, 2**40, -(2**40)], device=DEVICE)
    ops = torch.ops.prism_kernels
    for baseline, scale in itertools.product(range(3), range(3)):
        out = ops.group_advantage_fwd.cuda(reward, broken, None, baseline, scale, 1e-6)
        options = {"baseline": BASELINES[baseline], "scale": SCALES[scale]}
        wanted = group_advantage_reference(reward[~bad].cpu(), ids[~bad].cpu(), **options)
        assert out[bad].isnan().all()
        close(out[~bad], wanted)
    out = ops.prism_advantage_fwd.cuda(reward, reward, broken, None, None, 0, 0, 0, [0.5, 1.5, 1, 1, 1, 1, 1e-6])
    assert out[bad].isnan().all() and out[~bad].isfinite().all()


def test_bad_arguments():
    reward, ids, valid = rewards()
    op = torch.ops.prism_kernels.group_advantage_fwd.cuda
    for columns, message in (
        ((reward, ids[1:], valid), r"expected group of shape \(1930\), got \(1929\)"),
        ((reward, ids.double(), valid), "expected group of dtype Long or Int, got Double"),
        ((reward, ids, reward), "expected valid of dtype Bool, got Double"),
        ((torch.stack((reward, reward), 1)[:, 0], ids, valid), "expected reward of stride 1, got 2"),
    ):
        with pytest.raises(RuntimeError, match="group_advantage_fwd: " + message):
            op(*columns, 0, 0, 1e-6)


def test_opcheck():
    ops = torch.ops.prism_kernels
    perception, reasoning, ids, ok, accuracy = scores((8, 1, 3), dtype=torch.float32)
    for scale in range(3):
        torch.library.opcheck(ops.group_advantage_fwd.cuda, (perception, ids, ok, 0, scale, 1e-6))
        torch.library.opcheck(ops.group_advantage_fwd.default, (perception, ids, ok, 0, scale, 1e-6, "cuda"))
    arguments = (perception, reasoning, ids, ok, accuracy, 0, 0, 4, list(COEFFICIENTS.values()))
    torch.library.opcheck(ops.prism_advantage_fwd.cuda, arguments)
    torch.library.opcheck(ops.prism_advantage_fwd.default, (*arguments, "cuda"))


def test_compiles_whole():
    perception, reasoning, ids, ok, accuracy = scores((8, 1, 3))

    def f(x):
        both = prism_advantage(x, reasoning, ids, format_ok=ok, accuracy=accuracy, mode="rlvr")
        return group_advantage(x, ids, valid=ok, baseline="leave_one_out") * 2 + both

    torch.testing.assert_close(torch.compile(f, fullgraph=True)(perception), f(perception))


def test_values_are_checked_where_they_are_read(monkeypatch):
    reward, ids, _ = rewards(invalid=0)
    wanted = group_advantage(reward, ids), prism_advantage(reward, reward, ids)
    monkeypatch.undo()
    monkeypatch.setenv("PRISM_KERNELS_CHECK", "1")
    for op in ("group_advantage", "prism_advantage"):
        monkeypatch.setattr(f"prism_kernels.ops.{op}.resolve", lambda *_: "cuda")
    assert torch.equal(group_advantage(reward, ids), wanted[0])
    assert torch.equal(prism_advantage(reward, reward, ids), wanted[1])
    with pytest.raises(ValueError, match=r"group_advantage: expected group ids in \[0, 1930\), got -1 at 0"):
        group_advantage(reward, ids - 1)
    with pytest.raises(ValueError, match=r"prism_advantage: expected group ids in \[0, 1930\), got -1 at 0"):
        prism_advantage(reward, reward, ids - 1)


def gpu_calls(order):
    reward, ids, valid = rewards((16,) * 4096, order, dtype=torch.float32)
    scored = scores((16,) * 4096, order, dtype=torch.float32)
    yield reward, lambda: group_advantage(reward, ids, valid=valid)
    yield reward, lambda: group_advantage(reward, ids, valid=valid, scale="batch_std")
    rest = {"format_ok": scored[3], "accuracy": scored[4], "mode": "sign_align"}
    yield scored[0], lambda: prism_advantage(*scored[:3], **rest)


@needs_gpu
@pytest.mark.parametrize("order", ORDERS)
def test_no_synchronisation_and_one_kernel(order):
    # otherwise a separate kernel fills every allocation
    torch.use_deterministic_algorithms(False)
    for _, call in gpu_calls(order):
        call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
        kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert len(kernels) == 1 and "advantage_fwd_kernel" in kernels[0], kernels


@needs_gpu
@pytest.mark.parametrize("order", ORDERS)
def test_captured_and_replayed_gives_the_same_bits(order):
    torch.use_deterministic_algorithms(False)
    for reward, call in gpu_calls(order):
        wanted = call()
        assert all(torch.equal(call(), wanted) for _ in range(5))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, wanted)
        reward.mul_(3)
        graph.replay()
        assert torch.equal(out, call())
