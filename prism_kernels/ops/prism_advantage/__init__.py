"""Advantages from the scores of perception and reasoning, the format and the answer."""

from torch import Tensor

from prism_kernels import check
from prism_kernels.backend import resolve
from prism_kernels.ops.group_advantage import check_samples
from prism_kernels.ops.prism_advantage.eager import Settings
from prism_kernels.ops.prism_advantage.op import INVALID, MODES, NAME, NORMALIZE, prism_advantage_fwd


def prism_advantage(
    perception: Tensor,
    reasoning: Tensor,
    group: Tensor,
    *,
    format_ok: Tensor | None = None,
    accuracy: Tensor | None = None,
    alpha: float = 0.5,
    normalize: str = "channel",
    invalid: str = "exclude",
    format_penalty: float = 1.5,
    mode: str = "align",
    align_coef: float = 1.0,
    wrong_penalty: float = 1.0,
    w_acc: float = 1.0,
    w_fmt: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """Returns each sample's advantage, (N,), fp32 (fp64 for fp64 input), without gradient.

    It replaces, with f = 1 for a bad format, w = 1 for a wrong answer (accuracy <= 0) in good format, and the z-score
    of each group (the std has ddof 1)::

        GN = lambda x: (x - x.mean()) / (x.std() + eps)
        A = alpha * GN(perception) + (1 - alpha) * GN(reasoning)        # normalize="channel"
        A = GN(alpha * perception + (1 - alpha) * reasoning)            # normalize="sum"
        gate = align_coef * A * (1 - f) * (1 - w)
        penalty = wrong_penalty * w + format_penalty * f
        advantage = {
            "align": A - format_penalty * f,
            "acc_gating": align_coef * A - penalty,
            "gated": gate - penalty,
            "rlvr": GN(w_acc * accuracy + w_fmt * (1 - f)) + gate,
            "rlvr_v2": GN(w_acc * accuracy + w_fmt * (1 - f) - penalty) + gate,
            "sign_align": GN((1 - f) * (w_acc * accuracy + w_fmt - wrong_penalty * w) - format_penalty * f)
            + align_coef * A * (1 - f) * (1 - 2 * w),
        }[mode]

    Args:
        perception: (N,), the score of each sample's description.
        reasoning: (N,), the score of its reasoning.
        group: (N,), integer ids in [0, N), in any order.
        format_ok: (N,), bool; None: all.
        accuracy: (N,), for every mode but `align`.
        alpha: perception's share.
        normalize: `channel` or `sum`, see above.
        invalid: `exclude`: samples of a bad format enter no statistic of A and have A = 0 (a group of one valid
            sample: A = 0), and all advantages of a group without a valid sample are 0. `below_min`, the published
            code: the scores of samples of a bad format become the group's smallest valid score - 1 (-1 if none is
            valid), and a group of one has mean 0 and std 1.
        format_penalty: see above.
        mode: see above.
        align_coef: see above.
        wrong_penalty: see above.
        w_acc: see above.
        w_fmt: see above.
        eps: added to each std.
    """
    floats = {"perception": perception, "reasoning": reasoning}
    if accuracy is not None:
        floats["accuracy"] = accuracy
    check_samples(NAME, floats, group, {"format_ok": format_ok})
    check.one_of(NAME, "normalize", normalize, NORMALIZE)
    check.one_of(NAME, "invalid", invalid, INVALID)
    check.one_of(NAME, "mode", mode, MODES)
    if accuracy is None and mode != "align":
        check.fail(NAME, f"accuracy with mode {mode!r}", None)
    settings = Settings(
        check.number(NAME, "alpha", alpha, 0, 1),
        check.number(NAME, "format_penalty", format_penalty),
        check.number(NAME, "align_coef", align_coef),
        check.number(NAME, "wrong_penalty", wrong_penalty),
        check.number(NAME, "w_acc", w_acc),
        check.number(NAME, "w_fmt", w_fmt),
        check.positive(NAME, "eps", eps),
    )
    return prism_advantage_fwd(
        perception.detach(),
        reasoning.detach(),
        group,
        format_ok,
        None if accuracy is None else accuracy.detach(),
        NORMALIZE.index(normalize),
        INVALID.index(invalid),
        MODES.index(mode),
        list(settings),
        resolve(NAME, perception.device),
    )
