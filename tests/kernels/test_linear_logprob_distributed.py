"""Two gloo ranks with a part of the vocabulary each against one rank with all of it; DTensor weights."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from prism_kernels import linear_logprob, linear_policy_loss
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
    dist.destroy_process_group()


def logp_of(hidden, target, weight, bias, lora_a, lora_b):
    return linear_logprob(hidden, weight, target, bias=bias, lora=(lora_a, lora_b, 0.1)).logp


def loss_of(hidden, target, weight, bias, lora_a, lora_b):
    old, advantage = torch.full((ROWS,), -3.0), torch.linspace(-1, 1, ROWS)
    cu_seqlens = torch.tensor([0, ROWS])
    arguments = (old, advantage, cu_seqlens)
    return linear_policy_loss(hidden, weight, target, *arguments, bias=bias, lora=(lora_a, lora_b, 0.1))[0]


def gathering_worker(rank, path):
    """DTensors of every layout: the gradient is that of the mean over the ranks of their losses."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    line, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    layouts = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()]), (square, [Replicate(), Shard(0)])]
    _, weight, _, bias, lora = problem(False)
    tensors = [weight, bias, *lora]
    rows = [head_inputs(ROWS, COLUMNS, WIDTH, scale=3, seed=seed) for seed in (7, 8)]
    for same in (False, True):
        data = [(rows[0 if same else seed][0].detach(), rows[0 if same else seed][2]) for seed in range(2)]
        for score in (logp_of, loss_of):
            leaves = [x.clone().requires_grad_() for x in tensors]
            torch.stack([score(*each, *leaves).sum() for each in data]).mean().backward()
            for mesh, layout in layouts:
                split = [distribute_tensor(x, mesh, fitting(layout, x)).requires_grad_() for x in tensors]
                result = score(*data[rank], *split)
                assert torch.equal(result, score(*data[rank], *tensors))
                result.sum().backward()
                for ours, wanted in zip(split, leaves):
                    assert ours.grad.placements == ours.placements
                    close(ours.grad.full_tensor(), wanted.grad)
    sharded = distribute_tensor(weight, line, [Shard(0)])
    with pytest.raises(ValueError, match=r"slice of V with process_group.*, got a DTensor over ranks \[0, 1\]"):
        linear_logprob(*data[rank][:1], sharded, data[rank][1], process_group=dist.group.WORLD)
    with pytest.raises(TypeError, match="linear_logprob: expected hidden to be a plain tensor, got a DTensor"):
        linear_logprob(distribute_tensor(data[0][0], line, [Shard(0)]), weight, data[0][1])
    dist.destroy_process_group()


def fitting(layout, tensor):
    return [Shard(0) if place == Shard(1) and tensor.dim() == 1 else place for place in layout]


def test_a_dtensors_gradient_is_the_mean_over_ranks(tmp_path):
    mp.spawn(gathering_worker, args=(tmp_path / "rendezvous",), nprocs=2)


@pytest.mark.parametrize("split", [150, 40])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_two_ranks_equal_one(tmp_path, split, backend):
    mp.spawn(worker, args=(tmp_path / "rendezvous", split, backend), nprocs=2)
