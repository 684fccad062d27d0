"""What the documentation says is what the code has: names, tables, links, pictures, and every snippet runs."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from prism.discriminator.storage import LAYOUTS
from prism.models.tiny import train_tokenizer
from prism.rewards import RolloutView
from prism_kernels.backend import backend_status
from prism_kernels.packing import PrefixPack
from prism_kernels.segments import Reason

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])


def snippets(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def rows(page, pattern):
    """The first group of every table row that matches."""
    return re.findall(rf"^\| {pattern}", page.read_text(), re.MULTILINE)


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def given():
    """The tensors that snippets of the kernels take as given: 2 sequences of 3 and 4 tokens, in one group."""
    rng = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=rng)

    T, V, D, E, I = 7, 32, 8, 4, 16  # noqa: E741
    tokenizer = train_tokenizer()
    responses = ["<caption>\na\n</caption>\n<think>\nb\n</think>\n<answer>1</answer>", "no tags"]
    ids = [tokenizer(text)["input_ids"] for text in responses]
    tensors = {
        "hidden": random(T, D).requires_grad_(),
        "weight": random(V, D),
        "target": torch.arange(T),
        "advantage": random(T),
        "reward": random(2),
        "group": torch.zeros(2, dtype=torch.int64),
        "old_logp": random(T) - 4,
        "cu_seqlens": torch.tensor([0, 3, 7], dtype=torch.int32),
        "x": random(T, D).requires_grad_(),
        "router_weight": random(E, D),
        "gate_up": random(E, 2 * I, D),
        "down": random(E, D, I),
        "kind": torch.tensor([0, 0, 1, 2, 2, 3, 4]),
    }
    tensors |= {"tokens": tensors["target"], "logits": tensors["hidden"].detach() @ tensors["weight"].t()}
    lm_head = torch.nn.Linear(D, V, bias=False)
    texts = {name: tokenizer("a red star")["input_ids"] for name in ("prompt_ids", "caption_ids", "thinking_ids")}
    return {**tensors, **texts, "lm_head": lm_head, "tokenizer": tokenizer, "responses": ids}


def run(page, names):
    """Runs a page's snippets one after the other; an error's traceback names page and snippet."""
    blocks = snippets(page)
    assert blocks
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, snippet {number + 1}", "exec"), names)
    return names


def test_every_environment_variable_is_documented():
    sources = [*ROOT.glob("prism_kernels/**/*.py"), *ROOT.glob("csrc/**/*.*"), ROOT / "setup.py"]
    used = {name for path in sources for name in re.findall(r"\bPRISM_KERNELS_[A-Z_]+\b", path.read_text())}
    documented = rows(DOCS / "environment.md", r"`(PRISM_KERNELS_[A-Z_]+)`")
    assert used == set(documented)


def test_every_op_is_listed_with_its_backends():
    known = {}
    for op, backend, _ in backend_status():
        known.setdefault(op, []).append(f"`{backend}`")
    lines = re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|", (DOCS / "backends.md").read_text(), re.MULTILINE)
    assert dict(lines) == {op: ", ".join(backends) for op, backends in known.items()}


def test_every_op_has_its_section():
    assert {op for op, *_ in backend_status()} <= anchors(DOCS / "kernels.md")


def test_tables_name_what_there_is():
    assert rows(DOCS / "kernels.md", r"`([A-Z_]+)` \|") == [reason.name for reason in Reason if reason]
    page = (DOCS / "kernels.md").read_text()
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*) \| [^|]* \| ", page, re.MULTILINE)))
    assert {field.name for field in fields(PrefixPack)} <= set(listed)
    assert rows(DOCS / "discriminator.md", r'`"(\w+)"` \|') == list(LAYOUTS)


def test_snippets_of_the_readme_run():
    names = run(ROOT / "README.md", given())
    assert names["loss"].isfinite()


def test_snippets_of_the_kernels_run():
    names = given()
    ids = names.pop("responses")
    names["token_ids"] = [token for response in ids for token in response]
    names["cu_seqlens"] = [0, len(ids[0]), len(names["token_ids"])]
    names["teacher_caption_ids"] = names["caption_ids"]
    run(DOCS / "kernels.md", names)
    assert [Reason(r) for r in names["segments"].reason.tolist()] == [Reason.VALID, Reason.MISSING_TAG]
    assert f"<answer>{names['answer']}</answer>" in names["text"].decode()
    assert names["members"] == (0, 1) and names["pack"].pair.tolist() == [2, -1, -1, 5, -1, -1]
    assert names["x"].grad is not None


def test_snippets_of_the_discriminator_run_and_show_what_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run(DOCS / "discriminator.md", {})
    plan = names["plan"]
    assert (plan.packed, plan.published + plan.published_scoring) == (13_774, 134_304)
    scores, result = names["scores"], names["result"]
    assert scores.reason == (None, None, "missing tag") * 2 and result.skipped is None
    assert scores.perception.isnan().tolist() == [False, False, True] * 2
    advantage = names["advantage"].view(2, 3)
    assert (advantage[:, 1] > advantage[:, 0]).all() and (advantage[:, 2] == -1.5).all()
    assert result.pairs["perception"].means()["margin"] > 0.1
    reports = names["reports"]
    assert {view: reports[view]["perception"].accuracy for view in reports} == {
        "as it is": 0.75,
        "last token alone": 0.5,
        "first token alone": 0.5,
        "first half of the text": pytest.approx(0.625, abs=0.125),
        "swapped images": pytest.approx(0.25, abs=0.25),
    }
    table = rows(DOCS / "discriminator.md", r"`([a-z]+ [a-z ]+)` \|")
    assert table == [*reports, "equal style"] and len(capsys.readouterr().out.splitlines()) >= len(reports)
    assert names["report"]["perception"].auc == 1.0 and names["report"]["perception"].compared == 2
    assert names["model"].value_head.weight.abs().max() > 0
    assert names["hidden"].shape[0] == 2 and names["routings"][0].counts.shape == (5, 4)
    assert any(p.grad is not None and p.grad.any() for n, p in names["moe"].named_parameters() if "gate.weight" in n)


def test_the_reward_of_the_training_page_runs():
    reward = run(DOCS / "training.md", {})["brief_caption"]
    text = "<caption>- a red star</caption><think>1. I see one.</think><answer>1</answer>"
    assert reward(RolloutView(text, 40, 1.0), None) == 1.0 and reward(RolloutView("1", 1, 1.0), None) is None


def test_every_defect_has_tests_that_exist():
    page = (DOCS / "defects.md").read_text()
    table = re.findall(r"^\| ([A-Z]|also) \| (.*)$", page, re.MULTILINE)
    assert [name for name, _ in table] == [*"ABCDEFGIJKLMNPQ", "also"]
    for name, row in table:
        tests = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert tests, f"defect {name} has no test"
        for file, test in tests:
            tree = ast.parse((ROOT / file).read_text())
            defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            # benchmarks are made by a function, and named
            defined |= {t.id for node in tree.body for t in getattr(node, "targets", []) if isinstance(t, ast.Name)}
            assert test in defined, f"defect {name}: {file} has no {test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else page.parent / path
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_the_picture_of_a_pack_is_drawn_from_one():
    module = {"__name__": "draw_pack", "__file__": str(DOCS / "draw_pack.py")}
    exec(compile((DOCS / "draw_pack.py").read_text(), "draw_pack.py", "exec"), module)
    pack, names = module["example"]()
    spans = module["pieces"](pack)
    assert len(spans) == len(names) == len(pack.layout.prefix) + len(pack.layout.branch)
    # pieces follow one another, prefix before its branches
    assert [end for _, end in spans[:-1]] == [begin for begin, _ in spans[1:]]
    begins = pack.cu_prefix[pack.branch_group + 1] + pack.cu_branch[:-1]
    assert [b for (b, _), name in zip(spans, names) if not name.startswith("prompt")] == begins.tolist()
    seen = module["visible"](pack)
    assert not seen[spans[-1][0], : spans[names.index("prompt 2")][0]].any()
    assert (DOCS / "pack.png").stat().st_size > 10_000
