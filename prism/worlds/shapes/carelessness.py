"""The error rates of the public teacher of the shapes world."""

from dataclasses import dataclass

from prism.ranges import Ranged, Share


@dataclass(frozen=True, kw_only=True)
class Carelessness(Ranged):
    """How often the public teacher errs; a response has at most one error of perception.

    `colour` and `dropped` are habits: the teacher errs more often than not, so a policy that learns from it always
    does. The other errors are slips, which happen anywhere.

    Args:
        colour: Share of the scenes with something purple in which it is called blue.
        dropped: Share of the other scenes with five items, or whose purple was seen, in which the last item is missing.
        invented: Share of the remaining scenes in which the last item appears again in the next free cell.
        kind: Share of the remaining scenes in which the first item is called by the kind that is easily confused with
            it.
        place: Share of the remaining scenes in which the last item is moved to the next free cell.
        reasoning: Share of all responses whose last step of reasoning is wrong.
        careful_style: Share of responses in the curated teacher's style. At 0 the style alone tells the teachers apart.
    """

    colour: Share = 0.80
    dropped: Share = 0.80
    invented: Share = 0.01
    kind: Share = 0.02
    place: Share = 0.01
    reasoning: Share = 0.20
    careful_style: Share = 0.50

    def __post_init__(self) -> None:
        super().__post_init__()
        slips = self.invented + self.kind + self.place
        if slips > 1:
            raise ValueError(f"invented: expected invented, kind and place to sum to <= 1, got {slips:g}")
