import json
import pickle

import pytest
import torch
from discriminator_cases import SIZE, TOKENIZER, make_backbone, make_groups, make_images, pack_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from prism.discriminator.model import Discriminator
from prism.discriminator.storage import LAYOUTS, load_discriminator, save_discriminator
from prism.models.tiny import tiny_discriminator_base

EXPERTS = "model.language_model.layers.1.mlp.experts."
# E experts, D hidden, I expert width
E, D, I = SIZE.experts, SIZE.hidden_size, SIZE.expert_intermediate_size  # noqa: E741


def make_discriminator(**options):
    backbone = make_backbone(**options)
    width = backbone.config.text_config.hidden_size
    return Discriminator(backbone, value_weight=torch.randn(1, width, generator=torch.Generator().manual_seed(2)))


def square_backbone():
    """Returns a backbone with I = D / 2, so that (E, D, 2I) and (E, 2I, D) are one shape, which loads unchanged."""
    backbone, _ = tiny_discriminator_base(SIZE, tokenizer=TOKENIZER)
    config = backbone.config
    config.text_config.moe_intermediate_size = D // 2
    torch.manual_seed(0)
    return type(backbone)(config).model.eval()


def scores(model):
    groups = make_groups()
    with torch.no_grad():
        return model(pack_of(groups), *make_images(groups, torch.float32))


def assert_same(first, second):
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def untag(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["expert_layout"]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoint_round_trip(layout, tmp_path):
    model = make_discriminator()
    loaded = load_discriminator(save_discriminator(model, tmp_path, layout=layout))
    assert_same(model, loaded)
    assert torch.equal(scores(model), scores(loaded))
    stored = load_file(tmp_path / "model.safetensors")
    expected = {"transformers": ((E, 2 * I, D), (E, D, I))}.get(layout, ((E, D, 2 * I), (E, I, D)))
    assert (stored[EXPERTS + "gate_up_proj"].shape, stored[EXPERTS + "down_proj"].shape) == expected


def test_layouts_are_the_documented_ones(tmp_path):
    model = make_discriminator()
    stored = {
        layout: load_file(save_discriminator(model, tmp_path / layout, layout=layout) / "model.safetensors")
        for layout in LAYOUTS
    }
    gate, up = stored["transformers"][EXPERTS + "gate_up_proj"].transpose(1, 2).chunk(2, dim=2)
    published, interleaved = (stored[layout][EXPERTS + "gate_up_proj"] for layout in ("published", "interleaved"))
    assert torch.equal(published[:, :, :I], gate) and torch.equal(published[:, :, I:], up)
    assert torch.equal(interleaved[:, :, 0::2], gate) and torch.equal(interleaved[:, :, 1::2], up)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tag_names_the_layout_where_the_shape_does_not(layout, tmp_path):
    model = Discriminator(square_backbone(), value_weight=torch.ones(1, D))
    save_discriminator(model, tmp_path, layout=layout)
    assert load_file(tmp_path / "model.safetensors")[EXPERTS + "gate_up_proj"].shape == (E, D, D)
    assert_same(model, load_discriminator(tmp_path))
    untag(tmp_path)
    assert_same(model, load_discriminator(tmp_path, layout=layout))

    # a loader that goes by the shape silently loads two of the three layouts as another model
    guessed = AutoModelForImageTextToText.from_pretrained(tmp_path).model.state_dict()
    name = (EXPERTS + "gate_up_proj").removeprefix("model.")
    assert torch.equal(guessed[name], model.backbone.state_dict()[name]) == (layout == "transformers")


def test_layout_must_be_said_once(tmp_path):
    save_discriminator(make_discriminator(), tmp_path, layout="published")
    with pytest.raises(ValueError, match="expected layout= to agree with expert_layout 'published'"):
        load_discriminator(tmp_path, layout="transformers")
    untag(tmp_path)
    with pytest.raises(
        ValueError, match=r"expected the layout of the experts \(transformers, published, interleaved\)"
    ):
        load_discriminator(tmp_path)
    with pytest.raises(ValueError, match="layout to be one of 'transformers', 'published', 'interleaved', got 'hub'"):
        load_discriminator(tmp_path, layout="hub")


def test_checkpoint_in_the_wrong_layout_names_the_tensor(tmp_path):
    save_discriminator(make_discriminator(), tmp_path, layout="published")
    untag(tmp_path)
    message = rf"layout transformers: expected .*down_proj of shape \({E}, {D}, {I}\), got \({E}, {I}, {D}\)"
    with pytest.raises(ValueError, match=message):
        load_discriminator(tmp_path, layout="transformers")


def test_bad_tensors_are_named_with_both_shapes(tmp_path):
    save_discriminator(make_discriminator(), tmp_path)
    whole = load_file(tmp_path / "model.safetensors")

    def damaged(**changes):
        save_file({name: t for name, t in (whole | changes).items() if t is not None}, tmp_path / "model.safetensors")
        return tmp_path

    down, norm = EXPERTS + "down_proj", "model.language_model.norm.weight"
    cases = [
        ({down: None}, rf"tensor {down.removeprefix('model.')} of shape \({E}, {D}, {I}\), got none"),
        ({down: whole[down][:3].clone()}, rf"down_proj of shape \({E}, {D}, {I}\), got \(3, {D}, {I}\)"),
        ({norm: torch.ones(3)}, rf"language_model.norm.weight of shape \({D},\), got \(3,\)"),
        ({"model.extra": torch.ones(1)}, "the tensors of Qwen3VLMoeModel alone, got 1 more, the first is extra"),
        ({"v_head.weight": torch.ones(2, D)}, rf"v_head.weight of shape \(1, D\), got \(2, {D}\)"),
        ({"v_head.bias": torch.ones(1)}, "one value-head tensor without bias"),
        ({"v_head.weight": torch.ones(1, 7)}, rf"value_weight of shape \(1, {D}\), got \(1, 7\)"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            load_discriminator(damaged(**changes))
    with pytest.raises(FileNotFoundError, match=r"a tensor v_head.\* or the file value_head.pt"):
        load_discriminator(damaged(**{"v_head.weight": None}))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors in .*, got none"):
        load_discriminator(tmp_path)


@pytest.mark.parametrize("key", ["v_head.weight", "v_head.summary.weight"])
def test_published_value_head_keys_are_read(key, tmp_path):
    model = make_discriminator()
    save_discriminator(model, tmp_path, layout="published")
    # published checkpoints have no layout tag, keep the language-model head, and name the value head in either way
    untag(tmp_path)

    def publish(tensors):
        tensors[key] = tensors.pop("v_head.weight")
        tensors["lm_head.weight"] = torch.zeros(4, D)

    edit(tmp_path, publish)
    assert_same(model, load_discriminator(tmp_path, layout="published"))


@pytest.mark.parametrize("form", ["tensor", "weight", "v_head.summary.weight"])
def test_value_head_file_is_read_without_running_code(form, tmp_path):
    model = make_discriminator()
    save_discriminator(model, tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("v_head.weight"))
    weight = model.value_head.weight.detach().clone()
    torch.save(weight if form == "tensor" else {form: weight}, tmp_path / "value_head.pt")
    assert_same(model, load_discriminator(tmp_path))

    class Harmful:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"weight": Harmful()}, tmp_path / "value_head.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_discriminator(tmp_path)


def test_sharded_checkpoint(tmp_path):
    model = make_discriminator()
    save_discriminator(model, tmp_path, layout="published", max_shard_size="500KB")
    assert (tmp_path / "model.safetensors.index.json").exists() and len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(model, load_discriminator(tmp_path))


@pytest.mark.parametrize("dense", [False, True], ids=["moe", "dense"])
def test_variants_and_dtypes_survive(dense, tmp_path):
    model = make_discriminator(dense=dense, dtype=torch.bfloat16)
    model.images = False
    save_discriminator(model, tmp_path)
    loaded = load_discriminator(tmp_path)
    assert_same(model, loaded)
    assert loaded.images is False and type(loaded.backbone) is type(model.backbone)
    assert loaded.backbone.dtype == torch.bfloat16 and loaded.value_head.weight.dtype == torch.float32
    wide = load_discriminator(tmp_path, dtype=torch.float32, images=True)
    assert wide.backbone.dtype == torch.float32 and wide.images is True
    assert ("expert_layout" in json.loads((tmp_path / "config.json").read_text())) == (not dense)


def test_kind_biases_survive(tmp_path):
    model = Discriminator(make_backbone(), value_weight=torch.ones(1, D), kind_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("kind_bias"):
                parameter.normal_()
    save_discriminator(model, tmp_path)
    loaded = load_discriminator(tmp_path)
    assert_same(model, loaded)
    assert loaded.kind_bias is True
    name = "model.language_model.layers.1.mlp.kind_bias"
    edit(tmp_path, lambda tensors: tensors.update({name: torch.zeros(4, E)}))
    with pytest.raises(ValueError, match=rf"layers.1.mlp.kind_bias of shape \(5, {E}\), got \(4, {E}\)"):
        load_discriminator(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(
        ValueError, match=rf"tensor language_model.layers.1.mlp.kind_bias of shape \(5, {E}\), got none"
    ):
        load_discriminator(tmp_path)


@pytest.mark.parametrize("layout", ["transformers", "published"])
def test_backbone_loads_in_plain_transformers(layout, tmp_path):
    model = make_discriminator()
    save_discriminator(model, tmp_path, layout=layout)
    plain, loading = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert set(loading["missing_keys"]) == {"lm_head.weight"}
    assert set(loading["unexpected_keys"]) == {"v_head.weight"}
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, plain.model.state_dict()[name]), name
