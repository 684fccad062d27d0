"""The settings: files, flags, presets, and errors that name the key."""

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from prism.config import (
    LOSS_PRESETS,
    REWARD_PRESETS,
    AlignAlgorithm,
    Config,
    ConfigError,
    RlvrAlgorithm,
    all_keys,
    load_config,
    parse_overrides,
    to_toml,
)
from prism.models.sizes import TinySize
from prism.rollout.options import StageRollouts
from prism.worlds.shapes.carelessness import Carelessness

CONFIGS = Path(__file__).parents[2] / "configs"


def written(tmp_path, text):
    path = tmp_path / "my.toml"
    path.write_text(text)
    return path


def shipped(file, tmp_path):
    """Loads a shipped file as if its data were there."""
    tables = tomllib.loads(file.read_text()).get("data", {}).get("files", {})
    (tmp_path / "rows.jsonl").touch()
    return load_config(file, {f"data.files.{name}": [str(tmp_path / "rows.jsonl")] for name in tables})


def test_shipped_files_are_valid_and_survive_being_written(tmp_path):
    files = sorted(CONFIGS.glob("*.toml"))
    assert {file.stem for file in files} >= {"qwen3vl_4b_1xh200", "qwen3vl_4b_8xh100", "qwen3vl_8b_8xh100", "tiny"}
    for file in files:
        config = shipped(file, tmp_path)
        assert load_config(written(tmp_path, to_toml(config))) == config


def test_the_tiny_file_says_what_the_defaults_are():
    assert load_config(CONFIGS / "tiny.toml") == load_config() == Config()


def test_a_table_of_an_algorithm_given_in_part_keeps_its_other_defaults(tmp_path):
    default = Config().algorithm
    for text in ("alpha = 0.3", 'name = "prism"\nalpha = 0.3'):
        align = load_config(written(tmp_path, f"[algorithm.align]\n{text}\n")).algorithm.align
        assert align == default.align.model_copy(update={"alpha": 0.3})
        assert (align.kl_coef, align.kl_estimator, align.token_credit) == (0.1, "k3", True)
    rlvr = load_config(None, {"algorithm.rlvr.entropy_coef": 0.01}).algorithm.rlvr
    assert rlvr == default.rlvr.model_copy(update={"entropy_coef": 0.01}) and rlvr.kl_coef == 0.05
    assert load_config(None, {"algorithm.rlvr.overlong.buffer": 9}).algorithm.rlvr.kl_coef == 0.05
    # another algorithm: its published options, and nothing of the one that the defaults are for
    for name in ("dapo", "dr_grpo", "reinforce_pp"):
        assert load_config(None, {"algorithm.rlvr.name": name}).algorithm.rlvr == RlvrAlgorithm(name=name)
    gspo = load_config(None, {"algorithm.align.name": "gspo"}).algorithm.align
    assert gspo == AlignAlgorithm(name="gspo") and not gspo.token_credit
    # the settings that a run writes are read back as they are
    for config in (Config(), load_config(None, {"algorithm.align.kl_coef": 0.0, "algorithm.rlvr.name": "dapo"})):
        assert Config.model_validate(config.model_dump(mode="json")) == config


def test_the_papers_settings(tmp_path):
    for size in ("4b_1xh200", "4b_8xh100", "8b_8xh100"):
        config = shipped(CONFIGS / f"qwen3vl_{size}.toml", tmp_path)
        align, rlvr, optimiser = config.rollout.align, config.rollout.rlvr, config.optimiser
        assert (align.prompts, align.group, align.max_new_tokens, align.temperature) == (4, 16, 6144, 1.0)
        assert (rlvr.prompts, rlvr.group, rlvr.max_new_tokens) == (32, 16, 8192)
        assert config.data.prompt_tokens == 2048
        assert (optimiser.sft.lr, optimiser.sft.schedule, optimiser.sft.warmup) == (1e-5, "cosine", 0.1)
        assert optimiser.sft.freeze_vision
        assert (optimiser.warmup.lr, optimiser.warmup.weight_decay, optimiser.warmup.batch) == (1e-5, 0.01, 64)
        assert optimiser.warmup.head_rate == 1
        for one in (optimiser.align, optimiser.discriminator):
            assert (one.lr, one.schedule, one.weight_decay, one.clip_norm) == (1e-6, "constant", 0.01, 1.0)
        assert (optimiser.align.steps, optimiser.rlvr.steps, optimiser.rlvr.lr) == (500, 1500, 1e-6)
        loss = config.algorithm.align
        assert (loss.clip, loss.dual_clip, loss.aggregate) == ((0.2, 0.2), 3.0, "token_mean")
        assert (loss.alpha, loss.format_penalty, loss.kl_coef, loss.token_credit) == (0.5, 1.5, 0.0, False)
        assert (config.algorithm.rlvr.name, config.algorithm.rlvr.kl_coef) == ("grpo", 0.0)
        judge = config.discriminator
        assert (judge.experts, judge.top_k, judge.aux_coef, judge.regularisation) == (4, 2, 0.01, 1e-3)
        assert judge.soft_clip == 10


def test_defaults_and_choices_are_those_of_the_code_that_takes_them():
    from prism_kernels.ops.group_advantage.op import BASELINES, SCALES
    from prism_kernels.ops.linear_policy_loss import linear_policy_loss
    from prism_kernels.ops.policy_loss import policy_loss
    from prism_kernels.ops.policy_loss.options import AGGREGATES, CORRECTIONS, ESTIMATORS, OBJECTIVES, RATIOS
    from prism_kernels.ops.prism_advantage import prism_advantage
    from prism_kernels.ops.prism_advantage.op import INVALID, MODES, NORMALIZE

    def choices(model, name):
        kind = model.model_fields[name].annotation
        return next((a.__args__ for a in getattr(kind, "__args__", ()) if hasattr(a, "__args__")), kind.__args__)

    expected = {
        "ratio": RATIOS,
        "objective": OBJECTIVES,
        "aggregate": AGGREGATES,
        "kl_estimator": ESTIMATORS,
        "correction": CORRECTIONS,
    }
    for model in (AlignAlgorithm, RlvrAlgorithm):
        for name, known in expected.items():
            assert choices(model, name) == known
        for function in (policy_loss, linear_policy_loss):
            taken = inspect.signature(function).parameters
            given = model.model_validate({"name": "grpo"}).loss_options(100)
            assert {name: taken[name].default for name in given} == {**given, "horizon": None}
    for name, known in {"mode": MODES, "normalize": NORMALIZE, "invalid": INVALID}.items():
        assert choices(AlignAlgorithm, name) == known
    taken = inspect.signature(prism_advantage).parameters
    given = AlignAlgorithm().advantage_options()
    assert {name: taken[name].default for name in given} == given
    for name, known in {"baseline": BASELINES, "scale": SCALES}.items():
        assert choices(RlvrAlgorithm, name) == known
    assert RlvrAlgorithm().advantage_options() == {"baseline": "mean", "scale": "std"}


def test_defaults_outside_the_tables_are_the_same():
    pytest.importorskip("transformers")
    from prism.discriminator.upcycle import upcycle
    from prism.worlds.shapes import world as shapes

    config = Config()
    sizes = {name: count for name, (_, _, count) in shapes.SPLITS.items()}
    assert {name: getattr(config.data.shapes, name) for name in sizes} == sizes
    assert config.discriminator.router_std == inspect.signature(upcycle).parameters["router_std"].default


@pytest.mark.parametrize("name", [*LOSS_PRESETS])
def test_a_preset_sets_its_options_and_the_loss_takes_them(name):
    import torch

    from prism_kernels import policy_loss

    stage, model = ("align", AlignAlgorithm) if name == "prism" else ("rlvr", RlvrAlgorithm)
    config = load_config(None, {f"algorithm.{stage}.name": name})
    algorithm = getattr(config.algorithm, stage)
    stated = {**LOSS_PRESETS[name], **REWARD_PRESETS.get(name, {})}
    default = getattr(Config().algorithm, stage)
    # the table's defaults are for the algorithm that it names by default
    plain = (default if name == default.name else model()).model_dump() | {"dual_clip": None, "name": name}
    for key, value in algorithm.model_dump().items():
        if key in ("dynamic_sampling", "overlong"):
            assert (value is not None) == (key in stated)
        else:
            assert value == stated.get(key, plain[key]), key
    batch = (torch.zeros(3), torch.zeros(3), torch.ones(2), torch.tensor([0, 2, 3], dtype=torch.int32))
    loss, _ = policy_loss(*batch, ref_logp=torch.zeros(3), **algorithm.loss_options(longest=100))
    assert loss.isfinite()


def test_options_beside_a_name_win_over_its_preset(tmp_path):
    path = written(tmp_path, '[algorithm.rlvr]\nname = "dapo"\nclip = [0.1, 0.3]\noverlong = "none"\n')
    rlvr = load_config(path).algorithm.rlvr
    assert (rlvr.clip, rlvr.dual_clip, rlvr.overlong) == ((0.1, 0.3), 10.0, None)
    # a flag wins over the file, and switches on a table that the file switches off
    flags = [
        "--algorithm.rlvr.dual_clip",
        "none",
        "--algorithm.rlvr.overlong.penalty=0.5",
        "--algorithm.rlvr.clip",
        "0.2,0.4",
    ]
    rlvr = load_config(path, parse_overrides(flags)).algorithm.rlvr
    assert (rlvr.clip, rlvr.dual_clip, rlvr.overlong.penalty) == ((0.2, 0.4), None, 0.5)


def test_sizes_that_follow_from_others():
    config = load_config(
        None, {"algorithm.rlvr.name": "dapo", "rollout.rlvr.prompts": 32, "rollout.rlvr.max_new_tokens": 150}
    )
    assert (config.dynamic_prompts, config.overlong_buffer) == (96, 75)
    assert config.algorithm.rlvr.loss_options(150)["horizon"] == 150
    plain = load_config(None, {"memory.score_pack_tokens": "none"})
    assert (plain.dynamic_prompts, plain.overlong_buffer) == (32, 0)
    assert plain.score_pack_tokens == 128 + 9 * (112 + 32)
    for warmup, steps in ((0.1, 24), (0, 0), (10, 10)):
        assert load_config(None, {"optimiser.sft.warmup": warmup}).optimiser.sft.warmup_steps(240) == steps


def test_flags():
    flags = ["--run.seed", "3", "--optimiser.align.lr=1e-6", "--discriminator.dense", "--run.stages", "sft,rlvr"]
    assert parse_overrides([*flags, "--x", "-1", "--run.folder", "my runs/a=b"]) == {
        "run.seed": 3,
        "optimiser.align.lr": 1e-6,
        "discriminator.dense": True,
        "run.stages": "sft,rlvr",
        "x": -1,
        "run.folder": "my runs/a=b",
    }
    config = load_config(None, parse_overrides(flags))
    assert (config.run.seed, config.optimiser.align.lr, config.run.stages) == (3, 1e-6, ("sft", "rlvr"))
    # the other keys of the table keep its defaults
    assert config.optimiser.align.schedule == "linear"
    with pytest.raises(ConfigError, match=r"flags: expected --section.key value, got 'align'"):
        parse_overrides(["align"])


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().run.seed = 3


def test_keys_are_listed():
    keys = list(all_keys())
    assert len(keys) == len(set(keys)) > 100
    assert {"run.seed", "algorithm.rlvr.overlong.buffer", "model.tiny.heads", "optimiser.discriminator.lr"} <= set(keys)


# the text of a file, and the error that it gives
BAD = {
    "not TOML": ("[run\n", r"my.toml: expected a TOML file, got .*line 1"),
    "a misspelled key": (
        "[rollout.rlvr]\ngrup = 4",
        r"rollout.rlvr.grup: expected a known key.*did you mean 'group'\?",
    ),
    "a misspelled section": ("[optimizer.sft]\nlr = 1e-5", r"optimizer: expected a known key.*'optimiser'\?"),
    "a key of another section": ("alpha = 0.5", r"alpha: expected a known key.*did you mean 'algorithm.align.alpha'\?"),
    "a text for a number": (
        '[optimiser.rlvr]\nsteps = "40"',
        r"optimiser.rlvr.steps: expected a valid integer, got '40'",
    ),
    "a fraction for a count": (
        "[rollout.align]\ngroup = 2.5",
        r"rollout.align.group: expected a valid integer, got 2.5",
    ),
    "a truth value for a number": ("[run]\nseed = true", r"run.seed: expected a valid integer, got True"),
    "a number for a table": ("[optimiser]\nsft = 3", r"optimiser.sft: expected a table: \[optimiser.sft\], got 3"),
    "a negative rate": (
        "[optimiser.sft]\nlr = -1.0",
        r"optimiser.sft.lr: expected a number greater than or equal to 0, got -1",
    ),
    "an infinite rate": ("[optimiser.sft]\nlr = inf", r"optimiser.sft.lr: expected a finite number, got inf"),
    "an unknown algorithm": (
        '[algorithm.rlvr]\nname = "grop"',
        r"algorithm.rlvr.name: expected .*got 'grop'; .* 'grpo'\?",
    ),
    "an algorithm of another stage": (
        '[algorithm.align]\nname = "rloo"',
        r"algorithm.align.name: expected 'prism',.*'rloo'",
    ),
    "three clips": ("[algorithm.rlvr]\nclip = [1.0, 2.0, 3.0]", r"algorithm.rlvr.clip: expected two numbers, got 3"),
    "a dual clip without a clip": (
        '[algorithm.rlvr]\nname = "cispo"\ndual_clip = 3.0',
        r"algorithm.rlvr.dual_clip: expected none with objective 'cispo', got 3",
    ),
    "bounds in the wrong order": (
        "[algorithm.rlvr]\ncorrection_bounds = [2.0, 0.5]",
        r"algorithm.rlvr.correction_bounds: expected \[lower, upper\].*got \[2.0, 0.5\]",
    ),
    "credit by channel of a mixed advantage": (
        '[algorithm.align]\nnormalize = "sum"',
        r"algorithm.align.token_credit: expected false without normalize = 'channel'",
    ),
    "a mode that needs an accuracy": (
        '[algorithm.align]\nmode = "rlvr"',
        r"algorithm.align.mode: expected 'align', 'rlvr' needs an accuracy, which alignment does not know",
    ),
    "a group of one in alignment": (
        "[rollout.align]\ngroup = 1",
        r"rollout.align.group: expected at least 2.*z-score, got 1",
    ),
    "a group of one in RLVR": ("[rollout.rlvr]\ngroup = 1", r"rollout.rlvr.group: expected at least 2.*z-score, got 1"),
    "a batch that cuts groups": (
        "[optimiser.rlvr]\nbatch = 20",
        r"optimiser.rlvr.batch: expected a multiple of rollout.rlvr.group = 8 that divides the step's 256.*got 20",
    ),
    "a batch that leaves a rest": (
        "[optimiser.align]\nbatch = 48",
        r"optimiser.align.batch: .* divides the step's 128.*got 48",
    ),
    "responses past the positions": (
        "[model.tiny]\nmax_positions = 224",
        r"rollout.rlvr.max_new_tokens: expected at most 96, the model's 224 positions less .*prompt_tokens, got 112",
    ),
    "responses that are never scored": (
        "[data]\nresponse_tokens = 100",
        r"rollout.align.max_new_tokens: expected at most data.response_tokens = 100.*got 112",
    ),
    "packs smaller than a sample": (
        "[memory]\npack_tokens = 200",
        r"memory.pack_tokens: expected at least 240.*got 200",
    ),
    "packs smaller than a group": (
        "[memory]\nscore_pack_tokens = 1000",
        r"memory.score_pack_tokens: expected none, or at least the largest group's 1424, got 1000",
    ),
    "more chosen experts than there are": (
        "[discriminator]\ntop_k = 5",
        r"discriminator.top_k: expected at most experts = 4",
    ),
    "routers without experts": (
        "[discriminator]\ndense = true\nkind_bias = true",
        r"discriminator.kind_bias: expected false",
    ),
    "stages out of order": (
        '[run]\nstages = ["rlvr", "sft"]',
        r"run.stages: expected each once and in this order, sft, rlvr, got rlvr, sft",
    ),
    "a stage twice": ('[run]\nstages = ["sft", "sft"]', r"run.stages: expected each once"),
    "an unknown stage": ('[run]\nstages = ["algin"]', r"run.stages: expected 'base'.*did you mean 'align'\?"),
    "a stage without files": (
        '[data]\nsource = "files"',
        r"data.files.sft: expected files for the stage 'sft', got none",
    ),
    "files that are not there": (
        '[data]\nsource = "files"\n[data.files]\nsft = ["no.jsonl"]\nalign = ["no.jsonl"]\nrlvr = ["no.jsonl"]',
        r"data.files.sft: expected a file or folder, there is no 'no.jsonl'",
    ),
    "files that nobody reads": (
        '[data.files]\nsft = ["no.jsonl"]',
        r"data.files.sft: expected none with data.source = 'shapes'",
    ),
    "rates past one": ("[data.shapes.carelessness]\nkind = 0.99", r"data.shapes.carelessness.invented: .* got 1.01"),
    "more samples than there are": (
        "[evaluation]\nsamples = 600",
        r"evaluation.samples: expected at most .*512, got 600",
    ),
    "a warm-up past the end": (
        "[optimiser.rlvr]\nwarmup = 50",
        r"optimiser.rlvr.warmup: expected at most the 40 steps, got 50",
    ),
    "a greedy rollout": (
        "[rollout.rlvr]\ntemperature = 0.0",
        r"rollout.rlvr.temperature: expected a number greater than 0",
    ),
    "a buffer past the limit": (
        "[algorithm.rlvr.overlong]\nbuffer = 500",
        r"algorithm.rlvr.overlong.buffer: expected at most rollout.rlvr.max_new_tokens = 112, got 500",
    ),
    "fewer prompts than are kept": (
        "[algorithm.rlvr.dynamic_sampling]\ngenerate = 8",
        r"algorithm.rlvr.dynamic_sampling.generate: expected at least rollout.rlvr.prompts = 32, got 8",
    ),
    "heads that do not divide": (
        "[model.tiny]\nheads = 3",
        r"model.tiny.key_value_heads: expected a divisor of heads = 3",
    ),
    "a folder without a model": (
        '[model]\npolicy = "./no/model"',
        r"model.policy: expected a folder with a config.json",
    ),
    "a dtype": ('[model]\ndtype = "float16"', r"model.dtype: expected 'float32' or 'bfloat16', got 'float16'"),
}


@pytest.mark.parametrize("name", [*BAD])
def test_bad_settings_are_named(name, tmp_path):
    text, message = BAD[name]
    with pytest.raises(ConfigError, match=message) as error:
        load_config(written(tmp_path, text))
    # each line begins with the file
    assert all(line.startswith(str(tmp_path / "my.toml")) for line in str(error.value).splitlines())


def test_all_problems_are_listed_at_once(tmp_path):
    text = "[rollout.align]\ngroup = 1\n[optimiser.rlvr]\nbatch = 20\n"
    with pytest.raises(ConfigError) as error:
        load_config(written(tmp_path, text))
    assert [line.split(": ")[1] for line in str(error.value).splitlines()] == [
        "rollout.align.group",
        "optimiser.rlvr.batch",
    ]


def test_a_file_that_is_not_there_is_named_with_the_nearest(tmp_path):
    written(tmp_path, "")
    with pytest.raises(ConfigError, match=r"mi.toml: expected a TOML file, there is none; did you mean 'my.toml'\?"):
        load_config(tmp_path / "mi.toml")


def test_a_group_of_one_is_allowed_where_nothing_is_compared():
    load_config(None, {"rollout.rlvr.group": 1, "algorithm.rlvr.baseline": "none", "algorithm.rlvr.scale": "batch_std"})


def test_positions_of_a_model_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"text_config": {"max_position_embeddings": 200}}')
    with pytest.raises(ConfigError, match=r"data.response_tokens: expected at most 72, the model's 200 positions"):
        load_config(None, {"model.policy": str(tmp_path)})


def test_a_flag_into_a_value_is_named():
    with pytest.raises(ConfigError, match=r"run.seed: expected a valid integer, got \{'x': 1\}"):
        load_config(None, {"run.seed.x": 1})


def test_torch_is_not_imported():
    code = "import prism.config, prism.cli, sys; prism.config.load_config(); print({'torch', 'numpy'} & {*sys.modules})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("table", "kind", "value"),
    [
        ("model.tiny", TinySize, {"heads": 0}),
        ("model.tiny", TinySize, {"layers": 1.5, "head_dim": 24}),
        ("model.tiny", TinySize, {"heads": 3}),
        ("rollout.align", StageRollouts, {"prompts": 4, "temperature": 0.0, "top_p": 1.5}),
        ("rollout.align", StageRollouts, {"prompts": True, "top_k": -1}),
        ("data.shapes.carelessness", Carelessness, {"colour": -0.1, "dropped": float("inf")}),
    ],
)
def test_code_and_files_are_refused_in_the_same_words(table, kind, value):
    with pytest.raises(ValueError) as code:
        kind(**value)
    with pytest.raises(ConfigError) as file:
        load_config(None, {f"{table}.{name}": one for name, one in value.items()})
    assert [f"settings: {table}.{line}" for line in str(code.value).splitlines()] == str(file.value).splitlines()


def test_a_table_of_a_dataclass_is_read_like_any_other():
    with pytest.raises(ConfigError, match=r"rollout.align.grup: expected a known key.*did you mean 'group'\?"):
        load_config(None, {"rollout.align.grup": 4})
    with pytest.raises(ConfigError, match=r"model.tiny: expected a table: \[model.tiny\], got 3"):
        load_config(None, {"model.tiny": 3})
    with pytest.raises(ConfigError, match=r"rollout.align.group: expected a valid integer, got 'none'"):
        load_config(None, {"rollout.align.group": "none"})
    assert load_config(None, {"rollout.align.top_k": 5}).rollout.align.top_k == 5
    assert load_config(None, {"rollout.align.top_k": "none"}) == load_config()
