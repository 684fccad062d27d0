"""The algorithms, each a preset of options that may be overridden, and the optimisers."""

import re
from importlib.util import find_spec
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from prism.config.sections import NONE, Names, Numbers, Section, Two, over_defaults
from prism.ranges import Positive, Share

# the published options of `prism_kernels.policy_loss` for each algorithm
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
# its options for verified rewards: those of `prism_kernels.group_advantage`, and DAPO's two rules
REWARD_PRESETS: dict[str, dict[str, Any]] = {
    "dapo": {"dynamic_sampling": {}, "overlong": {}},
    "dr_grpo": {"scale": "none"},
    "rloo": {"baseline": "leave_one_out", "scale": "none"},
    "reinforce_pp": {"scale": "batch_std"},
}
_IMPORT_PATH = re.compile(r"\w+(?:\.\w+)*:\w+(?:\.\w+)*")


class PolicyLoss(Section):
    """An algorithm's loss: its name sets the options, and each option that is given overrides it.

    The options are those of `prism_kernels.policy_loss`, which has the formulas.

    Args:
        name: The algorithm.
        ratio: Importance ratios of single tokens, or of whole sequences as in GSPO.
        objective: `clip` as in PPO; `cispo`, with the clipped ratio as a constant weight; or `reinforce`, without a
            ratio.
        clip: [low, high]: the ratio is clipped to [1 - low, 1 + high]. Raise high for more exploration.
        dual_clip: Upper bound, above 1, of the ratio where the advantage is negative; none: no bound.
        log_ratio_bound: Log-ratios are clamped to plus or minus this, so that their exponential stays finite.
        aggregate: The loss is the mean over all tokens, or the mean over sequences of their tokens' mean, sum, or sum
            divided by horizon.
        horizon: Tokens that `seq_mean_token_sum_norm` divides by; none: the rollouts' max_new_tokens.
        kl_coef: Factor of the KL divergence from the policy before the stage; 0: no KL term and no copy of the policy.
            Raise it if the policy drifts.
        kl_estimator: Estimator of the KL divergence from samples; k1+ and k3+ have its unbiased gradient.
        entropy_coef: Factor of the entropy bonus. Raise it if the policy becomes deterministic too early.
        correction: Importance weights for rollouts whose engine computes other probabilities than the trainer:
            truncated (`tis`) or masked (`mask`), by token, sequence or geometric mean; none: no correction.
        correction_bounds: [lower, upper] of these weights: `tis` truncates at upper, `mask` drops what is outside.
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
        """Fills the options that are not given with those of the algorithm."""
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
            longest: max_new_tokens of the rollouts, which is the horizon if none is set.
        """
        options = self.model_dump(include=set(PolicyLoss.model_fields) - {"name"})
        return {**options, "horizon": float(longest) if self.horizon is None else self.horizon}


class AlignAlgorithm(PolicyLoss):
    """Alignment's loss and advantages. `prism_kernels.prism_advantage` has the formulas of the advantages.

    Args:
        mode: The formula that combines the discriminator's scores with format and accuracy. Only `align` can be used:
            the others need an accuracy, which alignment does not know.
        alpha: Share of perception in the mixture of both advantages; the rest is reasoning's.
        normalize: `channel` takes z-scores of each channel and then the mixture; `sum` takes z-scores of the mixture.
        invalid: Scores of responses in a bad format: `exclude` leaves them out of the statistics; `below_min`, as
            published, sets them to the group's lowest score less 1.
        format_penalty: Subtracted from the advantage of a response in a bad format.
        align_coef: Factor of the discriminator's advantage in modes other than `align`.
        wrong_penalty: Subtracted for a wrong answer in modes other than `align`.
        w_acc: Weight of the accuracy in `rlvr`, `rlvr_v2` and `sign_align`.
        w_fmt: Weight of a good format in `rlvr`, `rlvr_v2` and `sign_align`.
        token_credit: Whether captions are credited with perception's advantage, and thinking and answers with
            reasoning's, instead of all tokens with the mixture.
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
    def _check_mode(self) -> Self:
        if self.mode != "align":
            raise ValueError(f"mode: expected 'align', {self.mode!r} needs an accuracy, which alignment does not know")
        if self.token_credit and self.normalize != "channel":
            wanted = "normalize = 'channel', which keeps the channels apart"
            raise ValueError(f"token_credit: expected false without {wanted}, got true")
        return self

    def advantage_options(self) -> dict[str, Any]:
        """Returns prism_advantage's keyword arguments."""
        options = set(AlignAlgorithm.model_fields) - set(PolicyLoss.model_fields) - {"token_credit"}
        return self.model_dump(include=options)


class DynamicSampling(Section):
    """DAPO's dynamic sampling: groups that are all right or all wrong are replaced by those of other prompts.

    Accuracy decides, not the reward with its parts for format and length. Where verifier_weight is 0, the sum of the
    custom rewards decides.

    Args:
        generate: Prompts of each try; none: three times rollout.rlvr.prompts, which are kept.
        tries: Most tries of a step, which then uses the groups that it has. Raise it if most groups are all right or
            all wrong.
    """

    generate: Annotated[Positive | None, NONE] = None
    tries: Positive = 10


class Overlong(Section):
    """DAPO's penalty of long responses; `prism_kernels.shaping.overlong_penalty` has the formula.

    Args:
        buffer: Tokens before rollout.rlvr.max_new_tokens in which the penalty grows from 0; none: half of that limit.
        penalty: Subtracted from the reward of a response that reaches the limit.
    """

    buffer: Annotated[Positive | None, NONE] = None
    penalty: Annotated[float, Field(ge=0)] = 1.0


class RlvrAlgorithm(PolicyLoss):
    """RLVR's loss, advantages (`prism_kernels.group_advantage`), DAPO's two rules and the rewards.

    Args:
        baseline: Subtracted from a reward: the group's `mean`, the mean of the others (`leave_one_out`), or nothing.
        scale: Divisor of the difference: the group's standard deviation (`std`), the batch's (`batch_std`), or none.
        dynamic_sampling: Replacement of groups without a signal; none: all groups are used.
        overlong: Penalty of long responses; none: no penalty.
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
    """The algorithm of each RL stage.

    The defaults are for the embedded world. A table that is given in part keeps them for its other keys, unless it
    names another algorithm: then its other keys are those of that algorithm's preset.
    """

    align: AlignAlgorithm = AlignAlgorithm(token_credit=True, kl_coef=0.1, kl_estimator="k3")
    rlvr: RlvrAlgorithm = RlvrAlgorithm(kl_coef=0.05, kl_estimator="k3")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        names = {table: field.default.name for table, field in cls.model_fields.items()}
        same = {t: v for t, v in given.items() if isinstance(v, dict) and v.get("name", names.get(t)) == names.get(t)}
        return {**given, **over_defaults(cls, same)}


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
