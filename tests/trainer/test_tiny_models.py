import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

from prism.models.building import load_encoder
from prism.models.prompts import PromptEncoder
from prism.models.sizes import TinyMoeSize, TinySize
from prism.models.tiny import (
    SPECIAL_TOKENS,
    save_processor,
    save_tiny,
    tiny_discriminator_base,
    tiny_image_processor,
    tiny_policy,
    train_tokenizer,
)

FRESH_PROCESS = """
import json, sys
import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from prism.models.tiny import train_tokenizer

train_tokenizer().save_pretrained(sys.argv[1])
for folder in sys.argv[2:]:
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    tokenizer = AutoTokenizer.from_pretrained(folder)
    patches = AutoImageProcessor.from_pretrained(folder, backend="pil")(
        images=[Image.fromarray(np.arange(64 * 96 * 3, dtype=np.uint8).reshape(64, 96, 3))], return_tensors="pt")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}],
        tokenize=False, add_generation_prompt=True)
    tokens = int(patches["image_grid_thw"].prod()) // 4
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * tokens), return_tensors="pt")["input_ids"]
    kinds = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        logits = model(input_ids=ids, mm_token_type_ids=kinds, **patches).logits
        out = model.generate(input_ids=ids, mm_token_type_ids=kinds, max_new_tokens=3, do_sample=False, **patches)
    print(json.dumps({"ids": ids[0].tolist(), "sum": logits.double().sum().item(), "generated": out.shape[1]}))
"""


def chat_image():
    return Image.fromarray(np.arange(64 * 96 * 3, dtype=np.uint8).reshape(64, 96, 3))


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory):
    """Two tiny models, the outputs of another process that loads them, and the tokenizer that it trains."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer()
    built = {"policy": tiny_policy(tokenizer=tokenizer)[0], "moe": tiny_discriminator_base(tokenizer=tokenizer)[0]}
    folders = [str(save_tiny(folder / name, model, tokenizer)) for name, model in built.items()]
    command = [sys.executable, "-c", FRESH_PROCESS, str(folder / "tokenizer"), *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    outputs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(outputs) == 2
    return tokenizer, built, outputs, folder / "tokenizer"


def test_tiny_models_load_in_plain_transformers_in_a_fresh_process(fresh_process):
    tokenizer, built, outputs, _ = fresh_process
    encoder = PromptEncoder(tokenizer, tiny_image_processor())
    prompt = encoder.encode("How many?", [chat_image()])
    ids = torch.tensor([prompt.input_ids])
    for model, output in zip(built.values(), outputs):
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                mm_token_type_ids=(ids == encoder.image_token_id).int(),
                pixel_values=prompt.pixel_values,
                image_grid_thw=prompt.image_grid_thw,
            ).logits
        assert prompt.input_ids == output["ids"]
        assert logits.double().sum().item() == pytest.approx(output["sum"], rel=1e-5)
        assert output["generated"] == len(output["ids"]) + 3


def test_tiny_models_share_their_tokenizer_and_differ_by_seed_alone(tmp_path):
    first, tokenizer = tiny_policy(seed=3)
    again, _ = tiny_policy(tokenizer=tokenizer, seed=3)
    other, _ = tiny_policy(tokenizer=tokenizer, seed=4)
    moe, same = tiny_discriminator_base(tokenizer=tokenizer)
    assert same is tokenizer
    assert moe.config.text_config.vocab_size == first.config.text_config.vocab_size == len(tokenizer)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight is not first.model.language_model.embed_tokens.weight


def test_tiny_model_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    tiny_policy()
    assert torch.equal(torch.rand(3), expected)


def test_tokenizer_has_the_same_bytes_in_every_process(fresh_process, tmp_path):
    *_, other = fresh_process
    train_tokenizer().save_pretrained(tmp_path)
    files = sorted(path.name for path in other.iterdir())
    assert "tokenizer.json" in files and "chat_template.jinja" in files
    for file in files:
        assert (other / file).read_bytes() == (tmp_path / file).read_bytes()


def test_tokenizer_round_trips_any_text_and_keeps_special_tokens_whole(tmp_path):
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("<caption>a red star</caption>", "Größe 3\t≈ √2 🦊\n\n", "<think>\nI'd say 3+4=7\n</think>", ""):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert loaded(text)["input_ids"] == ids
    for token in (*SPECIAL_TOKENS, "<think>", "</think>"):
        assert len(tokenizer(token)["input_ids"]) == 1
    # a decoder skips special tokens, but prints the tags of the thinking
    assert tokenizer.decode(tokenizer("<|im_end|><think>")["input_ids"], skip_special_tokens=True) == "<think>"


def test_tiny_size_refuses_shapes_that_loaders_confuse():
    with pytest.raises(ValueError, match=r"expert_intermediate_size: expected other than hidden_size"):
        TinyMoeSize(expert_intermediate_size=96)
    with pytest.raises(ValueError, match=r"^intermediate_size: expected other than .* = 96 and its half, got 48"):
        TinySize(intermediate_size=48)
    with pytest.raises(ValueError, match=r"experts_per_token: expected at most experts = 4, got 5"):
        TinyMoeSize(experts_per_token=5)
    with pytest.raises(ValueError, match=r"vocab_size >= 272"):
        train_tokenizer(vocab_size=200)


def test_processor_files_name_their_classes(tmp_path):
    model, tokenizer = tiny_policy()
    save_tiny(tmp_path, model, tokenizer)
    image = json.loads((tmp_path / "preprocessor_config.json").read_text())
    video = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert (image["processor_class"], image["image_processor_type"]) == ("Qwen3VLProcessor", "Qwen2VLImageProcessor")
    assert video["video_processor_type"] == "Qwen3VLVideoProcessor"
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer("three")["input_ids"] == tokenizer("three")["input_ids"]


def test_a_model_of_a_folder_is_saved_with_its_settings_of_videos(tmp_path):
    save_tiny(tmp_path / "given", *tiny_policy())
    path = tmp_path / "given" / "video_preprocessor_config.json"
    # Qwen3-VL's limits of videos are not those of images
    settings = {**json.loads(path.read_text()), "size": {"longest_edge": 25165824, "shortest_edge": 4096}, "fps": 2}
    path.write_text(json.dumps(settings))
    save_processor(tmp_path / "saved", load_encoder("model.policy", str(tmp_path / "given"), 50000))
    assert json.loads((tmp_path / "saved" / path.name).read_text()) == settings
    assert json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())["size"]["longest_edge"] == 50000


def test_saved_weights_are_the_model(tmp_path):
    model, tokenizer = tiny_discriminator_base()
    save_tiny(tmp_path, model, tokenizer)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_prism_itself_imports_nothing():
    program = "import prism, sys; print(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
