import math

import pytest
import torch
from rollout_cases import one_thread  # noqa: F401

from prism.rollout.options import Sampling
from prism.rollout.sampling import choose, uniforms

BANNED = torch.tensor([0, 5, 11])
V = 12


def draw(logits, sampling, uniform, banned=BANNED):
    return choose(logits.expand(len(uniform), -1), uniform, sampling, banned)


def even(count):
    """Returns the middles of `count` equal parts of [0, 1): each token is drawn as often as its probability says."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def brute_force(logits, sampling, banned):
    """Returns each token's probability by the definitions, in Python floats."""
    scaled = [-math.inf if i in banned else x / sampling.temperature for i, x in enumerate(logits)]
    order = sorted((i for i in range(len(scaled)) if scaled[i] > -math.inf), key=lambda i: -scaled[i])
    order = order[: sampling.top_k or len(order)]
    total = sum(math.exp(scaled[i]) for i in order)
    kept, reached = [], 0.0
    for i in order:
        if reached >= sampling.top_p:
            break
        kept.append(i)
        reached += math.exp(scaled[i]) / total
    total = sum(math.exp(scaled[i]) for i in kept)
    return {i: math.exp(scaled[i]) / total for i in kept}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_the_distribution(temperature):
    logits = torch.randn(V, generator=torch.Generator().manual_seed(3))
    draws = 20000
    uniform = uniforms(seed=7, keys=[3], n=draws, length=1)[:, 0]
    counts = draw(logits, Sampling(temperature=temperature), uniform).token.bincount(minlength=V)
    expected = brute_force(logits.tolist(), Sampling(temperature=temperature), BANNED.tolist())
    assert set(counts.nonzero()[:, 0].tolist()) == set(expected) and len(expected) == 9
    chi_square = sum((int(counts[i]) - draws * p) ** 2 / (draws * p) for i, p in expected.items())
    # the 99.99 % point of 8 degrees of freedom
    assert chi_square < 31.8


@pytest.mark.parametrize("top_k", [None, 1, 4, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
def test_filters_equal_brute_force(top_k, top_p, temperature):
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    for seed in range(3):
        logits = 2 * torch.randn(V, generator=torch.Generator().manual_seed(seed))
        expected = brute_force(logits.tolist(), sampling, BANNED.tolist())
        choice = draw(logits, sampling, even(4000))
        counts = choice.token.bincount(minlength=V).tolist()
        for token, count in enumerate(counts):
            assert abs(count - 4000 * expected.get(token, 0.0)) < 1 + 1e-2, (seed, token)
        wanted = torch.tensor([math.log(expected[t]) for t in choice.token.tolist()])
        torch.testing.assert_close(choice.log_prob, wanted, rtol=0, atol=2e-6)
        model = (logits / temperature).log_softmax(-1)[choice.token]
        torch.testing.assert_close(choice.model_log_prob, model, rtol=0, atol=2e-6)


def test_filters_of_a_row_are_its_own():
    logits = 2 * torch.randn(6, V, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(top_p=0.7, top_k=5)
    uniform = even(6)
    together = choose(logits, uniform, sampling, BANNED)
    for row in range(6):
        alone = choose(logits[row : row + 1], uniform[row : row + 1], sampling, BANNED)
        assert alone.token == together.token[row] and alone.log_prob == together.log_prob[row]


def test_greedy_takes_the_largest_that_is_not_banned():
    logits = torch.tensor([[9.0, 1, 2, 3, 2, 9, 0, 0, 0, 0, 0, 9], [0.0, 4, 2, 3, 2, 9, 0, 0, 0, 0, 0, 9]])
    choice = choose(logits, even(2), Sampling(temperature=0), BANNED)
    assert choice.token.tolist() == [3, 1]
    assert choice.log_prob.tolist() == [0, 0]
    torch.testing.assert_close(choice.model_log_prob, logits.log_softmax(-1)[[0, 1], [3, 1]])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=V), Sampling(top_p=0.999)])
def test_banned_tokens_have_no_chance_at_the_ends_of_the_interval(sampling):
    # the first and the last token are banned, and have far larger logits than the others
    logits = torch.full((V,), -30.0).index_fill(0, BANNED, 80.0)
    ends = torch.tensor([0.0, 1 - 2.0**-53, 0.5, 2.0**-53], dtype=torch.float64)
    choice = draw(logits, sampling, ends)
    assert not torch.isin(choice.token, BANNED).any()
    torch.testing.assert_close(choice.log_prob, torch.full((4,), -math.log(9)), rtol=0, atol=1e-6)
    if sampling == Sampling():
        assert choice.token[:2].tolist() == [1, 10]


def test_rounding_at_the_end_of_the_interval_reaches_no_banned_token():
    logits = torch.randn(500, V, generator=torch.Generator().manual_seed(0))
    last = torch.full((500,), 1 - 2.0**-53, dtype=torch.float64)
    assert (choose(logits, last, Sampling(), BANNED).token == V - 2).all()


def test_rare_tokens_are_drawn_as_often_as_they_should():
    logits = torch.tensor([0.0, -25.0, -0.5])
    rare = math.exp(-25) / (1 + math.exp(-25) + math.exp(-0.5))
    first = 1 / (1 + math.exp(-25) + math.exp(-0.5))
    uniform = first + rare * torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)
    # fp32 softmax places the first boundary to about 1e-7 only: 1e-11 wide, the rare token comes right after it
    edge = logits.softmax(-1)[0].double() / (logits.log_softmax(-1).exp().double().sum())
    choice = draw(logits.double(), Sampling(), uniform, banned=torch.tensor([], dtype=torch.int64))
    assert choice.token.tolist() == [1, 1, 1]
    assert draw(logits, Sampling(), edge[None] - 1e-6, BANNED[:0]).token.item() == 0
    assert draw(logits, Sampling(), edge[None] + 1e-6, BANNED[:0]).token.item() == 2


def test_uniform_numbers_depend_on_seed_key_and_row_alone():
    both = uniforms(5, [3, 8], n=4, length=20)
    assert both.shape == (8, 20) and both.dtype == torch.float64
    assert both.min() >= 0 and both.max() < 1
    assert torch.equal(both[4:6, :7], uniforms(5, [8], n=2, length=7))
    assert len(both.unique()) == both.numel()
    assert not torch.equal(both, uniforms(6, [3, 8], n=4, length=20))
    many = uniforms(0, range(100), n=10, length=10)
    assert abs(float(many.mean()) - 0.5) < 0.01 and abs(float(many.var()) - 1 / 12) < 0.003


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 0}, r"^group: expected a number greater than 0, got 0$"),
        ({"group": None}, r"^group: expected a valid integer, got None$"),
        ({"max_new_tokens": 1.5}, r"^max_new_tokens: expected a valid integer, got 1.5$"),
        ({"temperature": -0.1}, r"^temperature: expected a number greater than or equal to 0, got -0.1$"),
        ({"temperature": math.nan}, r"^temperature: expected a finite number, got nan$"),
        ({"top_p": 0.0}, r"^top_p: expected a number greater than 0, got 0.0$"),
        ({"top_p": 1.1}, r"^top_p: expected a number less than or equal to 1, got 1.1$"),
        ({"top_k": 0}, r"^top_k: expected a number greater than 0, got 0$"),
    ],
)
def test_sampling_names_what_it_expected(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
