import pytest
import torch
from rollout_cases import make_model, make_prompts, one_thread, stock_logits  # noqa: F401
from transformers import Qwen3Config, Qwen3ForCausalLM

from prism.models.packed import batch_images
from prism.rollout import lean
from prism.rollout.lean import LeanBatch, why_not_lean
from prism_kernels.integrations.transformers.attention import use_prefix_attention

COPIES, STEPS = 3, 7


def random_tokens(prompts, seed=2):
    return torch.randint(0, 250, (COPIES * prompts, STEPS), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def lean_logits(model, prompts, tokens):
    """Returns the logits (R, STEPS + 1, V) from the prompt's end on."""
    batch = LeanBatch(model, prompts, COPIES, STEPS)
    logits = [batch.logits.repeat_interleave(COPIES, 0)]
    logits += [batch.step(tokens[:, t]) for t in range(STEPS)]
    return torch.stack(logits, 1)


def all_stock_logits(model, prompts, tokens):
    return torch.stack([stock_logits(model, prompts[row // COPIES], ids.tolist()) for row, ids in enumerate(tokens)])


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "moe"])
@pytest.mark.parametrize("small", [False, True], ids=["at once", "several packs, growing cache"])
def test_lean_logits_equal_the_stock_forward(dense, small, monkeypatch):
    if small:
        monkeypatch.setattr(lean, "PREFILL_TOKENS", 24)
        monkeypatch.setattr(lean, "FIRST_COLUMNS", 2)
    model, prompts = make_model(dense=dense), make_prompts()
    tokens = random_tokens(len(prompts))
    got = lean_logits(model, prompts, tokens)
    expected = all_stock_logits(model, prompts, tokens)
    assert expected.abs().max() > 3
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_lean_logits_of_equal_prompts_need_no_mask():
    model, prompts = make_model(), make_prompts([(3, [(1, 4, 4)], 2), (5, [(1, 2, 8)], 0)])
    tokens = random_tokens(2)
    with torch.no_grad():
        assert LeanBatch(model, prompts, 1, 1).mask is None
    torch.testing.assert_close(
        lean_logits(model, prompts, tokens), all_stock_logits(model, prompts, tokens), rtol=0, atol=1e-5
    )


def test_lean_logits_in_bfloat16_are_as_exact_as_the_stock_ones():
    prompts = make_prompts()
    tokens = random_tokens(len(prompts))
    model = make_model(torch.bfloat16)
    got, stock = lean_logits(model, prompts, tokens), all_stock_logits(model, prompts, tokens)
    assert got.dtype == torch.bfloat16
    exact = all_stock_logits(model.double(), prompts, tokens)
    error, stock_error = (x.double().sub(exact).square().mean().sqrt() for x in (got, stock))
    assert 0 < error < 1.2 * stock_error


def test_lean_step_runs_beside_the_attention_and_the_vision_tower_of_training():
    model, prompts = make_model(), make_prompts()
    tokens = random_tokens(len(prompts))
    expected = all_stock_logits(model, prompts, tokens)
    use_prefix_attention(model.model)
    batch_images(model.model.visual)
    torch.testing.assert_close(lean_logits(model, prompts, tokens), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_kept_rows_continue_unchanged_when_others_leave():
    model, prompts = make_model(), make_prompts()
    tokens = random_tokens(len(prompts))
    whole = lean_logits(model, prompts, tokens)
    batch = LeanBatch(model, prompts, COPIES, STEPS)
    rows = torch.arange(len(tokens))
    for t in range(STEPS):
        # rows leave at two steps: first a whole group and parts of others
        for step, order in ((2, [0, 11, 2, 10, 7]), (4, [3, 1])):
            if t == step:
                batch.keep(torch.tensor(order))
                rows = rows[order]
        logits = batch.step(tokens[rows, t])
        assert len(logits) == len(rows)
        torch.testing.assert_close(logits, whole[rows, t + 1], rtol=0, atol=1e-5)
    assert rows.tolist() == [10, 11]


def test_a_model_that_the_lean_step_does_not_know_is_named():
    config = Qwen3Config(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
    assert "written for Qwen3VLForConditionalGeneration" in why_not_lean(Qwen3ForCausalLM(config))
    model = make_model()
    assert why_not_lean(model) is None
    model.config.text_config.rope_parameters["rope_type"] = "dynamic"
    assert "rope_type 'dynamic' changes with the length" in why_not_lean(model)


def test_modules_other_than_plain_linear_layers_are_called():
    model, prompts = make_model(), make_prompts()
    tokens = random_tokens(len(prompts))
    plain = lean_logits(model, prompts, tokens)
    layer = model.model.language_model.layers[0]
    for module in (layer.self_attn.q_proj, layer.mlp.up_proj):
        module.register_forward_hook(lambda module, args, out: 1.5 * out)
    got = lean_logits(model, prompts, tokens)
    torch.testing.assert_close(got, all_stock_logits(model, prompts, tokens), rtol=0, atol=1e-5)
    assert (got - plain).abs().max() > 1e-2
