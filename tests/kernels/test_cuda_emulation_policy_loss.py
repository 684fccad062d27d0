"""The CUDA kernel of policy_loss against its float64 reference: on a GPU if there is one, else emulated."""

import itertools

import pytest
import torch
from cuda_emulator import DEVICE, as_cuda_backend, needs_gpu
from policy_cases import bounds, grid, make, run

from prism_kernels import policy_loss
from prism_kernels.ops.policy_loss.options import AGGREGATES, CORRECTIONS, RATIOS, checked_options
from prism_kernels.ops.policy_loss.reference import policy_loss_reference
from prism_kernels.testing import assert_close, double

pytestmark = pytest.mark.slow

# sequences within one run of tokens, across several runs, and without a token
LENGTHS = (300, 0, 1, 700, 33, 0, 260, 2)


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory):
    yield from as_cuda_backend("policy_loss", ("policy_loss_fwd.cuda",), tmp_path_factory.mktemp("emulated"))


@pytest.fixture(autouse=True)
def cuda_backend(monkeypatch):
    monkeypatch.setattr("prism_kernels.ops.policy_loss.resolve", lambda *_: "cuda")
    # as on a GPU, even where the kernel is emulated
    monkeypatch.setattr("prism_kernels.check.reads_values", lambda _: False)


def cpu(value):
    if isinstance(value, dict):
        return {k: cpu(v) for k, v in value.items()}
    return value.detach().cpu().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def case(*arguments, **options):
    """As `make`, on the device."""
    batch, cu = make(*arguments, **options)
    return moved(batch), cu.to(DEVICE)


def moved(batch):
    return {k: None if x is None else x.detach().to(DEVICE).requires_grad_(x.requires_grad) for k, x in batch.items()}


def compare(batch, cu, tiny, **options):
    """Asserts that the kernel's loss, gradients and metrics are the reference's, by the three-way rule."""
    given = dict(options)
    if isinstance(given.get("denominator"), torch.Tensor):
        given["denominator"] = given["denominator"].to(DEVICE)
    loss, grads, metrics = run(policy_loss, batch, cu, **given)
    batch, cu = cpu(batch), cu.cpu()
    exact, wanted, totals = run(policy_loss_reference, double(batch), cu, **options)
    plain, plain_grads, _ = run(policy_loss_reference, batch, cu, **options)
    # terms of about 1 and of both signs cancel
    assert_close(loss.cpu(), plain, exact, name="loss", tiny=4 * tiny * max(1, 1 / max(float(exact.abs()), 1e-3)))
    leaves = [x for x in (batch["logp"], batch["entropy"]) if x is not None]
    for leaf, ours, p, w in zip(leaves, grads, plain_grads, wanted):
        assert ours.dtype == leaf.dtype
        assert_close(ours.cpu(), p, w, name="gradient", tiny=tiny)
    for name, value in totals.items():
        got = float(getattr(metrics, name))
        assert got == pytest.approx(float(value), rel=10 * tiny, abs=10 * tiny), name
    return loss, grads, metrics


@pytest.mark.parametrize("number", range(60))
def test_all_options(number):
    options = list(grid(60))[number]
    for masked, dtype in ((True, torch.float64), (False, torch.float32)):
        batch, cu = case(LENGTHS, dtype=dtype, per_token=masked == (number % 2 == 0), masked=masked)
        if not masked:
            batch["old_logp"] = None
        compare(batch, cu, 1e-12 if dtype == torch.float64 else 1e-6, **options)


# aggregate and ratio choose the weights of tokens; masks and missing columns the loads
@pytest.mark.grid
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("bare", [False, True], ids=["full", "plain"])
def test_each_normalisation_with_and_without_a_denominator(aggregate, ratio, masked, bare):
    """These options decide which passes the kernel makes."""
    for denominator in (None, 37.0, torch.tensor(11.0), torch.tensor(13)):
        batch, cu = case(LENGTHS, masked=masked)
        if bare:
            batch |= {"ref_logp": None, "rollout_logp": None, "entropy": None}
        compare(batch, cu, 1e-12, aggregate=aggregate, ratio=ratio, denominator=denominator, horizon=7.0, dual_clip=1.2)


@pytest.mark.parametrize("correction", [None, *CORRECTIONS])
def test_each_correction_over_sequences(correction):
    for ratio, per_token in itertools.product(RATIOS, (False, True)):
        batch, cu = case(LENGTHS, per_token=per_token, spread=0.02)
        compare(batch, cu, 1e-12, correction=correction, ratio=ratio, correction_bounds=(0.97, 1.03))


@pytest.mark.parametrize(
    "lengths",
    [(), (0,), (0, 0), (1,), (127,), (128,), (129, 1), (1,) * 50, (1023, 1, 1025), (5000,), (4, 3000, 0, 1)],
    ids=lambda x: str(x[:4]),
)
def test_odd_sizes(lengths):
    for ratio in RATIOS:
        batch, cu = case(lengths, masked=len(lengths) > 1)
        options = {"ratio": ratio, "correction": "geometric_tis", "aggregate": "seq_mean_token_mean"}
        compare(batch, cu, 1e-12, kl_coef=0.1, kl_estimator="k3", entropy_coef=0.1, **options)
        compare(batch | {"ref_logp": None, "rollout_logp": None, "entropy": None}, cu, 1e-12, ratio=ratio)


@pytest.mark.parametrize("blocks", ["1", "2", "9"])
def test_any_number_of_blocks(monkeypatch, blocks):
    """The number of blocks, and with it the runs of tokens, depends on the machine."""
    monkeypatch.setenv("PRISM_EMULATED_BLOCKS", blocks)
    batch, cu = case((6000, 0, 5, 1500, 2000), dtype=torch.float32)
    compare(batch, cu, 1e-6, ratio="sequence", correction="sequence_mask", aggregate="seq_mean_token_mean")


def test_one_long_sequence():
    batch, cu = case((100_000,), dtype=torch.float32, spread=0.05)
    compare(batch, cu, 1e-6, ratio="sequence", correction="token_tis", aggregate="seq_mean_token_mean")
    compare(batch | {"ref_logp": None, "rollout_logp": None, "entropy": None}, cu, 1e-6)


def test_two_thousand_sequences(monkeypatch):
    """Against the torch form in float64: the reference takes seconds for so many."""
    batch, cu = case(tuple(1 + n % 41 for n in range(2000)), dtype=torch.float32, spread=0.05)
    options = {"ratio": "sequence", "correction": "token_tis", "aggregate": "seq_mean_token_mean"}
    loss, grads, metrics = run(policy_loss, batch, cu, **options)
    monkeypatch.setattr("prism_kernels.ops.policy_loss.resolve", lambda *_: "torch")
    exact, wanted, totals = run(policy_loss, double(batch), cu, **options)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0].double(), wanted[0], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(metrics.totals, totals.totals, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_any_alignment(dtype, offset):
    """Columns that begin anywhere, of several dtypes, give the bits of aligned ones."""
    batch, cu = case(LENGTHS, dtype=dtype, per_token=True)
    batch["rollout_logp"] = batch["rollout_logp"].to(torch.bfloat16)
    batch["ref_logp"] = batch["ref_logp"].double()
    options = {"ratio": "sequence", "correction": "token_mask", "kl_coef": 0.1, "entropy_coef": 0.1}
    loss, grads, metrics = run(policy_loss, batch, cu, **options)

    def shifted(x):
        if x is None:
            return None
        buffer = torch.full((x.numel() + offset,), 1, dtype=x.dtype, device=x.device)
        return buffer[offset:].copy_(x.detach()).requires_grad_(x.requires_grad)

    other = {k: shifted(x) for k, x in batch.items()}
    assert other["logp"].data_ptr() % 16 or dtype == torch.float64
    again, other_grads, other_metrics = run(policy_loss, other, shifted(cu.long()), **options)
    assert torch.equal(loss, again) and torch.equal(metrics.totals, other_metrics.totals)
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_fp32(dtype):
    batch, cu = case(LENGTHS, dtype=dtype)
    loss, grads, _ = run(policy_loss, batch, cu, kl_coef=0.1, entropy_coef=0.1)
    exact, wanted, _ = run(policy_loss_reference, double(cpu(batch)), cu.cpu(), kl_coef=0.1, entropy_coef=0.1)
    assert loss.dtype == torch.float32 and grads[0].dtype == grads[1].dtype == dtype
    torch.testing.assert_close(loss.cpu().double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0].cpu().double(), wanted[0], rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_overflowing_ratios_have_finite_gradients():
    logp = torch.tensor([-1.0, 90.0, -3.0, -1.5])
    old = torch.tensor([-1.1, -1.9, 95.0, -1.4])
    for advantage in ([1.0], [-1.0]):
        for ratio in RATIOS:
            batch = {"logp": logp.clone().requires_grad_(), "old_logp": old, "advantage": torch.tensor(advantage)}
            batch |= {"mask": None, "entropy": None}
            loss, grads, _ = run(policy_loss, moved(batch), bounds((4,), DEVICE), ratio=ratio, dual_clip=3.0)
            assert loss.isfinite() and grads[0].isfinite().all()


def test_no_valid_token():
    batch, cu = case((3, 4, 2000), masked=False)
    batch["mask"] = torch.zeros(2007, dtype=torch.bool, device=DEVICE)
    for aggregate in AGGREGATES:
        loss, grads, metrics = run(policy_loss, batch, cu, aggregate=aggregate, horizon=9.0)
        assert float(loss) == 0 and not grads[0].any()
        assert float(metrics.tokens) == 0 and float(metrics.ratio_min) == torch.inf == -float(metrics.ratio_max)


def test_nan_stays_in_its_token():
    batch, cu = case(LENGTHS, masked=False)
    _, wanted, _ = run(policy_loss, batch, cu)
    batch["old_logp"][1000] = torch.nan
    loss, grads, metrics = run(policy_loss, batch, cu)
    other = torch.arange(wanted[0].numel(), device=DEVICE) != 1000
    assert loss.isnan() and grads[0][1000].isnan() and torch.equal(grads[0][other], wanted[0][other])
    assert metrics.ratio.isnan() and metrics.ratio_min.isnan() and metrics.ratio_max.isnan()


# where values are not read (a GPU), tokens of no sequence get NaN and nothing is touched outside the batch
@pytest.mark.parametrize(
    "cu, uncovered",
    [
        ([5, 200, 300], [*range(5)]),
        ([0, 100, 250], [*range(250, 300)]),
        ([0, 200, 100, 300], None),
        ([-70, 200, 5000], []),
        ([0], [*range(300)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("ratio", RATIOS)
def test_bad_bounds_give_nan(cu, uncovered, ratio):
    tokens = torch.zeros(300, device=DEVICE)
    cu = torch.tensor(cu, dtype=torch.int32, device=DEVICE)
    options = checked_options("policy_loss", ratio=ratio, clip=(0.2, 0.2), dual_clip=None, objective="clip",
                      log_ratio_bound=20.0, aggregate="token_mean", denominator=None, horizon=None, kl_coef=0.0,
                      kl_estimator="k1", correction=None, correction_bounds=(0.5, 2.0), entropy_coef=0.0,
                      per_token=False)  # fmt: skip
    advantage = torch.ones(cu.numel() - 1, device=DEVICE)
    columns = (tokens, tokens, advantage, cu, tokens == 0, None, None, None, None)
    loss, grad, _, _ = torch.ops.prism_kernels.policy_loss_fwd.cuda(*columns, *options.encoded())
    # bounds beyond the batch are clamped to it
    if cu.tolist() != [-70, 200, 5000]:
        assert loss.isnan()
    if uncovered is not None:
        assert grad[uncovered].isnan().all() and int(grad.isnan().sum()) == len(uncovered)


def test_bad_arguments():
    batch, cu = case(LENGTHS)
    encoded = checked_options("policy_loss", **next(iter(grid(1))), per_token=False).encoded()
    columns = [batch["logp"].detach(), batch["old_logp"], batch["advantage"], cu, None, None, None, None, None]
    op = torch.ops.prism_kernels.policy_loss_fwd.cuda
    for index, value, message in (
        (1, batch["old_logp"][1:], r"expected old_logp of shape \(1296\), got \(1295\)"),
        (2, torch.ones(8, dtype=torch.int64, device=DEVICE), "expected advantage of dtype Float"),
        (3, cu.float(), "expected cu_seqlens of dtype Long or Int, got Float"),
        (4, torch.ones(1296, device=DEVICE), "expected mask of dtype Bool"),
        (1, torch.ones(1296, 2, dtype=torch.float64, device=DEVICE)[:, 0], "expected old_logp of stride 1, got 2"),
        (8, torch.ones(1, device=DEVICE), r"expected denominator of shape \(\)"),
    ):
        with pytest.raises(RuntimeError, match="policy_loss_fwd: " + message):
            op(*columns[:index], value, *columns[index + 1 :], *encoded)


def test_compiles_whole():
    batch, cu = case(LENGTHS)

    def f(logp, entropy):
        loss, metrics = policy_loss(
            logp, batch["old_logp"], batch["advantage"], cu, mask=batch["mask"], entropy=entropy, entropy_coef=0.1
        )
        return loss * 2, metrics.ratio

    leaves = (batch["logp"], batch["entropy"])
    ours, wanted = torch.compile(f, fullgraph=True)(*leaves), f(*leaves)
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(torch.autograd.grad(ours[0], leaves), torch.autograd.grad(wanted[0], leaves))


def test_values_are_checked_where_they_are_read(monkeypatch):
    batch, cu = case(LENGTHS)
    wanted, _, _ = run(policy_loss, batch, cu)
    monkeypatch.undo()
    monkeypatch.setenv("PRISM_KERNELS_CHECK", "1")
    monkeypatch.setattr("prism_kernels.ops.policy_loss.resolve", lambda *_: "cuda")
    assert torch.equal(run(policy_loss, batch, cu)[0], wanted)
    with pytest.raises(ValueError, match="policy_loss: expected cu_seqlens from 0 to 1296"):
        run(policy_loss, batch, cu + 1)


def test_opcheck():
    for options in itertools.islice(grid(60), 0, 60, 13):
        encoded = checked_options("policy_loss", **options, per_token=False).encoded()
        batch, cu = case(dtype=torch.float32)
        names = ("ref_logp", "rollout_logp", "entropy")
        columns = [batch[k].detach() for k in ("logp", "old_logp", "advantage")]
        columns += [cu, batch["mask"], *(batch[k].detach() for k in names), torch.tensor(5.0, device=DEVICE)]
        torch.library.opcheck(torch.ops.prism_kernels.policy_loss_fwd.cuda, (*columns, *encoded))
        torch.library.opcheck(torch.ops.prism_kernels.policy_loss_fwd.default, (*columns, *encoded, "cuda"))


FULL = {"ratio": "sequence", "correction": "geometric_tis", "kl_coef": 0.1, "entropy_coef": 0.1}


def gpu_call(lengths=(4000, 1, 300, 9000, 0, 700), **options):
    batch, cu = case(lengths, dtype=torch.float32)
    leaves = (batch["logp"], batch["entropy"])
    batch = dict(batch)
    columns = (batch.pop("logp"), batch.pop("old_logp"), batch.pop("advantage"), cu)
    return leaves, lambda: policy_loss(*columns, **batch, **options)


@needs_gpu
@pytest.mark.parametrize("options", [{}, FULL, {"aggregate": "seq_mean_token_mean"}], ids=str)
def test_no_synchronisation_and_one_kernel(options):
    # otherwise a separate kernel fills every allocation
    torch.use_deterministic_algorithms(False)
    leaves, call = gpu_call(**options)
    torch.autograd.grad(call()[0], leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(call()[0], leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1 and "policy_loss_fwd_kernel" in kernels[0], kernels


@needs_gpu
@pytest.mark.parametrize("options", [{}, FULL], ids=str)
def test_captured_and_replayed_gives_the_same_bits(options):
    torch.use_deterministic_algorithms(False)
    leaves, call = gpu_call(**options)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            wanted, totals = call()[0].clone(), call()[1].totals.clone()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss, metrics = call()
        for _ in range(3):
            loss.fill_(torch.nan)
            graph.replay()
            assert torch.equal(loss, wanted) and torch.equal(metrics.totals, totals)
        leaves[0].add_(0.01)
        graph.replay()
        assert torch.equal(loss, call()[0])


@needs_gpu
def test_repeats_bit_for_bit():
    leaves, call = gpu_call((100_000, 0, 3, 2_000_000, 77), **FULL)
    results = []
    for _ in range(5):
        loss, metrics = call()
        results.append((loss, metrics.totals, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for again in results[1:] for a, b in zip(again, results[0]))


@needs_gpu
def test_four_million_tokens():
    batch, cu = case((1 << 22,), dtype=torch.float32, spread=0.01)
    compare(batch, cu, 1e-6, **FULL)
