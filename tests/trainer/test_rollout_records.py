"""Rollout records: what they say, that it is enough to sample and score again, what a kill or a resume leaves."""

import hashlib
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from report_cases import build, lines
from safetensors.torch import load_model
from test_run import SMALL
from test_run_killed import formed

from prism.commands.run import run_stages
from prism.config import load_config
from prism.data.files import DataError
from prism.data.problem import Problem
from prism.discriminator.score import prepare_groups, sample_of, score_limits, score_prepared
from prism.models.building import build_discriminator, build_policy
from prism.models.prompts import EncodedPrompt
from prism.report import write_report
from prism.rollout import batch
from prism.rollout.batch import RolloutBatch
from prism.rollout.engine import Engine, Rollout
from prism.rollout.options import Sampling
from prism.rollout.records import RolloutRecord, StepHeader, parse_record, records_of, write_records
from prism.runtime.checkpoint import checkpoints
from prism.runtime.runtime import Runtime
from prism.worlds.shapes.problems import problem_of
from prism.worlds.shapes.world import ShapesWorld

REWARDS = "def size(rollout, problem): return len(rollout.text)\n"
CHANGES = {
    "run.stages": ["align", "rlvr"],
    "rollout.align.temperature": 0.9,
    "rollout.align.top_k": 50,
    "rollout.rlvr.prompts": 4,
    "optimiser.rlvr.steps": 1,
    "algorithm.rlvr.rewards": ["recorded_rewards:size"],
    "algorithm.rlvr.reward_weights": [0.5],
    "checkpoint.every": 1,
    "checkpoint.keep": 9,
}


def settings(folder, **changes):
    return load_config(None, {**SMALL, **CHANGES, "run.folder": str(folder), **changes})


def read(path):
    # strict: a parser that knows no NaN and no half of a surrogate pair
    for line in path.read_bytes().splitlines():
        json.loads(line, parse_constant=pytest.fail)
        line.decode().encode()
    return [parse_record(line) for line in path.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run whose rollouts are mostly in the scored format, and its records by file."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "recorded_rewards.py").write_text(REWARDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "decode", formed)
        patch.syspath_prepend(folder)
        with Runtime(settings(folder / "run")) as one:
            run_stages(one)
    return one, {path.stem: read(path) for path in sorted((folder / "run" / "rollouts").iterdir())}


def test_records_say_what_was_asked_sampled_and_measured(whole):
    _, records = whole
    assert list(records) == ["align-000001", "align-000002", "align-000003", "rlvr-000001"]
    assert [len(part) for part in records.values()] == [6, 6, 6, 12]
    first = records["align-000002"][0]
    assert (first.stage, first.step) == ("align", 2)
    version = {"model": "tiny", "stage": "align", "step": 1}
    assert first.policy.model_dump() == version
    assert first.sampling == Sampling(group=3, max_new_tokens=12, temperature=0.9, top_k=50)
    scored_by = {name: part.model_dump() for name, part in first.scored_by.items()}
    assert scored_by == {key: {**version, "model": "policy"} for key in ("perception", "reasoning")}
    assert first.reward is None and "reward" not in first.model_fields_set
    assert {(record.seed, record.key, record.index) for record in records["align-000002"]} == {
        (first.seed, key, index) for key in range(2) for index in range(3)
    }
    assert len({part[0].seed for part in records.values()}) == 4
    assert any(record.perception is not None for record in records["align-000002"])
    last = records["rlvr-000001"]
    assert {record.accuracy for record in last} <= {0.0, 1.0} and {record.format for record in last} == {0.0, 1.0}
    for record in last:
        sample = next(ShapesWorld().samples("rl", 1, int(record.problem.rpartition("-")[2])))
        assert record.data_source == f"shapes/{sample.question.kind}"
        assert (record.question, record.answer) == (sample.question.text, sample.answer)
        assert [(turn.role, turn.content) for turn in record.prompt] == [("user", f"<image>{record.question}")]
        assert record.custom_rewards == {"size": len(record.response)}
        assert record.reward == pytest.approx(
            0.8 * record.accuracy + 0.2 * record.format + 0.5 * len(record.response), rel=1e-6
        )
    by = {name: part.model_dump() for name, part in last[0].scored_by.items()}
    built_in = {"function": "prism.rewards:score_batch", "version": "prism-kernels 0.1.0", "sha256": None}
    assert by["accuracy"] == by["format"] == {**built_in, "weight": 1.0}
    sha256 = hashlib.sha256(REWARDS.encode()).hexdigest()
    assert by["reward_size"] == {
        "function": "recorded_rewards:size", "version": None, "sha256": sha256, "weight": 0.5
    }  # fmt: skip


def test_a_record_is_enough_to_sample_the_response_again(whole):
    one, records = whole
    # the policy after 0 steps of alignment, the run's first stage, is the one that the run began with
    policy, encoder = build_policy(one.config)
    engine = Engine(policy.model, encoder.tokenizer)
    for record in records["align-000001"]:
        (sample,) = ShapesWorld().samples("alignment", 1, int(record.problem.rpartition("-")[2]))
        images = problem_of(sample).images
        prompt = encoder.encode([turn.model_dump() for turn in record.prompt], images)
        # the image is the one that the record names
        renewed = next(records_of(RolloutBatch([problem_of(sample)], [prompt], [played(record)], ["a"]), HEADER, {}))
        assert renewed.images == record.images and renewed.prompt == record.prompt
        group = engine.generate([prompt], record.sampling, seed=record.seed, keys=[record.key])
        assert group[record.index].token_ids == record.token_ids


def test_the_discriminator_that_a_record_names_gives_its_scores(whole):
    one, records = whole
    config = one.config
    saved = {json.loads((path / "state.json").read_text())["extra"]["step"]: path
             for path in checkpoints(one.folder / "checkpoints")
             if json.loads((path / "state.json").read_text())["extra"]["stage"] == "align"}  # fmt: skip
    assert sorted(saved) == [1, 2]

    def scores(part, step):
        discriminator = build_discriminator(config, one.policy.model)
        load_model(discriminator, str(saved[step] / "discriminator.safetensors"))
        samples = {}
        for record in part:
            (sample,) = ShapesWorld().samples("alignment", 1, int(record.problem.rpartition("-")[2]))
            samples.setdefault(record.problem, (problem_of(sample), []))[1].append(record.response)
        groups = prepare_groups(
            [sample_of(*group) for group in samples.values()], one.encoder, score_limits(config),
            images=discriminator.images,
        )  # fmt: skip
        with torch.no_grad():
            found = score_prepared(discriminator, groups)
        return torch.stack((found.perception, found.reasoning)).nan_to_num(9.0)

    for name in ("align-000002", "align-000003"):
        part = records[name]
        recorded = torch.tensor([[9.0 if v is None else v for v in (getattr(r, key) for r in part)]
                                 for key in ("perception", "reasoning")])  # fmt: skip
        (version,) = {r.scored_by["perception"].step for r in part}
        torch.testing.assert_close(scores(part, version), recorded, rtol=1e-4, atol=1e-5)
        # another version gives other scores, or this test would show nothing
        assert (scores(part, 3 - version) - recorded).abs().max() > 1e-3


def test_the_page_lists_the_fields():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    section = page.partition("### Rollout records\n")[2].partition("\n#")[0]
    listed = {
        name for row in re.findall(r"^\| (.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert listed == {*RolloutRecord.model_fields, "reward_NAME"}


# --- hostile content

HEADER = StepHeader("align", 1, {"model": "m", "stage": "align", "step": 0}, Sampling(), {})
TEXTS = ["\ud800 half", "\udc00", "\x00\x1b[31m\u2028\u202e😀", "<script>alert(1)</script>", '"}\n{"', "x" * 10**6]


def played(record=None, prompt=0, ids=(1, 2)):
    ids = list(ids) if record is None else record.token_ids
    none = torch.zeros(0)
    return Rollout(prompt, 0, ids, none, none, "stop", seed=1, key=0)


def hostile(texts=TEXTS):
    problems = [Problem(text, text, answer=text, equivalent_answers=(text,), data_source=text) for text in texts]
    prompts = [EncodedPrompt([1], None, None)] * len(texts)
    return RolloutBatch(problems, prompts, [played(prompt=p) for p in range(len(texts))], list(texts))


def test_any_content_gives_valid_json(tmp_path):
    values = [float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, 0.0]
    path = tmp_path / "rollouts" / "align-000001.jsonl"
    columns = {"perception": values, "advantage": values, "reason": TEXTS}
    write_records(path, records_of(hostile(), HEADER, columns))
    records = read(path)
    assert [record.perception for record in records] == [None, None, None, 1e308, 5e-324, 0.0]
    assert [record.response for record in records] == ["\ufffd half", "\ufffd", *TEXTS[2:]]
    assert records[0].problem == records[0].question == records[0].answer == records[0].reason == "\ufffd half"


def test_a_chat_is_recorded_as_messages():
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why <image>?"})
    grid = torch.tensor([[1, 2, 2]])
    one = RolloutBatch([Problem("a", chat)], [EncodedPrompt([1], torch.zeros(4, 8), grid)], [played()], ["b"])
    (record,) = records_of(one, HEADER, {})
    assert [turn.model_dump() for turn in record.prompt] == list(chat)
    assert record.question == "system: Be brief.\nuser: Why <image>?"
    (image,) = record.images
    # sha256sum of 128 zero bytes
    assert image.patches == [1, 2, 2] and image.sha256.startswith("38723a2e5e8a17aa7950dc008209944e898f69a7bd10a23c")


def test_the_report_shows_hostile_records_and_their_versions(tmp_path):
    folder = build(tmp_path / "run")
    scored_by = {"perception": {"model": "<img src=x>", "stage": "warmup", "step": 7}}
    header = HEADER._replace(scored_by=scored_by)
    path = folder / "rollouts" / "align-000001.jsonl"
    write_records(path, records_of(hostile(), header, {"perception": [1.0] * 6, "advantage": [float("nan")] * 6}))
    page = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in page and "<img src=x" not in page
    assert "policy: m, after 0 steps of align; discriminator: &lt;img src=x&gt;, after 7 steps of warmup" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_report_survives_hostile_lines_without_a_version(tmp_path):
    folder = build(tmp_path / "run")
    odd = {"problem": ["a"], "question": {"b": 1}, "answer": "\ud800", "response": "\udc00", "advantage": 10**400}
    lines(folder / "rollouts" / "align-000001.jsonl", [odd, {**odd, "problem": "a", "reason": ["x"]}, {}])
    page = write_report(folder).read_text(encoding="utf-8")
    assert "&#55296;" in page and "advantage</th><td>not measured" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"record": "prism.rollout/2"}, "record: expected prism.rollout/1, got 'prism.rollout/2'; use the version"),
        ({"record": None}, "record: expected prism.rollout/1, got None"),
        ({"response": 3}, "response: expected another value: Input should be a valid string, got 3"),
        ({"sampling": {"group": 0}}, "sampling: expected another value: group: expected a number greater than 0"),
    ],
)
def test_the_report_names_a_record_that_it_cannot_read(tmp_path, change, message):
    folder = build(tmp_path / "run")
    (record,) = records_of(hostile(["a"]), HEADER, {})
    row = json.loads(json.dumps(record.model_dump(exclude_unset=True)))
    lines(folder / "rollouts" / "align-000001.jsonl", [row, {**row, **change}])
    with pytest.raises(DataError, match=re.escape(f"align-000001.jsonl, row 2: {message}")):
        write_report(folder)


# --- kills and resumes


def test_a_kill_while_records_are_written_leaves_the_file_from_before(tmp_path):
    path = tmp_path / "rollouts" / "align-000001.jsonl"
    write_records(path, records_of(hostile(["before"]), HEADER, {}))
    before = path.read_bytes()

    def killed():
        yield from records_of(hostile(["x" * 10**6] * 3), HEADER, {})
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            write_records(path, killed())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == before
    # what the killed process left is no record
    (left,) = [file for file in path.parent.iterdir() if file != path]
    assert left.suffix != ".jsonl"

    def failing():
        yield from records_of(hostile(["after"]), HEADER, {})
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_records(path, failing())
    assert path.read_bytes() == before and set(path.parent.iterdir()) == {path, left}


def stopped(folder, **changes):
    """Leaves a run that was killed after the rollouts of its third step; with a checkpoint after the second."""
    with Runtime(settings(folder, **{"run.stages": ["align"], **changes})) as one:
        finish = one.log.step

        def step(number, *arguments):
            if number == 3:
                raise InterruptedError
            finish(number, *arguments)

        one.log.step = step
        with pytest.raises(InterruptedError):
            run_stages(one)


def names(folder, name="rollouts"):
    return sorted(path.name for path in (folder / name).iterdir())


def test_records_of_steps_that_a_resumed_run_repeats_are_dropped(tmp_path):
    stopped(tmp_path)
    # of a later stage, before the run was resumed from an older checkpoint; a reward that may not fail again
    later = "rollouts/rlvr-000001.jsonl", "rollouts/.aside-align-000003.jsonl-77", "failed_rewards/rlvr-000002.jsonl"
    for place in (*later, "rollouts/notes.txt", "rollouts/mine.jsonl"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("old\n")
    with Runtime(settings(tmp_path, **{"run.stages": ["align"], "log.rollouts_every": 0})) as again:
        again.restore()
    assert names(tmp_path) == ["align-000001.jsonl", "align-000002.jsonl", "mine.jsonl", "notes.txt"]
    assert names(tmp_path, "failed_rewards") == []


def test_a_run_without_a_checkpoint_drops_all_records(tmp_path):
    stopped(tmp_path, **{"checkpoint.every": 9})
    assert names(tmp_path) == [f"align-00000{step}.jsonl" for step in (1, 2, 3)]
    # of another seed, and not every step is recorded
    with Runtime(settings(tmp_path, **{"run.stages": ["align"], "run.seed": 5, "log.rollouts_every": 2})) as again:
        again.restore()
    assert names(tmp_path) == []


def test_a_finished_run_keeps_its_records_when_it_is_run_again(whole):
    one, records = whole
    again = Runtime(one.config)
    again.restore()
    assert names(one.folder) == [f"{name}.jsonl" for name in records]
