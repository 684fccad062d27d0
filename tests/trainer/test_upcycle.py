import pytest
import torch
from discriminator_cases import IMAGE, TOKENIZER
from safetensors.torch import load_file, save_file

from prism.discriminator.upcycle import UpcycleReport, measure_upcycle, upcycle, upcycled_config, upcycled_state
from prism.models.tiny import tiny_policy


@pytest.fixture(scope="module")
def dense():
    return tiny_policy(tokenizer=TOKENIZER)[0]


@pytest.fixture(scope="module")
def batch():
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 250, (1, 40), generator=rng)
    ids[0, 4:10] = IMAGE
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(24, 1536, generator=rng),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (1, 1), (3, 3), (8, 1), (5, 4)])
def test_upcycling_is_exact_without_noise(dense, batch, experts, top_k):
    moe = upcycle(dense, experts, top_k)
    text = moe.config.text_config
    assert (text.num_experts, text.num_experts_per_tok) == (experts, top_k)
    assert len(moe.language_model.layers) == 3
    report = measure_upcycle(dense, moe, batch, 0.0)
    assert report.hidden_change < 1e-6 and report.logit_change < 1e-6
    assert all(change < 1e-6 for change in report.layer_change) and len(report.layer_change) == 3
    report.require(1e-6)


def test_upcycling_with_noise_is_bounded_and_measured(dense, batch):
    changes = []
    for noise in (0.003, 0.01, 0.03):
        report = measure_upcycle(dense, upcycle(dense, 4, 2, noise=noise), batch, noise)
        # the relative change of the function is of the order of the relative noise
        assert noise / 10 < report.hidden_change < noise and noise / 10 < report.logit_change < noise
        changes.append(report.hidden_change)
    assert changes == sorted(changes)
    assert report.require(0.05) is report
    with pytest.raises(ValueError, match=r"upcycle: expected hidden states to change by at most 0.001 at noise 0.03"):
        report.require(1e-3)
    with pytest.raises(ValueError, match=r"logits to change by at most 0.5"):
        UpcycleReport(0.1, (), 0.1, float("nan")).require(0.5)


def test_published_absolute_noise_changes_the_function_and_relative_noise_does_not(dense, batch):
    """Defect N: noise of 0.01 is a third to a half of the standard deviation of these weights."""
    ours = measure_upcycle(dense, upcycle(dense, 4, 2, noise=0.01), batch, 0.01)

    published = upcycle(dense, 4, 2)
    rng = torch.Generator().manual_seed(0)
    ratios = []
    with torch.no_grad():
        for layer in published.language_model.layers:
            for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                ratios.append(0.01 / float(weight.std()))
                weight += 0.01 * torch.randn(weight.shape, generator=rng)
    theirs = measure_upcycle(dense, published, batch, 0.01)
    assert min(ratios) > 0.3 and max(ratios) < 0.6
    bound = 0.02
    assert theirs.hidden_change > 5 * bound and theirs.logit_change > 5 * bound
    assert ours.hidden_change < bound and ours.logit_change < bound


def test_noise_is_relative_to_each_weight(dense):
    moe = upcycle(dense, 4, 2, noise=0.25)
    for layer, source in zip(moe.language_model.layers, dense.model.language_model.layers):
        gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
        down = layer.mlp.experts.down_proj
        for experts, weight in ((gate, source.mlp.gate_proj), (up, source.mlp.up_proj), (down, source.mlp.down_proj)):
            ratio = (experts - weight.weight).std(dim=(1, 2)) / weight.weight.std()
            assert torch.allclose(ratio, torch.full((4,), 0.25), rtol=0.05)
            assert not torch.equal(experts[0], experts[1])


def test_router_is_small_random_and_seeded(dense):
    first, again, other = (upcycle(dense, 4, 2, seed=seed).state_dict() for seed in (0, 0, 1))
    router = first["language_model.layers.1.mlp.gate.weight"]
    assert 0.004 < float(router.std()) < 0.008
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(router, other["language_model.layers.1.mlp.gate.weight"])


def test_upcycling_keeps_everything_else_and_shares_no_memory(dense):
    moe = upcycle(dense, 4, 2)
    source = dense.model.state_dict()
    kept = 0
    for name, tensor in moe.state_dict().items():
        if "language_model" in name and ".mlp." in name:
            continue
        assert torch.equal(tensor, source[name]) and tensor.data_ptr() != source[name].data_ptr(), name
        kept += 1
    assert kept == len(source) - 3 * 3
    text, moe_text = dense.config.text_config, moe.config.text_config
    for key in ("rope_parameters", "rms_norm_eps", "head_dim", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(text, key) == getattr(moe_text, key), key
    assert moe.config.image_token_id == dense.config.image_token_id


def test_upcycling_keeps_the_dtype(dense):
    half = upcycle(tiny_policy(tokenizer=TOKENIZER)[0].to(torch.bfloat16), 4, 2, noise=0.1)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("experts", "top_k", "message"),
    [
        (0, 1, "num_experts >= 1, got 0"),
        (4, 0, r"top_k in \[1, num_experts = 4\], got 0"),
        (4, 5, r"top_k in \[1, num_experts = 4\], got 5"),
    ],
)
def test_impossible_experts_are_refused(dense, experts, top_k, message):
    with pytest.raises(ValueError, match=f"upcycle: expected {message}"):
        upcycle(dense, experts, top_k)


def test_bad_tensors_are_named(dense):
    config = upcycled_config(dense.config, 4, 2)
    state = dict(dense.model.state_dict())
    name = "language_model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=rf"upcycle: expected {name} of shape \(256, 96\), got \(96, 256\)"):
        upcycled_state(state | {name: state[name].t()}, config)
    del state[name]
    with pytest.raises(ValueError, match=rf"upcycle: expected tensor {name} of shape \(256, 96\), got none"):
        upcycled_state(state, config)
    with pytest.raises(ValueError, match="upcycle: expected noise >= 0 and finite, got -1"):
        upcycle(dense, 4, 2, noise=-1)
    with pytest.raises(TypeError, match="upcycle: expected a dense Qwen3-VL model or its folder, got Qwen3VLMoeConfig"):
        upcycle(upcycle(dense, 2, 1), 2, 1)


def test_checkpoint_upcycles_as_its_model_does(dense, tmp_path):
    dense.save_pretrained(tmp_path)
    expected, got = (upcycle(source, 4, 2, noise=0.1, seed=2) for source in (dense, tmp_path))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, got.state_dict()[name]), name
    tensors = load_file(tmp_path / "model.safetensors")
    name = "language_model.layers.2.mlp.gate_proj.weight"
    for changed, shape in ((torch.zeros(8, 96), r"\(8, 96\)"), (None, "none")):
        kept = {key: t for key, t in (tensors | {f"model.{name}": changed}).items() if t is not None}
        save_file(kept, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=rf"{name} of shape \(256, 96\), got {shape}"):
            upcycle(tmp_path, 4, 2)
