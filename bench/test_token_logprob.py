import pytest

from bench.entry import BOOK, DEVICE, measure_row
from bench.registry import plan

OP = "token_logprob"
PLAN = plan(OP, DEVICE)


@pytest.mark.parametrize("case, contender, pass_", PLAN, ids=[f"{c.name}-{p}-{who.name}" for c, who, p in PLAN])
def test_token_logprob(case, contender, pass_, benchmark):
    BOOK.planned[OP] = len(PLAN)
    measure_row(case, contender, pass_, benchmark)
