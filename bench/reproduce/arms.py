"""The experiment's arms: the parent, the stages and the changed settings of each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prism.config import Config

# the numbers of demonstrations at which alignment and distillation are compared
SIZES = (12, 40, 400)
MAIN, CURVE, ABLATION = "main", "curve", "ablation"


@dataclass(frozen=True)
class Arm:
    """One run of `prism`.

    Args:
        name: its name on the command line and in the results.
        title: its title in tables.
        part: its part of the experiment: MAIN, CURVE or ABLATION.
        stages: the stages that it runs.
        parent: the arm whose policy it begins with; None: the base.
        changes: changed settings by dotted key.
        spends: arms whose seconds it spends in RLVR, instead of a set number of steps.
        pace: the arm whose steps of RLVR tell the seconds of a step.
    """

    name: str
    title: str
    part: str
    stages: tuple[str, ...]
    parent: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    spends: tuple[str, ...] = ()
    pace: str | None = None

    @property
    def after(self) -> tuple[str, ...]:
        """The arms that must be finished first."""
        return tuple(name for name in (self.parent, self.pace, *self.spends) if name is not None)

    @property
    def reinforces(self) -> bool:
        """Whether it runs RLVR, so that the algorithm matters."""
        return "rlvr" in self.stages


def arms(config: Config, algorithm: str) -> dict[str, Arm]:
    """Returns all arms by name, each after the arms that it needs.

    Args:
        config: the base settings.
        algorithm: the algorithm of RLVR.
    """
    rlvr = {"algorithm.rlvr.name": algorithm}
    all_arms = [
        Arm("sft", "SFT", MAIN, ("sft",)),
        Arm("rlvr", "SFT → RLVR", MAIN, ("rlvr",), "sft", rlvr),
        Arm("align", "SFT → alignment", MAIN, ("warmup", "align"), "sft"),
        Arm("prism", "SFT → alignment → RLVR", MAIN, ("rlvr",), "align", rlvr),
        Arm("long_rlvr", "SFT → RLVR, longer", MAIN, ("rlvr",), "sft", rlvr, ("align", "prism"), "rlvr"),
        Arm("distill", "SFT → distillation", MAIN, ("distill",), "sft"),
        Arm("distill_rlvr", "SFT → distillation → RLVR", MAIN, ("rlvr",), "distill", rlvr),
        *_curve(config),
        *_ablations(config, rlvr),
    ]
    return {arm.name: arm for arm in all_arms}


def curve(config: Config) -> dict[int, tuple[str, str]]:
    """Returns the two arms that align and distil, by number of demonstrations."""
    clean = config.data.shapes.sft_curated == 0
    same = config.data.shapes.alignment
    return {n: ("align", "distill") if clean and n == same else (f"align_{n}", f"distill_{n}") for n in SIZES}


def _curve(config: Config) -> Iterable[Arm]:
    # if SFT has no demonstrations anyway, these arms begin with it
    parent = "sft"
    if config.data.shapes.sft_curated:
        parent = "clean_sft"
        title = "SFT without curated demonstrations"
        yield Arm(parent, title, CURVE, ("sft",), changes={"data.shapes.sft_curated": 0})
    for n, names in curve(config).items():
        changes = {"data.shapes.sft_curated": 0, "data.shapes.alignment": n}
        for name, what, stages in zip(names, ("alignment", "distillation"), (("warmup", "align"), ("distill",))):
            if name.endswith(f"_{n}"):
                yield Arm(name, f"SFT → {what} on {n} demonstrations", CURVE, stages, parent, changes)


def _ablations(config: Config, rlvr: Mapping[str, Any]) -> Iterable[Arm]:
    credit = not config.algorithm.align.token_credit
    for name, title, changes in (
        ("dense", "dense discriminator", {"discriminator.dense": True}),
        ("text_only", "discriminator without images", {"discriminator.images": False}),
        ("no_warmup", "no warm-up of the discriminator", {}),
        # the mixture matters only if channels do not credit their own tokens
        ("alpha_0", "α = 0, reasoning alone", {"algorithm.align.alpha": 0.0, "algorithm.align.token_credit": False}),
        ("alpha_1", "α = 1, perception alone", {"algorithm.align.alpha": 1.0, "algorithm.align.token_credit": False}),
        (
            "token_credit",
            "credit by channel" if credit else "credit to all tokens alike",
            {"algorithm.align.token_credit": credit},
        ),
    ):
        stages = ("align",) if name == "no_warmup" else ("warmup", "align")
        yield Arm(f"align_{name}", f"SFT → alignment, {title}", ABLATION, stages, "sft", changes)
        yield Arm(f"prism_{name}", f"SFT → alignment → RLVR, {title}", ABLATION, ("rlvr",), f"align_{name}", rlvr)


def chosen(known: Mapping[str, Arm], names: Iterable[str] | None) -> dict[str, Arm]:
    """Returns arms by name with the arms that they need; None: the arms of the main part and of the curve."""
    wanted = {arm.name for arm in known.values() if arm.part != ABLATION} if names is None else set(names)
    for name in sorted(wanted):
        if name not in known:
            raise SystemExit(f"arms: expected some of {', '.join(known)}, got {name!r}")
    # each arm comes after the arms that it needs
    for arm in reversed(list(known.values())):
        if arm.name in wanted:
            wanted.update(arm.after)
    return {name: arm for name, arm in known.items() if name in wanted}


def long_steps(spent: float, seconds: float, steps: int) -> int:
    """Returns the number of steps of RLVR that fit into a time.

    Args:
        spent: the time in seconds.
        seconds: the seconds of another run.
        steps: the steps of that run.
    """
    return max(1, round(spent * steps / seconds))
