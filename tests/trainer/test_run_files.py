"""Runs on data files and saved models: every setting takes effect, and a resumed run equals an uninterrupted one."""

import json
import re
from pathlib import Path

import pytest
import torch
from loader_cases import RESPONSE, chat, picture, problem, warmup, without, write_images, write_lines
from shapes_files import write_problems, write_sft, write_warmup
from test_run import SMALL, SPENT, metrics_stage, weights

from prism import cli
from prism.commands.run import run_stages
from prism.config import load_config
from prism.data.files import DataError
from prism.data.loader import dry_run
from prism.data.problem import problem_reader
from prism.data.sources import problems_of
from prism.discriminator.score import prepare_groups, sample_of
from prism.models.prompts import PromptEncoder
from prism.models.sizes import TinyMoeSize
from prism.models.tiny import save_tiny, tiny_discriminator_base, tiny_image_processor, tiny_policy, train_tokenizer
from prism.runtime.log import read_metrics
from prism.runtime.runtime import Runtime
from prism.runtime.signals import InterruptedRunError
from prism.worlds.shapes.world import ShapesWorld

STAGES = ("sft", "warmup", "align", "rlvr")
SIZE = TinyMoeSize(
    hidden_size=32, intermediate_size=48, expert_intermediate_size=48, layers=2, heads=2, key_value_heads=1,
    vision_hidden_size=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder():
    # trained on texts without tags, so that no token joins the end of a tag to a word
    sections = [sample.response.sections for sample in ShapesWorld().samples("sft", 60)]
    texts = ["user\n", "assistant\n", *(text for one in sections for text in (one.caption, one.think))]
    return PromptEncoder(train_tokenizer(texts), tiny_image_processor(SIZE))


@pytest.fixture(scope="module")
def given(tmp_path_factory, encoder):
    """A user's models and files; the SFT file has a bad row, and the alignment file has a row without a teacher."""
    folder = tmp_path_factory.mktemp("given")
    for name, build, seed in (("policy", tiny_policy, 3), ("discriminator", tiny_discriminator_base, 4)):
        model, tokenizer = build(SIZE, tokenizer=encoder.tokenizer, seed=seed)
        save_tiny(folder / name, model, tokenizer, encoder.image_processor)
    world = ShapesWorld(7)
    public, curated = list(world.samples("sft", 8)), list(world.samples("alignment", 8))
    write_sft(folder / "sft.jsonl", public)
    with (folder / "sft.jsonl").open("a") as file:
        file.write(json.dumps(chat(images=["images/gone.png"])) + "\n")
    # the student's sections answer another problem
    write_warmup(
        folder / "warmup.parquet",
        [(a, a.response.sections, b.response.sections) for a, b in zip(curated, public)],
    )
    write_problems(folder / "align.jsonl", curated)
    with (folder / "align.jsonl").open("a") as file:
        (folder / "images/good.png").write_bytes(picture())
        file.write(json.dumps(without(problem(), "teacher_response")) + "\n")
    write_problems(folder / "rlvr.parquet", world.samples("rl", 7))
    write_problems(folder / "validation.parquet", world.samples("validation", 5))
    write_problems(folder / "test.jsonl", world.samples("test", 3))
    return folder


def settings(given, folder, **changes):
    files = {path.stem: [str(path)] for path in [*given.glob("*.jsonl"), *given.glob("*.parquet")]}
    ours = {
        "run.folder": str(folder),
        "run.stages": list(STAGES),
        "model.policy": str(given / "policy"),
        "model.discriminator": str(given / "discriminator"),
        "data.source": "files",
        "data.buffer": 3,
        "data.response_tokens": 256,
        "data.max_skipped": 0.2,
        **{f"data.files.{name}": paths for name, paths in files.items()},
    }
    return load_config(None, {**SMALL, **ours, **changes})


def outcome(one):
    """Returns everything that a run writes, except times and memory."""
    lines = [{k: v for k, v in r.items() if k not in SPENT} for r in read_metrics(one.folder / "metrics.jsonl")]
    skipped = {path.name: path.read_text() for path in one.folder.glob("skipped-*.jsonl")}
    rollouts = {path.name: path.read_text() for path in (one.folder / "rollouts").iterdir()}
    return lines, one.evaluations, skipped, rollouts


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    one = Runtime(settings(given, tmp_path_factory.mktemp("whole")))
    run_stages(one)
    return one


def test_all_stages_run_on_files_and_count_what_they_skip(given, whole):
    records = read_metrics(whole.folder / "metrics.jsonl")
    last = {record["stage"]: record for record in records}
    assert [record["stage"] for record in records] == [stage for stage in STAGES for _ in range(3)]
    # the SFT file has 9 rows, one of them bad; 3 steps of 4 rows read it once and begin again
    assert [(r["epoch"], r["rows_skipped"]) for r in records if r["stage"] == "sft"][-1] == (2, 1)
    (entry,) = [json.loads(line) for line in (whole.folder / "skipped-sft.jsonl").read_text().splitlines()]
    assert entry == {
        "file": str(given / "sft.jsonl"), "row": 9, "field": "images.0", "cause": "image not found",
        "reason": f"expected an image at {given}/images/gone.png: No such file or directory",
    }  # fmt: skip
    assert last["align"]["rows_skipped"] <= 1 and last["rlvr"]["rows_skipped"] == 0
    # warm-up scores the file's student responses: an untrained policy writes nothing that can be scored
    for record in records:
        if record["stage"] == "warmup":
            assert record["d_grad_norm"] > 0 and record["skipped"] == 0 and record["d_accuracy_reasoning"] is not None
    assert not list((whole.folder / "rollouts").glob("warmup-*"))
    # a rollout record has the file's question and answer
    line = json.loads((whole.folder / "rollouts" / "rlvr-000001.jsonl").read_text().splitlines()[0])
    assert line["question"].startswith("<image>") and line["answer"] and line["problem"].startswith("rl-7-")
    assert all(record["peak_bytes"] > 2**20 for record in records)


def test_evaluations_on_files_have_no_perception_error(whole):
    text = (whole.folder / "evaluations.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)
    assert [found[stage]["samples"] for stage in ("start", *STAGES)] == [4] * 5
    assert found["rlvr"]["test"]["samples"] == found["align"]["test"]["samples"] == 3
    assert "perception_error" not in text and "discriminator" in found["warmup"]


@pytest.mark.parametrize("stage, step", [("sft", 2), ("warmup", 1), ("align", 2), ("rlvr", 1)])
def test_an_interrupted_run_resumes_with_the_same_rows(given, whole, tmp_path, stage, step):
    first = Runtime(settings(given, tmp_path))
    write = first.log.step

    def stop_there(number, metrics, shown=None):
        write(number, metrics, shown)
        if (metrics_stage(first), number) == (stage, step):
            first.ask_to_stop()

    first.log.step = stop_there
    with pytest.raises(InterruptedRunError):
        run_stages(first)
    first.log.close()
    again = Runtime(settings(given, tmp_path))
    run_stages(again)
    ours, wanted = weights(again), weights(whole)
    assert ours.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(ours[name], wanted[name])] == []
    assert outcome(again) == outcome(whole)


def test_the_console_shows_only_the_log_and_names_each_missing_split_once(given, tmp_path, capfd):
    changes = {"run.stages": ["sft"], "data.files.validation": [], "data.files.test": [], "log.console": "lines"}
    one = Runtime(settings(given, tmp_path, **changes))
    run_stages(one)
    told = capfd.readouterr()
    assert told.err == ""
    for split in ("validation", "test"):
        assert told.out.count(f"data.files.{split} names no files: nothing is measured on it") == 1
    assert "nan" not in told.out
    assert one.evaluations == {name: {"split": "validation", "samples": 0} for name in ("start", "sft")}


# --- the data settings


def drawn(tmp_path, encoder, stage, rows, count, **changes):
    """Returns `count` problems of a stage whose file has these rows."""
    write_images(tmp_path)
    name = "align" if stage == "distill" else stage
    path = write_lines(tmp_path / f"{name}.jsonl", rows)
    config = load_config(
        None,
        {
            "run.folder": str(tmp_path / "run"),
            "run.stages": [stage],
            "data.source": "files",
            f"data.files.{name}": [str(path)],
            **changes,
        },
    )
    return next(problems_of(config, encoder).batches(stage, 0, count))


def test_rows_become_problems(tmp_path, encoder):
    (one,) = drawn(tmp_path, encoder, "sft", [chat()], 1)
    assert (one.prompt, one.teacher, one.student) == ("<image>How many?", RESPONSE, None)
    assert one.encoded(encoder).input_ids == encoder.encode("<image>How many?", one.images).input_ids
    turns = [("user", "Hello"), ("assistant", "Hi"), ("user", "<image>How many?"), ("assistant", "One.")]
    (longer,) = drawn(tmp_path, encoder, "sft", [chat(messages=[dict(zip(("role", "content"), t)) for t in turns])], 1)
    assert [message["content"] for message in longer.prompt] == ["Hello", "Hi", "<image>How many?"]
    assert longer.teacher == "One."
    (pair,) = drawn(tmp_path, encoder, "warmup", [warmup()], 1)
    assert (
        "- red circle south" in pair.student
        and "- red circle north" in pair.teacher
        and pair.prompt == "<image>How many?"
    )
    for stage in ("align", "distill", "rlvr"):
        (one,) = drawn(tmp_path, encoder, stage, [problem()], 1)
        assert (one.name, one.answer, one.teacher, len(one.images)) == ("p0", "1", RESPONSE, 1)


@pytest.mark.parametrize("images", [True, False])
def test_a_warm_up_row_may_be_a_chat_with_a_system_prompt(tmp_path, encoder, images):
    """What alignment asks and what warm-up asks are one prompt to the discriminator, with images or without."""
    turns = [("user", "Hello"), ("assistant", "Hi"), ("user", "<image>How many?")]
    turns = [dict(zip(("role", "content"), turn)) for turn in turns]
    system = {"role": "system", "content": "Be brief."}
    pairs = [
        warmup(0, system="Be brief.", question="How many?"),
        warmup(1, system="Be brief.", question=None, prompt=turns),
        warmup(2, question=[system, *turns]),
        warmup(3, system="Unused.", question=[system, *turns]),
    ]
    short = [system, {"role": "user", "content": "<image>How many?"}]
    asked = [
        problem(0, prompt=short),
        problem(1, prompt=[system, *turns]),
        problem(2, system="Be brief.", prompt=turns),
        problem(3, system="Unused.", prompt=[system, *turns]),
    ]
    plain = {"data.buffer": 0}
    for one, other in zip(
        drawn(tmp_path, encoder, "warmup", pairs, 4, **plain), drawn(tmp_path, encoder, "align", asked, 4, **plain)
    ):
        texts = [one.student]
        first, second = (
            prepare_groups(
                [sample_of(each, texts, each.encoded(encoder) if images else None, teacher=one.teacher)],
                encoder,
                images=images,
            ).packs[0].pack.input_ids
            for each in (one, other)
        )  # fmt: skip
        assert torch.equal(first, second)
        assert "system\nBe brief.<|im_end|>" in encoder.tokenizer.decode(first)
        assert (encoder.image_token_id in first) == images


def test_warm_up_without_files_reads_the_alignment_files(tmp_path, encoder):
    write_images(tmp_path)
    path = write_lines(tmp_path / "align.jsonl", [problem()])
    changes = {"run.folder": str(tmp_path), "data.source": "files", "run.stages": ["warmup"]}
    config = load_config(None, {**changes, "data.files.align": [str(path)]})
    (one,) = next(problems_of(config, encoder).batches("warmup", 0, 1))
    assert one.student is None and one.teacher == RESPONSE


def test_the_rows_of_the_documentation_can_be_used(tmp_path, encoder):
    page = (Path(__file__).parents[2] / "docs/training.md").read_text()
    rows = [json.loads(text) for text in re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]
    assert len(rows) == 3
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_bytes(picture())
    for stage, row in zip(("sft", "warmup", "align"), rows):
        (one,) = drawn(tmp_path, encoder, stage, [row], 1)
        assert "a red star" in one.teacher and len(one.images) == 1


# stage, row, field, another part of the message
UNUSABLE = [
    ("align", without(problem(), "teacher_response"), "teacher_response", "align needs the teacher's response"),
    ("distill", without(problem(), "teacher_response"), "teacher_response", "distill needs the teacher's response"),
    ("rlvr", without(problem(), "reward_model"), "reward_model", "it is not there"),
    ("rlvr", problem(reward_model={"ground_truth": " "}), "reward_model.ground_truth", "not empty"),
    ("warmup", warmup(teacher_cot="So 1.", student_cot="So 2."), "teacher_cot", "expected <answer>"),
    ("sft", chat(messages=[*chat()["messages"][:1], {"role": "assistant", "content": "no " * 400}]), "messages.1",
     "expected at most data.response_tokens = 112 tokens"),
    ("sft", chat(messages=[{"role": "user", "content": "what"}, {"role": "assistant", "content": "<image>"}]),
     "messages.1", "expected images before the last message"),
    ("rlvr", problem(prompt=[{"role": "user", "content": "<image>" + "why " * 200}]), "prompt",
     "expected at most data.prompt_tokens = 128 tokens"),
    # the image, resized to 288 x 288 pixels, is already 81 tokens
    ("rlvr", problem(images=["images/wide.png"]), "prompt", "expected at most data.prompt_tokens = 60 tokens, got"),
    ("rlvr", problem(prompt=[{"role": "user", "content": "<image>a <|image_pad|>"}]), "prompt.0.content",
     "write <image> where an image goes"),
]  # fmt: skip


@pytest.mark.parametrize("stage, row, field, reason", UNUSABLE)
def test_an_unusable_row_is_skipped_or_raises_an_error_that_names_it(tmp_path, encoder, stage, row, field, reason):
    good = {"sft": chat, "warmup": warmup}.get(stage, problem)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/wide.png").write_bytes(picture(256, 256))
    changes = {"data.max_skipped": 0.5} | ({"data.prompt_tokens": 60} if "= 60" in reason else {})
    found = drawn(tmp_path, encoder, stage, [row, good(1)], 3, **changes)
    assert len(found) == 3
    (entry,) = (json.loads(line) for line in (tmp_path / f"run/skipped-{stage}.jsonl").read_text().splitlines())
    assert (entry["row"], entry["field"]) == (1, field) and reason in entry["reason"]
    name = f"{'align' if stage == 'distill' else stage}.jsonl"
    with pytest.raises(DataError) as error:
        drawn(tmp_path, encoder, stage, [row, good(1)], 3, **changes, **{"data.on_error": "raise"})
    assert f"{name}, row 1: {field}: " in str(error.value) and reason in str(error.value)


def test_a_dry_run_counts_what_a_run_would_skip(tmp_path, encoder):
    write_images(tmp_path)
    path = write_lines(tmp_path / "align.jsonl", [problem(), without(problem(), "teacher_response")])
    take = problem_reader("align", encoder, load_config().data)
    assert dry_run(path, "problem", take=take).rejected == {"missing field": 1}
    assert dry_run(path, "problem", take=problem_reader("rlvr", encoder, load_config().data)).rejected == {}


def test_the_evaluation_logs_each_skipped_held_out_row_once(tmp_path, encoder):
    write_images(tmp_path)
    path = write_lines(tmp_path / "v.jsonl", [problem(0), problem(1), problem(images=[]), problem(2)])
    config = load_config(
        None,
        {"run.folder": str(tmp_path), "run.stages": ["sft"], "data.source": "files", "data.max_skipped": 0.3,
         "data.files.sft": [str(path)], "data.files.validation": [str(path)], "evaluation.samples": 3},
    )  # fmt: skip
    source = problems_of(config, encoder)
    for count, names in ((3, ["p0", "p1", "p2"]), (1, ["p0"]), (None, ["p0", "p1", "p2"])):
        problems = source.held_out("validation", count)
        # they can be read again
        assert [one.name for one in problems] == [one.name for one in problems] == names
        (entry,) = (json.loads(line) for line in (tmp_path / "skipped-validation.jsonl").read_text().splitlines())
        assert entry["row"] == 3
    assert not source.held_out("test")


def test_too_many_skipped_rows_stop_the_run(tmp_path, encoder):
    rows = [chat(n) for n in range(30)] + [chat(images=[])] * 2
    with pytest.raises(DataError, match=r"at most 5% of the rows to be skipped, got 2 of 32 \(image count 2\)"):
        drawn(tmp_path, encoder, "sft", rows, 31)
    assert len(drawn(tmp_path, encoder, "sft", rows[:-1], 31)) == 31


def test_order_buffer_and_image_folder_follow_the_settings(tmp_path, encoder):
    rows = [chat(n) for n in range(20)]
    first, again, other = (
        [one.name for one in drawn(tmp_path, encoder, "sft", rows, 20, **{"run.seed": seed})] for seed in (1, 1, 2)
    )
    assert first == again != other and sorted(first) == sorted(other) == sorted(f"c{n}" for n in range(20))
    assert [one.name for one in drawn(tmp_path, encoder, "sft", rows, 20, **{"data.buffer": 0})] == [
        f"c{n}" for n in range(20)
    ]
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "a.png").write_bytes(picture())
    row = chat(images=["a.png"])
    assert drawn(tmp_path, encoder, "sft", [row], 1, **{"data.image_root": str(elsewhere)})[0].images
    with pytest.raises(DataError, match=r"got none of 1.*image at"):
        drawn(tmp_path, encoder, "sft", [row], 1)
    remote = chat(images=["http://127.0.0.1:9/a.png"])
    for allowed, reason in ((False, "expected a local file"), (True, "public address")):
        with pytest.raises(DataError, match=reason):
            drawn(tmp_path, encoder, "sft", [remote], 1, **{"data.allow_remote_images": allowed})


def test_unused_tries_consume_no_rows(tmp_path, encoder):
    write_images(tmp_path)
    path = write_lines(tmp_path / "rlvr.jsonl", [problem(n) for n in range(10)])
    config = load_config(
        None,
        {"run.folder": str(tmp_path), "run.stages": ["rlvr"], "data.source": "files", "data.buffer": 0,
         "data.files.rlvr": [str(path)]},
    )  # fmt: skip
    source = problems_of(config, encoder)
    batches = source.batches("rlvr", 0, 2, most=5)
    assert [one.name for one in next(batches)] == ["p0", "p1"]
    position = json.loads(json.dumps(source.position("rlvr")))
    assert [one.name for one in next(source.batches("rlvr", 1, 3))] == ["p2", "p3", "p4"]
    resumed = problems_of(config, encoder)
    resumed.go_to("rlvr", position)
    assert [one.name for one in next(resumed.batches("rlvr", 1, 3))] == ["p2", "p3", "p4"]
    write_lines(path, [problem(n) for n in range(9)])
    with pytest.raises(DataError, match=r"data.files.rlvr: .*expected the same files.*take another run.folder"):
        problems_of(config, encoder).go_to("rlvr", position)


def test_the_built_in_world_draws_the_same_samples_as_before(encoder):
    config = load_config(None, {"data.shapes.sft": 20, "data.shapes.sft_curated": 10, "run.seed": 5})
    source = problems_of(config, encoder)
    (batch,) = source.batches("sft", 3, 6)
    # fixed since before data files existed, so that earlier experiments can be repeated
    assert [one.name.replace("-0-0000", " ") for one in batch] == [
        "sft 01", "sft 08", "sft 12", "sft 13", "alignment 06", "alignment 00",
    ]  # fmt: skip
    tries = [[one.name for one in batch] for batch in source.batches("rlvr", 2, 2, most=3)]
    assert [[int(name[-4:]) for name in batch] for batch in tries] == [[1470, 1141], [421, 471], [768, 814]]
    whole = [one.name for one in next(source.batches("rlvr", 2, 6))]
    assert [name for batch in tries for name in batch] == whole
    assert [one.name for one in source.held_out("test", 2)] == ["test-0-000000", "test-0-000001"]


# --- on the command line


def test_a_bad_row_ends_the_command_and_is_named(given, tmp_path, capsys):
    rows = [chat(), chat(images=[])]
    write_images(tmp_path)
    path = write_lines(tmp_path / "bad.jsonl", rows)
    flags = {
        "run.folder": str(tmp_path / "run"), "run.stages": "sft", "data.source": "files", "data.on_error": "raise",
        "data.files.sft": str(path), "data.buffer": 0, "model.policy": str(given / "policy"), "log.console": "quiet",
    }  # fmt: skip
    given_flags = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    assert cli.main(["run", *given_flags]) == 2
    assert f"prism run: {path}, row 2: expected an image for each of 1 places, got 0" in capsys.readouterr().err
