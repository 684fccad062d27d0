"""Folders of runs that never ran, with the files that a run would have written."""

import json

from prism.config import load_config
from prism.worlds.shapes.world import ShapesWorld

STAGES = ["sft", "warmup", "align", "rlvr"]
HOSTILE = "<caption>\n- <script>alert(1)</script>\n</caption>\n<think>\n1. a\n</think>\n<answer>\"'&</answer>"


def steps_of(stage, count):
    for step in range(1, count + 1):
        row = {"stage": stage, "step": step, "loss": 2.0 / step, "grad_norm": 1.0, "tokens": 400, "seconds": 0.5}
        if stage in ("warmup", "align"):
            for channel in ("perception", "reasoning"):
                row |= {f"d_accuracy_{channel}": 0.75, f"d_gap_{channel}": 0.5, f"d_top_expert_{channel}": 0.3}
            row |= {"d_loss": 1.2, "skipped": 0}
        if stage == "align":
            row |= {"valid": 0.9, "entropy": 0.2, "engine_gap": 1e-5}
            row |= {"drift_perception": 1.0 - 0.05 * step, "drift_reasoning": 0.4}
        if stage == "rlvr":
            row |= {"reward": 0.4, "accuracy": 0.25, "format": 1.0, "length": 50.0, "entropy": 0.2, "informative": 0.5}
            row |= {"engine_gap": 1e-5, "skipped": 0}
        yield row


def rollouts_of(stage, step):
    found = []
    for sample in ShapesWorld().samples({"align": "alignment", "rlvr": "rl"}[stage], 2, start=step):
        for place in range(3):
            text = (sample.response.text, "only words", HOSTILE)[place]
            scores = {"reward": (1.0, 0.0, 0.2)[place], "reason": ("right", "missing_tag", "wrong")[place]}
            if stage == "align":
                scores = {"perception": (1.5, None, -2.25)[place], "reasoning": (0.5, None, -1.0)[place]}
                scores["reason"] = (None, "missing tag", None)[place]
            row = {"problem": sample.id, "question": sample.question.text, "answer": sample.answer, "response": text}
            found.append({**row, "finish": "stop", **scores, "advantage": (0.75, -1.5, -0.75)[place]})
    return found


DISCRIMINATOR = {
    "pairs": {
        "perception": {"pairs": 512, "accuracy": 0.8125, "gap": 1.5, "compared": 40, "auc": 0.625},
        "reasoning": {"pairs": 512, "accuracy": 0.875, "gap": 1.25, "compared": 0},
    },
    "swapped images": {"perception": {"pairs": 512, "accuracy": 0.53125, "gap": 0.5}, "reasoning": {"pairs": 0}},
    "equal style": {
        "perception": {"pairs": 256, "accuracy": 0.75, "gap": 0.75, "by_change": {"colour": 0.5, "place": 1.0}},
        "reasoning": {"pairs": 64, "accuracy": 0.9375, "gap": 2.0},
    },
}


def evaluation(accuracy):
    # without reasoning errors, which the report must show as not measured
    shares = {"accuracy": accuracy, "accuracy_se": 0.05, "format": 0.9, "perception_error": 0.2}
    found = {"samples": 100, "length": 71.5, **shares, "drift_perception": 0.75, "drift_reasoning": 0.5}
    return {"split": "validation", **found, "sampled": {**found, "accuracy": accuracy / 2, "drift_perception": 1.25}}


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def build(folder, stages=tuple(STAGES), count=6, finished=True):
    """Writes the folder of a run that reached some stages, and returns it."""
    changes = {"run.folder": str(folder), "run.seed": 7, "run.stages": STAGES}
    config = load_config(None, {**changes, **{f"optimiser.{stage}.steps": 6 for stage in STAGES}})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.model_dump_json())
    lines(folder / "metrics.jsonl", [row for stage in stages for row in steps_of(stage, count)])
    for stage in {"align", "rlvr"} & set(stages):
        for step in range(1, count + 1):
            lines(folder / "rollouts" / f"{stage}-{step:06d}.jsonl", rollouts_of(stage, step))
    found = {"start": evaluation(0.125)} | {stage: evaluation(0.5) for stage in stages}
    for stage in {"warmup", "align"} & set(stages):
        found[stage]["discriminator"] = DISCRIMINATOR
    if "rlvr" in found:
        found["rlvr"]["test"] = {**evaluation(0.75), "split": "test", "samples": 200}
    if finished:
        (folder / "evaluations.json").write_text(json.dumps(found))
    else:
        del found[stages[-1]]
        state = folder / "checkpoints" / "step-00000006" / "state.json"
        state.parent.mkdir(parents=True)
        state.write_text(json.dumps({"extra": {"evaluations": found}}))
    return folder
