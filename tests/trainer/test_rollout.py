import copy

import pytest
import torch
from rollout_cases import (
    IMAGE,
    STOP,
    TOKENIZER,
    make_model,
    make_prompts,
    model_inputs,
    one_thread,  # noqa: F401
    stock_logits,
)
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3Config, Qwen3ForCausalLM

from prism.models.prompts import EncodedPrompt
from prism.models.tiny import TEXT_TOKENS
from prism.rollout.engine import Engine
from prism.rollout.options import Sampling

PATHS = pytest.mark.parametrize("path", ["lean", "stock"])
# letters and digits: with these stop tokens, responses end early, at many lengths
MANY_STOPS = tuple(range(15, 65))


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def prompts():
    return make_prompts()


def tokens_of(rollouts):
    return [rollout.token_ids for rollout in rollouts]


def same(first, second, tolerance=1e-5):
    assert tokens_of(first) == tokens_of(second)
    for a, b in zip(first, second):
        assert a.finish_reason == b.finish_reason
        torch.testing.assert_close(a.log_probs, b.log_probs, rtol=0, atol=tolerance)
        torch.testing.assert_close(a.model_log_probs, b.model_log_probs, rtol=0, atol=tolerance)


@PATHS
def test_greedy_equals_transformers_generate(model, prompts, path):
    engine = Engine(model, TOKENIZER, path=path)
    stops = (STOP, *MANY_STOPS[:6])
    banned = sorted(engine.banned_token_ids(stops))
    rollouts = engine.generate(prompts, Sampling(temperature=0, max_new_tokens=20), stop_token_ids=stops)
    for prompt, rollout in zip(prompts, rollouts):
        inputs = model_inputs(prompt)
        expected = model.generate(
            **inputs, do_sample=False, max_new_tokens=20, eos_token_id=list(stops), suppress_tokens=banned
        )
        assert rollout.token_ids == expected[0, len(prompt.input_ids) :].tolist()
        assert rollout.log_probs.tolist() == [0.0] * len(rollout.token_ids)
    assert {len(ids) for ids in tokens_of(rollouts)} != {20}


@PATHS
@pytest.mark.parametrize(
    ("sampling", "seed"),
    [
        (Sampling(group=3, max_new_tokens=12), 0),
        (Sampling(group=3, max_new_tokens=12, temperature=0.7), 1),
        (Sampling(group=2, max_new_tokens=12, temperature=1.3, top_k=20, top_p=0.8), 2),
        (Sampling(group=1, max_new_tokens=12, temperature=0), 0),
    ],
    ids=["plain", "temperature", "filters", "greedy"],
)
def test_log_probs_equal_those_of_the_training_forward(model, prompts, path, sampling, seed):
    engine = Engine(model, TOKENIZER, path=path)
    banned = sorted(engine.banned_token_ids(model.generation_config.eos_token_id))
    assert len(banned) >= 12
    for rollout in engine.generate(prompts, sampling, seed=seed):
        logits = stock_logits(model, prompts[rollout.prompt], rollout.token_ids)[:-1] / (sampling.temperature or 1)
        ids = torch.tensor(rollout.token_ids)[:, None]
        expected = logits.log_softmax(-1).gather(1, ids)[:, 0]
        torch.testing.assert_close(rollout.model_log_probs, expected, rtol=0, atol=1e-5)
        if sampling.temperature == 0:
            continue
        logits[:, banned] = -torch.inf
        if sampling.top_k is not None:
            kth = logits.topk(sampling.top_k).values[:, -1:]
            logits[logits < kth] = -torch.inf
            ordered, order = logits.softmax(-1).sort(descending=True)
            cut = ordered.cumsum(-1) - ordered >= sampling.top_p
            logits[torch.zeros_like(cut).scatter(1, order, cut)] = -torch.inf
        expected = logits.log_softmax(-1).gather(1, ids)[:, 0]
        torch.testing.assert_close(rollout.log_probs, expected, rtol=0, atol=1e-5)
        assert (rollout.log_probs >= rollout.model_log_probs - 1e-5).all()


@PATHS
def test_rollouts_come_group_by_group_and_differ(model, prompts, path):
    engine = Engine(model, TOKENIZER, path=path)
    rollouts = engine.generate(prompts, Sampling(group=3, max_new_tokens=8))
    assert [(r.prompt, r.index) for r in rollouts] == [(p, j) for p in range(4) for j in range(3)]
    assert len({tuple(ids) for ids in tokens_of(rollouts)}) == 12


def test_both_paths_give_the_same_rollouts(model, prompts):
    sampling = Sampling(group=3, max_new_tokens=24)
    lean, stock = (
        Engine(model, TOKENIZER, path=path).generate(prompts, sampling, seed=4, stop_token_ids=MANY_STOPS)
        for path in ("lean", "stock")
    )
    same(lean, stock)


def test_rollouts_are_repeated_by_their_seed(model, prompts):
    engine = Engine(model, TOKENIZER)
    sampling = Sampling(group=2, max_new_tokens=16)
    first = engine.generate(prompts, sampling, seed=11)
    torch.manual_seed(99)
    same(first, engine.generate(prompts, sampling, seed=11), tolerance=0)
    other = engine.generate(prompts, Sampling(group=2, max_new_tokens=16), seed=12)
    assert all(a != b for a, b in zip(tokens_of(first), tokens_of(other)))


@PATHS
def test_rollouts_do_not_depend_on_the_batch(model, prompts, path):
    engine = Engine(model, TOKENIZER, path=path)
    sampling = Sampling(group=4, max_new_tokens=16)
    whole = engine.generate(prompts, sampling, stop_token_ids=MANY_STOPS[:20])
    # some of the prompts in another order, with the same keys
    part = engine.generate([prompts[2], prompts[0]], sampling, stop_token_ids=MANY_STOPS[:20], keys=[2, 0])
    same(part, whole[8:12] + whole[:4])
    # fewer rollouts of each, and shorter ones
    fewer = engine.generate(prompts, Sampling(group=1, max_new_tokens=5), stop_token_ids=MANY_STOPS[:20])
    assert tokens_of(fewer) == [whole[4 * p].token_ids[:5] for p in range(4)]
    # equal prompts get different rollouts
    twice = engine.generate([prompts[1], prompts[1]], sampling, stop_token_ids=MANY_STOPS[:20])
    assert all(a != b for a, b in zip(tokens_of(twice[:4]), tokens_of(twice[4:])))


def test_small_caches_only_cut_the_batch(model, prompts):
    sampling = Sampling(group=3, max_new_tokens=10)
    whole = Engine(model, TOKENIZER).generate(prompts, sampling)
    sizes = []
    watch = model.model.language_model.embed_tokens.register_forward_hook(
        lambda _, args, __: sizes.append(len(args[0]))
    )
    cut = Engine(model, TOKENIZER, cache_tokens=200).generate(prompts, sampling)
    watch.remove()
    same(whole, cut)
    # batches of two groups at most, never the twelve rows of all groups
    assert 6 in sizes and 12 not in sizes


@PATHS
def test_responses_end_at_the_first_stop_token(model, prompts, path):
    engine = Engine(model, TOKENIZER, path=path)
    steps = 24
    # the same streams without stop tokens give the full responses
    endless = engine.generate(prompts, Sampling(group=6, max_new_tokens=steps), stop_token_ids=())
    assert {(len(r.token_ids), r.finish_reason) for r in endless} == {(steps, "length")}
    stopped = engine.generate(prompts, Sampling(group=6, max_new_tokens=steps), stop_token_ids=MANY_STOPS)
    for full, cut in zip(endless, stopped):
        ends = [i for i, token in enumerate(full.token_ids) if token in MANY_STOPS]
        length = ends[0] + 1 if ends else steps
        assert cut.token_ids == full.token_ids[:length]
        assert cut.finish_reason == ("stop" if ends else "length")
        assert len(cut.log_probs) == len(cut.model_log_probs) == length
        torch.testing.assert_close(cut.log_probs, full.log_probs[:length], rtol=0, atol=1e-5)
    assert len({len(r.token_ids) for r in stopped}) > 5


@PATHS
def test_a_stop_token_may_be_the_only_or_the_last_token(model, prompts, path):
    engine = Engine(model, TOKENIZER, path=path)
    first = [r.token_ids for r in engine.generate(prompts, Sampling(group=2, max_new_tokens=2), stop_token_ids=())]
    one = engine.generate(prompts, Sampling(group=2, max_new_tokens=1), stop_token_ids=(first[0][0],))
    assert tokens_of(one) == [ids[:1] for ids in first]
    assert [r.finish_reason for r in one] == ["stop" if ids[0] == first[0][0] else "length" for ids in first]
    last = engine.generate(prompts[:1], Sampling(group=1, max_new_tokens=2), stop_token_ids=(first[0][1],))
    assert (last[0].token_ids, last[0].finish_reason) == (first[0], "stop")


def test_the_models_own_stop_tokens_are_the_default(model, prompts):
    raised = copy.deepcopy(model)
    raised.lm_head.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor([STOP]), 100.0))
    rollouts = Engine(raised, TOKENIZER).generate(prompts, Sampling(group=2, max_new_tokens=9))
    assert tokens_of(rollouts) == [[STOP]] * 8


@PATHS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_never_appear(model, prompts, path, temperature):
    raised = copy.deepcopy(model)
    engine = Engine(raised, TOKENIZER, path=path)
    banned = sorted(engine.banned_token_ids([STOP]))
    names = {TOKENIZER.convert_ids_to_tokens(i) for i in banned}
    assert {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>"} <= names
    assert not names.intersection({"<|im_end|>", *TEXT_TOKENS})
    raised.lm_head.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor(banned), 60.0))
    sampling = Sampling(group=2, max_new_tokens=10, temperature=temperature)
    for rollout in engine.generate(prompts, sampling, stop_token_ids=(STOP,)):
        assert not set(rollout.token_ids).intersection(banned)
        assert (rollout.log_probs > -30).all() and (rollout.model_log_probs < -30).all()


def test_ids_that_the_tokenizer_does_not_know_are_banned(prompts):
    model = make_model()
    model.resize_token_embeddings(len(TOKENIZER) + 64, mean_resizing=False)
    engine = Engine(model, TOKENIZER)
    assert set(range(len(TOKENIZER), len(TOKENIZER) + 64)) <= engine.banned_token_ids([STOP])
    assert max(max(ids) for ids in tokens_of(engine.generate(prompts, Sampling(group=4, max_new_tokens=8)))) < len(
        TOKENIZER
    )


@PATHS
def test_weights_are_read_at_each_call(prompts, path):
    model = make_model()
    engine = Engine(model, TOKENIZER, path=path)
    sampling = Sampling(group=2, max_new_tokens=8)
    before = engine.generate(prompts, sampling)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    model(**model_inputs(prompts[0]), use_cache=False).logits.square().mean().backward()
    optimiser.step()
    after = engine.generate(prompts, sampling)
    assert tokens_of(after) != tokens_of(before)
    same(after, Engine(copy.deepcopy(model), TOKENIZER, path=path).generate(prompts, sampling), tolerance=0)


@PATHS
def test_training_is_not_disturbed(prompts, path):
    model = make_model().train()
    model.model.visual.eval()
    inputs = model_inputs(prompts[0])
    before = model(**inputs, use_cache=False).logits
    remembered = model.model.rope_deltas
    engine = Engine(model, TOKENIZER, path=path)
    rollouts = engine.generate(prompts[1:], Sampling(group=2, max_new_tokens=4))
    assert model.model.rope_deltas is remembered
    assert model.training and model.lm_head.training and not model.model.visual.training
    after = model(**inputs, use_cache=False).logits
    assert torch.equal(after, before)
    # a loss can use the rollouts' log-probabilities
    (after[0, : len(rollouts[0].log_probs), 0] * rollouts[0].log_probs.exp()).sum().backward()
    assert model.lm_head.weight.grad is not None and not rollouts[0].log_probs.requires_grad


def test_a_prompt_is_computed_once_and_finished_rows_leave(model, prompts):
    rows, patches = [], []
    hooks = [
        model.model.language_model.embed_tokens.register_forward_hook(lambda _, args, __: rows.append(len(args[0]))),
        model.model.visual.register_forward_hook(lambda _, args, __: patches.append(len(args[0]))),
    ]
    sampling = Sampling(group=8, max_new_tokens=24)
    rollouts = Engine(model, TOKENIZER).generate(prompts, sampling, stop_token_ids=MANY_STOPS)
    for hook in hooks:
        hook.remove()
    assert patches == [sum(len(p.pixel_values) for p in prompts if p.pixel_values is not None)]
    assert rows[0] == sum(len(p.input_ids) for p in prompts)
    steps = rows[1:]
    assert 16 < steps[0] <= 32 and steps[-1] < 16 and steps == sorted(steps, reverse=True)
    running = [sum(len(r.token_ids) > t + 1 for r in rollouts) for t in range(len(steps))]
    assert all(now <= step for now, step in zip(running, steps))
    # up to an eighth of the rows may be idle
    assert all(now > 7 / 8 * step or now == step for now, step in zip(running, steps))


def test_other_models_take_the_stock_path():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        eos_token_id=STOP,
        initializer_range=0.5,
    )
    model = Qwen3ForCausalLM(config).eval()
    engine = Engine(model, TOKENIZER)
    assert engine.path == "stock" and "this is Qwen3ForCausalLM" in engine.reason
    prompts = make_prompts([(6, [], 0), (3, [], 0)])
    banned = sorted(engine.banned_token_ids([STOP]))
    for prompt, rollout in zip(prompts, engine.generate(prompts, Sampling(temperature=0, max_new_tokens=8))):
        ids = torch.tensor([prompt.input_ids])
        expected = model.generate(ids, do_sample=False, max_new_tokens=8, suppress_tokens=banned)
        assert rollout.token_ids == expected[0, len(prompt.input_ids) :].tolist()
    with pytest.raises(ValueError, match=r"expected a model for path='lean' \(take path='stock'\), got the lean step"):
        Engine(model, TOKENIZER, path="lean")
    with pytest.raises(TypeError, match="expected a model whose forward takes pixel_values, image_grid_thw, got Qwen3"):
        engine.generate(make_prompts()[:1], Sampling(max_new_tokens=2))


def test_sharded_weights_are_refused_until_they_are_gathered(prompts):
    sampling = Sampling(group=2, max_new_tokens=6)
    model = make_model()
    expected = Engine(model, TOKENIZER).generate(prompts, sampling)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        for part in (*model.model.language_model.layers, model):
            fully_shard(part, mesh=mesh)
        engine = Engine(model, TOKENIZER)
        assert engine.path == "lean"
        with pytest.raises(ValueError, match=r"expected whole parameters on every rank \(unshard\(\) .*, got shards"):
            engine.generate(prompts, sampling)
        for part in (*model.model.language_model.layers, model):
            part.unshard()
        same(engine.generate(prompts, sampling), expected, tolerance=0)
    finally:
        distributed.destroy_process_group()


def test_no_prompts_no_rollouts(model):
    assert Engine(model, TOKENIZER).generate([], Sampling()) == []


def test_broken_weights_are_an_error(prompts):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[7, 3] = torch.nan
    for sampling in (
        Sampling(max_new_tokens=3),
        Sampling(max_new_tokens=3, temperature=0),
        Sampling(group=3, max_new_tokens=3, top_p=0.5),
    ):
        with pytest.raises(FloatingPointError, match="expected finite logits after prompt 0"):
            Engine(model, TOKENIZER).generate(prompts, sampling)


@pytest.mark.parametrize(
    ("prompt", "sampling", "options", "message"),
    [
        (
            EncodedPrompt([], None, None),
            Sampling(),
            {},
            "Engine: expected prompt 0 to have at least one token, got none",
        ),
        (
            EncodedPrompt([1] * 10, None, None),
            Sampling(max_new_tokens=4090),
            {},
            r"expected prompt 0 with max_new_tokens to fit the model's 4096 positions, got 10 \+ 4090",
        ),
        (EncodedPrompt([1, 999], None, None), Sampling(), {}, r"expected token ids of prompt 0 in \[0, 320\), got 999"),
        (
            EncodedPrompt([1], None, None),
            Sampling(),
            {"stop_token_ids": (320,)},
            r"stop_token_ids in \[0, 320\), got \[320",
        ),
        (
            EncodedPrompt([1], None, None),
            Sampling(),
            {"stop_token_ids": (IMAGE,)},
            "stop_token_ids without the model's vis",
        ),
        (EncodedPrompt([1], None, None), Sampling(), {"keys": [1, 2]}, "a key for each of the 1 prompts, got 2 keys"),
        (EncodedPrompt([1], None, None), Sampling(), {"keys": [-2]}, "expected keys >= 0, got -2"),
        (EncodedPrompt([1], None, None), Sampling(), {"seed": -1}, "expected seed to be an integer >= 0, got -1"),
        (EncodedPrompt([1, IMAGE], None, None), Sampling(), {}, "expected 0 image placeholders in group 0"),
        (
            EncodedPrompt([IMAGE], torch.zeros(5, 1536), torch.tensor([[1, 2, 2]])),
            Sampling(),
            {},
            "expected pixel_values with the 4 patches of image_grid_thw, got 5",
        ),
    ],
)
def test_bad_input_is_named(model, prompt, sampling, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(model, TOKENIZER).generate([prompt], sampling, **options)


def test_bad_engines_are_named(model):
    with pytest.raises(ValueError, match="Engine: expected path to be one of 'lean', 'stock', got 'vllm'"):
        Engine(model, TOKENIZER, path="vllm")
    with pytest.raises(ValueError, match="Engine: expected cache_tokens > 0 and finite, got 0"):
        Engine(model, TOKENIZER, cache_tokens=0)
    small = Engine(model, TOKENIZER, cache_tokens=50)
    message = (
        r"expected cache_tokens of at least 80, for the group of prompt 0 \(4 rollouts of up to 20 tokens\), got 50"
    )
    with pytest.raises(ValueError, match=message):
        small.generate(make_prompts([(10, [], 0)]), Sampling(group=4, max_new_tokens=10))
    silent = copy.deepcopy(model)
    silent.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="stop_token_ids, since the model's generation_config names none"):
        Engine(silent, TOKENIZER).generate(make_prompts(), Sampling())
