import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from report_cases import STAGES, build, lines, steps_of

from prism.data.files import DataError
from prism.report import report, write_report
from prism.report.charts import Axis, Series, line_chart
from prism.report.samples_section import segments
from prism.worlds.shapes.world import ShapesWorld

VOID = {"meta", "img", "line", "path", "rect", "circle"}


class Page(HTMLParser):
    """The elements and the text of a page; checks that every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID or (tag in ("path", "rect", "circle") and not self.rawdata_ends()):
            self.open.append(tag)

    def rawdata_ends(self):
        return self.get_starttag_text().endswith("/>")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def read(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return read(build(tmp_path_factory.mktemp("whole")))


def test_a_finished_run_has_all_sections(whole):
    sections = [attributes["id"] for attributes in whole.all("section") if "id" in attributes]
    assert sections == ["stages", "discriminator", "drift", *STAGES, "time", "troubles", "samples", "settings"]
    assert "Finished: sft, warmup, align, rlvr." in whole.text
    # settings that differ, with their defaults
    assert re.search(r"run\.seed70", whole.text)
    assert "versions, device, datenot recorded by the run" in whole.text


def test_figures_after_each_stage(whole):
    # sqrt(0.5 * 0.5 / 100)
    assert "rlvrgreedy100 of validation0.500 ± 0.0500.900 ± 0.0300.200 ± 0.040not measured71.5" in whole.text
    assert "rlvrtemperature 1100 of validation0.250 ± 0.0430.900 ± 0.030" in whole.text
    assert "rlvrgreedy200 of test0.750 ± 0.031" in whole.text
    assert "rlvrtemperature 1100 of test0.375 ± 0.048" in whole.text
    charts = [a["aria-label"] for a in whole.all("svg") if "errors after each stage" in a.get("aria-label", "")]
    assert len(charts) == 2


def test_what_each_stage_is_for(whole):
    assert "sftaccuracy risesyes0.125 → 0.500, +0.375 ± 0.071 of 100 problems" in whole.text
    assert "warmuppair accuracy on held-out pairs is at least 0.8, reasoningyes0.875" in whole.text
    assert "aligndrift falls, perceptionno1.250 → 1.250" in whole.text


def test_the_discriminator_and_its_controls(whole):
    for stage in ("warmup", "align"):
        assert f"{stage}the policy's responses, as they are0.8121.5000.6250.8751.250not measured" in whole.text
        assert f"{stage}the same on other problems' images0.5310.500not measurednot measured" in whole.text
        assert f"{stage}the curated teacher's texts with one thing wrong0.7500.750not measured0.938" in whole.text
    titles = [attributes.get("aria-label") for attributes in whole.all("svg")]
    assert {f"Pairs won by what is shown, {channel}" for channel in ("perception", "reasoning")} <= set(titles)
    assert "after warmup (perception): colour 0.500, place 1.000" in whole.text


def test_drift_on_held_out_problems(whole):
    titles = [attributes.get("aria-label") for attributes in whole.all("svg")]
    assert "Drift after each stage" in titles
    assert "aligngreedy0.7500.500" in whole.text and "aligntemperature 11.2500.500" in whole.text


def test_every_stage_has_its_charts(whole):
    titles = [attributes["aria-label"] for attributes in whole.all("svg") if attributes.get("class") == "chart"]
    found = Counter(title.removesuffix(" over the steps") for title in titles)
    # in align and rlvr
    assert found["Entropy"] == found["Length"] == found["Policy loss"] == found["Trainer against engine"] == 2
    # in warm-up and alignment
    assert found["Pairs told apart"] == found["Discriminator's gap"] == found["Expert load by token kind"] == 2
    assert found["Drift"] == found["Valid responses"] == found["Reward"] == found["Accuracy and format"] == 1
    assert found["Loss"] == 1
    assert found["Gradient norm"] == 3
    assert "Not measured in this stage" not in whole.text


def test_drift_before_and_after(whole):
    # means of the first and the last three steps: 0.9 and 0.75
    assert "perceptioncaption items0.900 ± 0.0290.750 ± 0.029-0.150" in whole.text
    assert "reasoningreasoning steps0.400 ± 0.0000.400 ± 0.000+0.000" in whole.text


def test_drift_of_recorded_responses(whole):
    """A third of the responses are the teachers', a third have one item and one step, a third are invalid."""
    texts = {"alignment": [s.response.text for s in ShapesWorld().samples("alignment", 9)]}
    items = [len(re.findall(r"^[-•*]", text, re.MULTILINE)) for text in texts["alignment"]]
    for first, where in ((1, "at first"), (4, "at last")):
        asked = [items[i] for step in range(first, first + 3) for i in (step, step + 1)]
        expected = sum(abs(n - 1) for n in asked) / len(asked) / 2
        assert f"{expected:.3f} {where}" in whole.text


def test_samples_have_images_scores_and_verdicts(whole):
    images = whole.all("img")
    # two problems and an invalid response of two steps of two stages
    assert len(images) == 12
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in images)
    assert "score, perception1.500score, reasoning0.500advantage0.750verdictvalid" in whole.text
    assert "score, perception-2.250" in whole.text
    assert "verdictinvalid: missing tag" in whole.text
    assert "reward1.000advantage0.750verdictright" in whole.text
    assert "caption against the sceneright" in whole.text
    kinds = Counter(a["class"] for tag, a in whole.elements if tag == "div" and a.get("class", "").startswith("seg "))
    assert min(kinds[f"seg {name}"] for name in ("caption", "think", "answer", "outside")) >= 4


def test_nothing_runs_and_nothing_is_fetched(whole, tmp_path):
    assert "script" not in {tag for tag, _ in whole.elements}
    assert "<script>alert(1)</script>" in whole.text
    handlers = [name for _, attributes in whole.elements for name in attributes if name.startswith("on")]
    assert handlers == []
    links = [a[name] for _, a in whole.elements for name in ("src", "href") if name in a]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    raw = write_report(build(tmp_path / "raw")).read_text()
    assert not re.search(r"https?://|url\(|@import", raw)
    assert "default-src 'none'" in raw


def test_names_in_the_files_are_escaped(tmp_path):
    folder = build(tmp_path / "run", stages=["sft"])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "<b onclick=x>", "step": 1, "<script>": 1.0, "loss": 1.0}) + "\n")
    page = read(folder)
    assert "script" not in {tag for tag, _ in page.elements}
    assert "<b onclick=x>" in page.text and "<script>" in page.text


@pytest.mark.parametrize("reached", range(1, 5))
def test_an_unfinished_run(tmp_path, reached):
    stages = STAGES[:reached]
    page = read(build(tmp_path / "run", stages, count=2, finished=False))
    assert "This run is not finished." in page.text
    for stage in STAGES:
        assert f"{stage}: {2 if stage in stages else 0} of 6 steps" in page.text
    # earlier evaluations come from the checkpoint
    assert "startgreedy100 of validation0.125" in page.text
    assert ("Not measured: the run has not reached alignment." in page.text) == (reached < 3)
    assert ("Not measured: the run has not finished the warm-up." in page.text) == (reached < 3)


def test_a_run_that_has_only_begun(tmp_path):
    folder = build(tmp_path / "run", stages=["sft"])
    (folder / "metrics.jsonl").write_text("")
    (folder / "evaluations.json").unlink()
    page = read(folder)
    assert "Not measured: the run has no evaluation yet" in page.text
    assert page.text.count("Not measured: no step was taken yet.") == 2


def test_what_was_not_finite_and_not_taken_shows(tmp_path):
    folder = build(tmp_path / "run")
    rows = list(steps_of("align", 6))
    rows[2] |= {
        "drift_perception": None,
        "loss": None,
        "skipped": 1,
        "d_skipped": 1,
        "non_finite": ["drift_perception", "loss"],
    }
    lines(folder / "metrics.jsonl", rows)
    page = read(folder)
    assert "align21step 3: drift_perception not finite, loss not finite, 1 optimiser step skipped" in page.text
    marks = [attributes for tag, attributes in page.elements if attributes.get("class") == "bad"]
    # in the charts of the drift and of the loss
    assert len(marks) == 2
    assert "step 3: drift_perception not finite" in page.text


def test_what_a_stage_did_not_log_is_said(tmp_path):
    folder = build(tmp_path / "run")
    lines(folder / "metrics.jsonl", [{"stage": "rlvr", "step": 1, "loss": 1.0}])
    assert "Not measured in this stage: Reward, Accuracy and format, Length, Entropy" in read(folder).text


def test_loads_memory_and_environment_where_they_are_recorded(tmp_path):
    folder = build(tmp_path / "run")
    load = {
        "prompt": [0.25] * 4,
        "image": [0.25] * 4,
        "answer": [0.0, 0.0, 0.5, 0.5],
        "perception": [0.7, 0.1, 0.1, 0.1],
        "reasoning": [0.1, 0.7, 0.1, 0.1],
    }
    rows = [{**row, "d_expert_load": load, "peak_bytes": 3 * 2**20} for row in steps_of("align", 3)]
    lines(folder / "metrics.jsonl", rows)
    (folder / "environment.json").write_text(json.dumps({"versions": {"torch": "2.13"}, "device": "cpu"}))
    page = read(folder)
    assert "perception tokens, expert 1: 0.700" in page.text
    assert "answer tokens, expert 4: 0.500" in page.text
    assert re.search(r"align3 of 6.*?3Times of the steps", page.text)
    assert "versionstorch 2.13devicecpu" in page.text


def test_a_half_written_last_line_is_left_out(tmp_path):
    folder = build(tmp_path / "run")
    for path in (folder / "metrics.jsonl", folder / "rollouts" / "rlvr-000006.jsonl"):
        with path.open("a") as file:
            file.write('{"stage": "rl')
    assert "Finished" in read(folder).text


def test_problems_of_another_world_have_no_image(tmp_path):
    folder = build(tmp_path / "run", stages=["align"])
    for path in (folder / "rollouts").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        lines(path, [{**row, "question": "another one"} for row in rows])
    page = read(folder)
    assert page.all("img") == []
    assert "image: not drawn" in page.text
    assert "the teachers' responses are not available" in page.text


def damaged(name, text):
    def damage(folder):
        (folder / name).write_text(text)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "without config.json"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "without metrics.jsonl"),
        (damaged("config.json", "{"), "config.json: expected JSON"),
        (damaged("config.json", "[]"), "config.json: expected a table, got list"),
        (damaged("evaluations.json", "{"), "evaluations.json: expected JSON"),
        (damaged("metrics.jsonl", '{"stage": \n'), "metrics.jsonl: expected a line of JSON for each record"),
        (damaged("metrics.jsonl", "3\n"), "metrics.jsonl, line 1: expected a table, got int"),
        (damaged("metrics.jsonl", '{"step": 1}\n'), "expected a stage and a step in each line"),
        (damaged("rollouts/align-000001.jsonl", "x\n"), "align-000001.jsonl: expected a line of JSON"),
    ],
)
def test_damaged_folders_say_what_is_wrong(tmp_path, damage, message):
    folder = build(tmp_path / "run")
    damage(folder)
    with pytest.raises(DataError, match=re.escape(message)):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="expected the folder of a run, there is no"):
        write_report(tmp_path / "none")


def test_settings_of_another_version(tmp_path):
    folder = build(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["data"]["shapes"]["carelessness"]["haste"] = 1.0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="write the report with the version that made the run"):
        write_report(folder)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    folder = build(tmp_path / "run", stages=STAGES[:2], finished=False)
    newer = folder / "checkpoints" / "step-00000009" / "state.json"
    newer.parent.mkdir()
    newer.write_text("{")
    assert "startgreedy100 of validation0.125" in read(folder).text


def test_the_command_names_its_file(tmp_path, capsys):
    folder = build(tmp_path / "run", stages=["sft"])
    assert report(str(folder)) == 0
    told = capsys.readouterr().out
    assert told.endswith(f"the report: {folder / 'report.html'}\n")
    assert "yes  sft: accuracy rises (0.125 → 0.500, +0.375 ± 0.071 of 100 problems)" in told


def test_segments_mark_what_breaks_the_grammar():
    marked = Page(segments("before<caption>a</caption></think><answer>b<think>c"))
    assert [a["class"] for tag, a in marked.elements if tag == "div"] == [
        "seg outside",
        "seg caption",
        "seg outside",
        "seg answer",
        "seg think",
    ]
    assert "answer, not closed" in marked.text and "</think>" in marked.text


def test_axes_have_round_ticks():
    assert Axis(0.0, 1.0).ticks == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert Axis(0.09, 6.0, log=True).ticks == [0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
    assert Axis(1.0, 100.0, log=True).at(10.0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "values",
    [[1.0], [2.0] * 5, [None, 1.0, None], [0.0, 1e9], [0.0, 0.0], [5.99162, 5.99167], [float(n) for n in range(5000)]],
)
def test_any_values_can_be_drawn(values):
    drawn = line_chart([Series("x", list(enumerate(values, 1)))], title="t", log=True)
    numbers = [float(n) for d in re.findall(r' d="([^"]*)"', drawn) for n in re.findall(r"-?\d+\.?\d*", d)]
    assert numbers and all(0 <= n <= 360 for n in numbers)
    assert len(drawn) < 20_000
    # a longer label would be cut at the left edge
    assert all(len(label) <= 7 for label in re.findall(r'text-anchor="end">([^<]*)<', drawn))
