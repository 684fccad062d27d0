"""The algorithms, presets over the options of policy loss and advantages, and the optimisers."""

import re
from importlib.util import find_spec
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from prism.config.sections import NONE, Names, Numbers, Positive, Section, Share, Two, over_defaults

# of each algorithm policy_loss's options, as published
LOSS_PRESETS: dict[str, dict[str, Any]] = {
    "prism": {"clip": (0.2, 0.2), "dual_clip": 3.0, "aggregate": "token_mean"},
    "grpo": {"clip": (0.2, 0.2), "aggregate": "token_mean"},
    "dapo": {"clip": (0.2, 0.28), "dual_clip": 10.0, "aggregate": "token_mean"},
    "gspo": {"ratio": "sequence", "clip": (3e-4, 4e-4), "aggregate": "seq_mean_token_mean"},
    "dr_grpo": {"clip": (0.2, 0.2), "aggregate": "seq_mean_token_sum_norm"},
    "rloo": {"objective": "reinforce", "aggregate": "seq_mean_token_sum"},
    "cispo": {"objective": "cispo", "clip": (1.0, 0.28), "aggregate": "token_mean"},
    "reinforce_pp": {"clip": (0.2, 0.2), "aggregate": "token_mean", "kl_coef": 0.01, "kl_estimator": "k2"},
}
# and what else an algorithm says of verified rewards: group_advantage's options, DAPO's two rules
REWARD_PRESETS: dict[str, dict[str, Any]] = {
    "dapo": {"dynamic_sampling": {}, "overlong": {}},
    "dr_grpo": {"scale": "none"},
    "rloo": {"baseline": "leave_one_out", "scale": "none"},
    "reinforce_pp": {"scale": "batch_std"},
}
_IMPORT_PATH = re.compile(r"\w+(?:\.\w+)*:\w+(?:\.\w+)*")


class PolicyLoss(Section):
    """An algorithm: a name stands for its options, each of which may be given beside it.

    The options are those of `prism_kernels.policy_loss`; `horizon` none is rollout's max_new_tokens.
    """

    name: str
    ratio: Literal["token", "sequence"] = "token"
    objective: Literal["clip", "cispo", "reinforce"] = "clip"
    clip: Two = (0.2, 0.2)
    dual_clip: Annotated[float | None, NONE] = None
    log_ratio_bound: Annotated[float, Field(gt=0, le=40)] = 20.0
    aggregate: Literal[
        "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"
    ] = "token_mean"  # fmt: skip
    horizon: Annotated[Annotated[float, Field(gt=0)] | None, NONE] = None
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    kl_estimator: Literal["k1", "k2", "k3", "k1+", "k3+"] = "k1"
    entropy_coef: float = 0.0
    correction: Annotated[
        Literal["token_tis", "sequence_tis", "geometric_tis", "token_mask", "sequence_mask", "geometric_mask"] | None,
        NONE,
    ] = None
    correction_bounds: Two = (0.5, 2.0)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """Puts the options that an algorithm stands for where none are given."""
        if not isinstance(given, dict):
            return given
        name = given.get("name", cls.model_fields["name"].default)
        return {**cls._preset(name), **given} if isinstance(name, str) else given

    @classmethod
    def _preset(cls, name: str) -> dict[str, Any]:
        return LOSS_PRESETS.get(name, {})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.clip) < 0:
            raise ValueError(f"clip: expected two numbers >= 0, [low, high], got {list(self.clip)}")
        if self.dual_clip is not None and self.objective != "clip":
            raise ValueError(f"dual_clip: expected none with objective {self.objective!r}, got {self.dual_clip:g}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip: expected a number > 1 or none, got {self.dual_clip:g}")
        if not 0 <= self.correction_bounds[0] < self.correction_bounds[1]:
            bounds = list(self.correction_bounds)
            raise ValueError(f"correction_bounds: expected [lower, upper] with 0 <= lower < upper, got {bounds}")
        if self.ratio == "sequence" and self.objective == "reinforce":
            raise ValueError("ratio: expected token with objective 'reinforce', which has no ratio, got 'sequence'")
        return self

    def loss_options(self, longest: int) -> dict[str, Any]:
        """Returns policy_loss's keyword arguments.

        Args:
            longest: rollout's max_new_tokens, which is the horizon where none is set.
        """
        options = self.model_dump(include=set(PolicyLoss.model_fields) - {"name"})
        return {**options, "horizon": float(longest) if self.horizon is None else self.horizon}


class AlignAlgorithm(PolicyLoss):
    """Alignment: the loss, and `prism_kernels.prism_advantage`'s options.

    Args:
        token_credit: descriptions are credited with perception's advantage and the rest with reasoning's, instead of
            all tokens with their mixture.
    """

    name: Literal["prism", "grpo", "dapo", "gspo", "cispo"] = "prism"
    mode: Literal["align", "acc_gating", "gated", "rlvr", "rlvr_v2", "sign_align"] = "align"
    alpha: Share = 0.5
    normalize: Literal["channel", "sum"] = "channel"
    invalid: Literal["exclude", "below_min"] = "exclude"
    format_penalty: Annotated[float, Field(ge=0)] = 1.5
    align_coef: float = 1.0
    wrong_penalty: Annotated[float, Field(ge=0)] = 1.0
    w_acc: float = 1.0
    w_fmt: float = 1.0
    token_credit: bool = False

    @model_validator(mode="after")
    def _check_credit(self) -> Self:
        if self.token_credit and (self.mode != "align" or self.normalize != "channel"):
            wanted = "mode = 'align' and normalize = 'channel'"
            raise ValueError(f"token_credit: expected false without {wanted}, which keep the channels apart, got true")
        return self

    def advantage_options(self) -> dict[str, Any]:
        """Returns prism_advantage's keyword arguments."""
        own = set(AlignAlgorithm.model_fields) - set(PolicyLoss.model_fields)
        return self.model_dump(include=own - {"token_credit"})


class DynamicSampling(Section):
    """DAPO's: groups whose rewards are all equal are replaced by others.

    Args:
        generate: prompts of each try; none: three times those that are kept, rollout.rlvr.prompts.
        tries: at most; then the step is taken with what there is.
    """

    generate: Annotated[Positive | None, NONE] = None
    tries: Positive = 10


class Overlong(Section):
    """DAPO's penalty of long responses: see `prism_kernels.shaping.overlong_penalty`.

    Args:
        buffer: the last tokens before the limit, within which it grows; none: half of the limit.
        penalty: at the limit.
    """

    buffer: Annotated[Positive | None, NONE] = None
    penalty: Annotated[float, Field(ge=0)] = 1.0


class RlvrAlgorithm(PolicyLoss):
    """RLVR: the loss, `prism_kernels.group_advantage`'s options, DAPO's rules, custom rewards.

    Args:
        baseline: see `group_advantage`.
        scale: see `group_advantage`.
        dynamic_sampling: see there; none: all groups are taken.
        overlong: see there; none: no penalty.
        verifier_weight: Weight of the built-in score of answer and format.
        rewards: Import paths of custom rewards, "package.module:function"; see `prism.rewards.custom`.
        reward_weights: Weight of each custom reward; empty: 1 each.
    """

    name: Literal["grpo", "dapo", "gspo", "dr_grpo", "rloo", "cispo", "reinforce_pp"] = "grpo"
    baseline: Literal["mean", "leave_one_out", "none"] = "mean"
    scale: Literal["std", "none", "batch_std"] = "std"
    dynamic_sampling: Annotated[DynamicSampling | None, NONE] = None
    overlong: Annotated[Overlong | None, NONE] = None
    verifier_weight: Annotated[float, Field(ge=0)] = 1.0
    rewards: Names = ()
    reward_weights: Numbers = ()

    @classmethod
    def _preset(cls, name: str) -> dict[str, Any]:
        return {**super()._preset(name), **REWARD_PRESETS.get(name, {})}

    @model_validator(mode="after")
    def _check_rewards(self) -> Self:
        for path in self.rewards:
            if not _IMPORT_PATH.fullmatch(path):
                raise ValueError(f'rewards: expected import paths like "package.module:function", got {path!r}')
        if len(self.custom_rewards) < len(self.rewards):
            raise ValueError(f"rewards: expected functions of different names, got {', '.join(self.rewards)}")
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            wanted = f"one for each of the {len(self.rewards)} rewards, or none"
            raise ValueError(f"reward_weights: expected {wanted}, got {len(self.reward_weights)}")
        return self

    @property
    def custom_rewards(self) -> dict[str, tuple[str, float]]:
        """The import path and weight of each custom reward, by its name in metrics: the function's."""
        names = [re.split("[.:]", path)[-1] for path in self.rewards]
        return dict(zip(names, zip(self.rewards, self.reward_weights or (1.0,) * len(self.rewards))))

    def advantage_options(self) -> dict[str, Any]:
        """Returns group_advantage's keyword arguments."""
        return {"baseline": self.baseline, "scale": self.scale}


class AlgorithmSettings(Section):
    """What the policy learns from rollouts. What is set for the embedded world beside a name goes with it."""

    align: AlignAlgorithm = AlignAlgorithm(token_credit=True, kl_coef=0.1, kl_estimator="k3")
    rlvr: RlvrAlgorithm = RlvrAlgorithm(kl_coef=0.05, kl_estimator="k3")


class Adam(Section):
    """AdamW with its learning-rate schedule.

    Args:
        name: `adamw` keeps fp32 copies of bf16 weights, which would lose small updates. With torchao, and without
            copies: `adamw_bf16` rounds updates stochastically; `adamw8bit` also keeps its moments in 8 bits.
        lr: The highest learning rate.
        schedule: The learning rate after its warm-up: `constant`, or falling to 0 as `linear` or `cosine`.
        warmup: Steps in which the learning rate rises; below 1, the share of the steps.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        clip_norm: Gradients with a larger norm are scaled down to this one.
        freeze_vision: Whether vision tower and projector are not trained.
    """

    name: Literal["adamw", "adamw8bit", "adamw_bf16"] = "adamw"
    lr: Annotated[float, Field(ge=0)]
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[float, Field(ge=0)] = 0.0
    betas: Two = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    freeze_vision: bool = False

    def warmup_steps(self, steps: int) -> int:
        """Returns for how many of the steps the learning rate rises."""
        return round(self.warmup * steps) if self.warmup < 1 else round(self.warmup)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {list(self.betas)}")
        if self.name != "adamw" and find_spec("torchao") is None:
            raise ValueError(
                f"name: expected 'adamw' without torchao (pip install 'prism-kernels[ao]'), got {self.name!r}"
            )
        return self


class StageAdam(Adam):
    """The optimiser of a stage.

    Args:
        steps: Training steps; in RL stages, one per rollout batch.
        batch: Samples of a step; in warmup, pairs of responses, each compared in both channels. In RL stages: responses
            of an optimiser step; none: all of the rollout batch, which keeps the update on-policy.
    """

    steps: Positive
    batch: Annotated[Positive | None, NONE] = None


class WarmupAdam(StageAdam):
    """The optimiser of the discriminator's warm-up.

    Args:
        head_rate: Learning rate of the value head, as a multiple of `lr`. The head begins at 0; above 1 it learns from
            the backbone's features before the backbone changes much.
    """

    head_rate: Annotated[float, Field(gt=0)] = 1.0


class OptimiserSettings(Section):
    """One optimiser for each stage; in alignment `align` is the policy's and `discriminator` the discriminator's."""

    base: StageAdam = StageAdam(lr=2e-3, schedule="cosine", warmup=0.1, steps=600, batch=64)
    sft: StageAdam = StageAdam(lr=2e-3, schedule="cosine", warmup=0.1, steps=400, batch=64)
    distill: StageAdam = StageAdam(lr=5e-4, schedule="cosine", warmup=0.1, steps=60, batch=64)
    warmup: WarmupAdam = WarmupAdam(lr=2e-4, schedule="cosine", warmup=0.1, steps=60, batch=48, head_rate=25)
    align: StageAdam = StageAdam(lr=1e-4, schedule="linear", steps=50)
    discriminator: Adam = Adam(lr=1e-3)
    rlvr: StageAdam = StageAdam(lr=1.5e-4, steps=40)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        return over_defaults(cls, given)
