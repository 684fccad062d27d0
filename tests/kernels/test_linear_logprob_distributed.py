"""Two gloo ranks with a part of the vocabulary each against one rank with all of it; DTensor weights."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from prism_kernels import linear_logprob
from prism_kernels.testing import head_inputs

ROWS, COLUMNS, WIDTH, RANK = 50, 301, 16, 3


def problem(far):
    hidden, weight, target = head_inputs(ROWS, COLUMNS, WIDTH, scale=3)
    make = torch.Generator().manual_seed(5)
    bias = torch.randn(COLUMNS, generator=make)
    if far:
        # one rank alone sees a logit far above the target's
        bias[COLUMNS - 2] = 90.0
        bias[3] = 60.0
    lora = (torch.randn(RANK, WIDTH, generator=make), torch.randn(COLUMNS, RANK, generator=make))
    target[::9] = -100
    hidden.detach_()
    return hidden, weight.detach(), target, bias, lora


def evaluate(hidden, weight, target, bias, lora, group, cache_bytes, backend, softcap):
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias, *lora)]
    h, w, b, lora_a, lora_b = leaves
    out = linear_logprob(
        h,
        w,
        target,
        bias=b,
        lora=(lora_a, lora_b, 0.1),
        softcap=softcap,
        entropy=True,
        cache_bytes=cache_bytes,
        process_group=group,
        backend=backend,
    )
    upstream = torch.linspace(-1, 1, ROWS)
    upstream[::4] = 0
    grads = torch.autograd.grad((out.logp * upstream).sum() + 0.3 * (out.entropy * upstream.flip(0)).sum(), leaves)
    return [*(x.detach() for x in out), *grads]


def close(ours, wanted):
    # 1e-6 of the whole: sums over two ranks are rounded in another order
    assert (ours - wanted).norm() <= 1e-6 * wanted.norm() + 1e-7, (ours - wanted).norm() / wanted.norm()


def worker(rank, path, split, backend):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    mine = slice(0, split) if rank == 0 else slice(split, COLUMNS)
    for far in (False, True):
        hidden, weight, target, bias, (lora_a, lora_b) = problem(far)
        for softcap in (None, 20.0):
            if far and softcap:
                continue
            for cache_bytes in (None, 0, 20 * 200 * 4):
                whole = evaluate(hidden, weight, target, bias, (lora_a, lora_b), None, cache_bytes, backend, softcap)
                part = evaluate(
                    hidden,
                    weight[mine],
                    target,
                    bias[mine],
                    (lora_a, lora_b[mine]),
                    dist.group.WORLD,
                    cache_bytes,
                    backend,
                    softcap,
                )
                logp, entropy, lse, square, g_hidden, g_weight, g_bias, g_a, g_b = part
                for ours, wanted in zip((logp, entropy, lse, square, g_hidden), whole):
                    close(ours, wanted)
                close(g_weight, whole[5][mine])
                close(g_bias, whole[6][mine])
                close(g_a, whole[7])
                close(g_b, whole[8][mine])
    _dtensor(rank, backend)
    dist.destroy_process_group()


def _dtensor(rank, backend):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, weight, target, _, _ = problem(False)
    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    out = linear_logprob(hidden, sharded, target, backend=backend)
    plain = weight.clone().requires_grad_()
    wanted = linear_logprob(hidden, plain, target, backend=backend)
    assert torch.equal(out.logp, wanted.logp)
    out.logp.sum().backward()
    wanted.logp.sum().backward()
    torch.testing.assert_close(sharded.grad.full_tensor(), plain.grad)


@pytest.mark.parametrize("split", [150, 40])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_two_ranks_equal_one(tmp_path, split, backend):
    mp.spawn(worker, args=(tmp_path / "rendezvous", split, backend), nprocs=2)
