"""Advantages from two scores, perception and reasoning, with the format and the answer taken into account."""

# not `import torch`: in this package that name is the module torch.py
from torch import Tensor

from prism_kernels import check
from prism_kernels.backend import resolve
from prism_kernels.ops.group_advantage import samples
from prism_kernels.ops.prism_advantage.registration import INVALID, MODES, NAME, NORMALIZE, advantages
from prism_kernels.ops.prism_advantage.torch import Settings


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

    GN is the z-score within a group, (x - mean) / (std + eps), ddof 1. The aligned advantage is
    A = alpha GN(perception) + (1 - alpha) GN(reasoning), or with normalize="sum" GN(alpha perception +
    (1 - alpha) reasoning). With f = 1 for a bad format and w = 1 for a wrong answer (accuracy <= 0) in good format:

    ==========  =====================================================================================================
    mode        advantage
    ==========  =====================================================================================================
    align       A - format_penalty f
    acc_gating  align_coef A - wrong_penalty w - format_penalty f
    gated       align_coef A (1 - f) (1 - w) - wrong_penalty w - format_penalty f
    rlvr        GN(w_acc accuracy + w_fmt (1 - f)) + align_coef A (1 - f) (1 - w)
    rlvr_v2     GN(w_acc accuracy + w_fmt (1 - f) - wrong_penalty w - format_penalty f) + align_coef A (1 - f) (1 - w)
    sign_align  GN((1 - f) (w_acc accuracy + w_fmt - wrong_penalty w) - format_penalty f) +
                align_coef A (1 - f) (1 - 2 w)
    ==========  =====================================================================================================

    Args:
        perception: (N,), the score of each sample's description.
        reasoning: (N,), the score of its reasoning.
        group: (N,), integer ids in [0, N), in any order.
        format_ok: (N,), bool; None: all.
        accuracy: (N,), for every mode but `align`.
        alpha: perception's share.
        normalize: `channel` or `sum`, see above.
        invalid: `exclude`: samples of a bad format are left out of A's statistics and have A = 0 (a group of one valid
            sample: A = 0), and a group without a valid sample gets 0 throughout. `below_min`, the published code: their
            scores become the group's smallest valid one - 1 (-1 if none is valid), and a group of one has mean 0
            and std 1.
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
    samples(NAME, floats, group, {"format_ok": format_ok})
    check.one_of(NAME, "normalize", normalize, NORMALIZE)
    check.one_of(NAME, "invalid", invalid, INVALID)
    check.one_of(NAME, "mode", mode, MODES)
    if accuracy is None and mode != "align":
        check.fail(NAME, f"accuracy with mode {mode!r}", None)
    if not 0 <= alpha <= 1:
        check.fail(NAME, "alpha in [0, 1]", alpha)
    check.positive(NAME, "eps", eps)
    correct = None if accuracy is None else accuracy.detach()
    return advantages(
        (perception.detach(), reasoning.detach(), group, format_ok, correct),
        (NORMALIZE.index(normalize), INVALID.index(invalid), MODES.index(mode)),
        list(Settings(alpha, format_penalty, align_coef, wrong_penalty, w_acc, w_fmt, eps)),
        resolve(NAME, perception.device),
    )
