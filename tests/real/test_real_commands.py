"""The commands that read a run of a real folder: settings checked, figures, export, report, doctor."""

import re

import torch
from PIL import Image
from real_data import respond
from real_runs import STAGES, different, evaluations_of
from transformers import AutoModelForImageTextToText, AutoTokenizer

from prism.models.building import load_dense, load_encoder
from prism.models.policy import Policy, pack_responses, response_ids
from prism.rewards import score_batch
from prism_kernels.segments import Reason, find_segments, token_bytes


def test_a_dry_run_counts_the_rows_of_each_file(used):
    counts = dict(re.findall(r"# data\.files\.(\w+): (\d+ of \d+) rows", used.said["dry-run"]))
    assert counts == {
        "sft": "39 of 40", "warmup": "24 of 24", "align": "24 of 24",
        "rlvr": "24 of 24", "validation": "8 of 8", "test": "8 of 8",
    }  # fmt: skip


def test_eval_gives_the_figures_of_the_run(used, whole):
    theirs = evaluations_of(whole)["rlvr"]["test"]
    ours = used.figures["all"]
    for name in ("samples", "accuracy", "format", "length"):
        assert ours[name] == theirs[name], name
    assert set(used.figures["by_source"]) == {"discs/0", "discs/1", "discs/2"} and used.figures["skipped"] == {}


def test_plain_transformers_loads_the_export_and_computes_the_same(used, whole):
    assert different(used.exported, whole / "policy") == []
    model = AutoModelForImageTextToText.from_pretrained(used.exported, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(used.exported)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    encoder = load_encoder("--model", str(used.exported))
    images = [Image.radial_gradient("L").resize(size) for size in ((30, 40), (900, 500))]
    prompt = encoder.encode("<image>Which colour has<image>the disc?", images)
    (response,) = response_ids([respond([("red", "left")], "B", compact=True)], encoder)
    ids = torch.tensor([[*prompt.input_ids, *response]])
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
            mm_token_type_ids=(ids == encoder.image_token_id).int(),
        ).logits[0, len(prompt.input_ids) - 1 : -1]
    theirs = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
    policy = Policy(load_dense("--model", str(used.exported), torch.float32)).eval()
    (part,) = pack_responses([prompt], [response], [0], encoder, 1024)
    with torch.no_grad():
        ours = policy(part.pack, part.pixel_values, part.image_grid_thw).logp
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_report_and_the_model_card_tell_of_every_stage(used, whole):
    page, card = (whole / "report.html").read_text(), (used.exported / "README.md").read_text()
    assert str(whole / "report.html") in used.said["report"]
    for stage in STAGES:
        assert f"{stage}" in page and f"| {stage} |" in card
    # a response of the run, and no number that could not be computed
    assert re.search(r"<b>answer</b>[A-D]</div>", page) and not re.search(r"\b(NaN|undefined)\b", page)
    assert "The run is finished." in card


def test_our_inputs_are_those_of_transformers(used, place, whole):
    # small, large and several images, and none
    assert len(re.findall(r"^sft\.jsonl, row \d+ .* equal +equal *$", used.said["doctor"], re.MULTILINE)) == 8
    said = (place.folder / "logs" / "whole.txt").read_text()
    assert re.search(r"the inputs of \d+ rows with \d+ images equal those of transformers", said)


def test_every_form_of_a_letter_s_answer_gets_credit(place):
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "policy")
    table = token_bytes(tokenizer)
    forms = ("B", "\nB\n", " B ", "(B)", "B)", "B.", "\\boxed{B}", "**B**")
    for compact in (True, False):
        whole = respond([("red", "left")], "C", compact=compact)
        texts = [whole.replace("<answer>C<", f"<answer>{form}<") for form in forms]
        for form, text, verdict in zip(forms, texts, score_batch(texts, ["B"] * len(texts))):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            found = find_segments(ids, [0, len(ids)], table)
            assert found.reason.item() == Reason.VALID, form
            # the letter is among the tokens of the answer
            start, end = found.start[0, 2], found.end[0, 2]
            assert "B" in tokenizer.decode(ids[start:end]), form
            assert (verdict.format, verdict.accuracy) == (1.0, 1.0), form
        for verdict in score_batch(texts, ["D"] * len(texts)):
            assert (verdict.format, verdict.accuracy) == (1.0, 0.0)
    # tokens that go across a tag and its text
    joined = tokenizer.tokenize("<caption>- a red disc (left)</caption><answer>B</answer>")
    assert {">B", ")</", ">-"} <= set(joined)
