"""Our replacements of verl's two functions of logits share one pass, whatever happens between the two calls."""

import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import verl.utils.torch_functional as functional
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from prism_kernels.integrations import verl as ours
from prism_kernels.ops.anchored_rows import ROW_KERNELS, RowKernels


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes of our kernels."""
    counts = {"forward": 0, "backward": 0}

    def count(direction, kernel, *args):
        counts[direction] += 1
        return kernel(*args)

    for backend, kernels in ROW_KERNELS.items():
        counted = [partial(count, name, kernel) for name, kernel in kernels._asdict().items()]
        monkeypatch.setitem(ROW_KERNELS, backend, RowKernels(*counted))
    return counts


def peaked(dtype=torch.float32, shape=(6, 40)):
    """Returns logits with two confident rows and a row with two equal maxima, and labels for them."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
    x.view(-1, 40)[[0, 1, 2, 2], [3, 3, 5, 9]] = torch.tensor([25, 25, 20, 20], dtype=torch.float64)
    labels = torch.randint(0, 40, shape[:-1], generator=generator)
    labels.view(-1)[:3] = torch.tensor([3, 8, 9])
    return x.to(dtype).requires_grad_(), labels


def asked(labels, order="log-probabilities"):
    """Returns the two functions in a verl engine's order; FSDP's calls entropies first, and compiles them."""
    entropy = functional.entropy_from_logits
    if order == "chunked":
        entropy = partial(functional.entropy_from_logits_with_chunking, chunk_size=4)
    if order == "compiled":
        entropy = torch.compile(entropy, dynamic=True)
    logp = partial(functional.logprobs_from_logits, labels=labels, inplace_backward=False)
    functions = {"logp": logp, "entropy": entropy}
    return functions if order == "log-probabilities" else dict(reversed(functions.items()))


def pair(found):
    return found["logp"], found["entropy"]


def both(logits, labels, order="log-probabilities"):
    return pair({name: f(logits) for name, f in asked(labels, order).items()})


def defined(x, labels):
    logp = x.log_softmax(-1)
    return logp.gather(-1, labels[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def loss_of(logp, entropy):
    weights = torch.randn(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return sum((y.flatten() * w).sum() for y, w in zip((logp, entropy), weights) if y is not None)


def gradient(x, *results, **options):
    return torch.autograd.grad(loss_of(*results), x, **options)[0]


def assert_close(mine, theirs):
    tight = {"rtol": 1e-9, "atol": 1e-9} if theirs[0].dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-6}
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, **tight)


ORDERS = ("entropies", "compiled", "chunked", "log-probabilities")
in_each_order = pytest.mark.parametrize("order", ORDERS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("order, shape", [*((order, (6, 40)) for order in ORDERS), ("entropies", (2, 3, 40))])
def test_both_from_one_pass(order, shape, dtype, passes):
    """The gradient is of both or of one of them, because entropies may only be logged."""
    x, labels = peaked(dtype, shape)
    logp, entropy = both(x * 1, labels)
    losses = (logp, entropy), (logp, None), (None, entropy)
    wanted = [gradient(x, *results, retain_graph=True) for results in losses]
    with ours.patch():
        for results, expected in zip(losses, wanted):
            mine = both(x * 1, labels, order)
            found = gradient(x, *(None if y is None else z for y, z in zip(results, mine)))
            assert_close((*mine, found), (logp, entropy, expected))
    assert passes == {"forward": 3, "backward": 3}


@in_each_order
def test_one_pass_keeps_confident_tokens(order):
    """A confident token's logit minus the log-sum-exp would round to 0."""
    x, labels = peaked(torch.bfloat16)
    with ours.patch():
        mine = both(x * 1, labels, order)
        found = gradient(x, *mine)
    y = x.detach().double().requires_grad_()
    exact = defined(y, labels)
    for one, other, atol in zip(mine, exact, (0, 1e-6)):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=atol)
    torch.testing.assert_close(found.double(), gradient(y, *exact), rtol=0.01, atol=0)


@in_each_order
def test_rows_without_a_label_or_with_an_infinite_logit(order):
    x, labels = peaked()
    labels[4] = -100
    logp, entropy = defined(x, labels.clamp(min=0))
    theirs = torch.where(labels < 0, 0, logp), entropy
    with ours.patch():
        mine = both(x * 1, labels, order)
        assert_close((*mine, gradient(x, *mine)), (*theirs, gradient(x, *theirs)))
        y = x.detach().clone()
        y[5, 7] = torch.inf
        mine = both(y.requires_grad_(), labels, order)
        for result in (*mine, gradient(y, *mine)):
            assert result[5].isnan().all() and result[:5].isfinite().all()
        with pytest.raises(ValueError, match=r"target in \[0, 40\)"):
            both(y, labels + 200, order)


@in_each_order
@pytest.mark.parametrize("other", [lambda x: x.mul_(0.5), torch.clone, lambda x: x[:]], ids=["changed", "copy", "view"])
def test_changed_or_copied_logits_get_a_new_pass(other, order, passes):
    x, labels = peaked()
    logits = x.detach().clone()
    with ours.patch():
        (first, ask), (second, ask_again) = asked(labels, order).items()
        found = {first: ask(logits)}
        logits = other(logits)
        found[second] = ask_again(logits)
    theirs = dict(zip(("logp", "entropy"), defined(logits, labels)))
    assert_close([found[second]], [theirs[second]])
    assert passes["forward"] == 2


@in_each_order
@pytest.mark.parametrize("silent", [torch.no_grad, torch.inference_mode])
def test_one_result_without_a_graph(silent, order, passes):
    """A pass without a graph is not reused where a graph is needed; a pass with one serves a call without."""
    x, labels = peaked()
    theirs = dict(zip(("logp", "entropy"), defined(x, labels)))
    with ours.patch():
        (first, ask), (second, ask_again) = asked(labels, order).items()
        for quiet, passes_of_them in ((first, 2), (second, 1)):
            logits, found = x * 1, {}
            passes["forward"] = 0
            for name, call in ((first, ask), (second, ask_again)):
                with silent() if name == quiet else nullcontext():
                    found[name] = call(logits)
            assert passes["forward"] == passes_of_them
            assert not found[quiet].requires_grad
            assert_close(pair(found), pair(theirs))
            found[quiet] = theirs[quiet].detach()
            kept = {**theirs, quiet: found[quiet]}
            assert_close([gradient(x, *pair(found))], [gradient(x, *pair(kept), retain_graph=True)])
        passes["forward"] = 0
        with silent():
            assert_close(both(logits, labels, order), pair(theirs))
            # an inference tensor has no version counter, so its pass is not reused
            assert_close(both(x * 1, labels, order), pair(theirs))
    assert passes["forward"] == (2 if silent is torch.no_grad else 3) + 1


@in_each_order
def test_backward_more_than_once(order):
    x, labels = peaked()
    logp, entropy = defined(x, labels)
    wanted = gradient(x, logp, entropy)
    with ours.patch():
        logp, entropy = both(x, labels, order)
        apart = [gradient(x, *results, retain_graph=True) for results in ((logp, None), (None, entropy))]
        assert_close([sum(apart), gradient(x, logp, entropy)], [wanted, wanted])
        # the results share one graph, which the first backward freed
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            gradient(x, None, entropy)
        # a new call does not get the freed graph
        assert_close([gradient(x, *both(x, labels, order))], [wanted])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("order", ["entropies", "log-probabilities"])
def test_entropies_in_a_checkpoint(order, reentrant):
    """verl's checkpoint is reentrant: it runs without a graph, then again in the backward pass on another tensor."""
    x, labels = peaked()
    wanted = gradient(x, *defined(x, labels))
    with ours.patch():
        functions = asked(labels, order)
        functions["entropy"] = partial(checkpoint, functions["entropy"], use_reentrant=reentrant)
        batches = []
        for _ in range(2):
            logits = x * 1
            batches.append(pair({name: f(logits) for name, f in functions.items()}))
            # the recomputation must not reuse the pass of this call
            functions["logp"](logits)
        for results in batches:
            assert_close([gradient_of_backward(x, *results)], [wanted])


def gradient_of_backward(x, *results):
    x.grad = None
    loss_of(*results).backward()
    return x.grad


@in_each_order
@pytest.mark.parametrize("last", ["first result", "both results", "backward"])
def test_nothing_outlives_the_logits(last, order):
    x, labels = peaked()
    with ours.patch():
        logits = x * 1
        kept = weakref.ref(logits), StorageWeakRef(logits.untyped_storage())
        functions = asked(labels, order)
        if last == "first result":
            functions.popitem()
        results = [f(logits) for f in functions.values()]
        if last == "backward":
            sum(y.sum() for y in results).backward()
        del logits
        if last == "backward":
            assert kept[0]() is None and kept[1].expired()
        else:
            # the graph keeps the storage
            assert not kept[1].expired()
        del results
        assert kept[0]() is None and kept[1].expired()
