"""This package against what verl's and TRL's own functions gave (tests/peers records it), without the packages.

`make test-peers` compares with the packages themselves, and checks that these figures are still theirs.
"""

import peer_cases
import pytest
import torch
from peer_cases import AdvantageCase, HeadCase, LossCase

ORACLES = {peer: peer_cases.read(peer) for peer in ("verl", "trl")}
BATCHES = {peer: peer_cases.read_batches(oracle) for peer, oracle in ORACLES.items()}


def entries(section):
    return [pytest.param(peer, entry, id=f"{peer}-{name}")
            for peer, oracle in ORACLES.items() for name, entry in oracle[section].items()]  # fmt: skip


@pytest.mark.parametrize("peer, entry", entries("losses"))
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_losses(peer, entry, backend):
    case = LossCase(**entry["case"])
    mine = peer_cases.ours(case, BATCHES[peer][case.batch], backend)
    peer_cases.assert_same(mine, peer_cases.read_result(entry["peer"]))


@pytest.mark.parametrize("peer, entry", entries("advantages"))
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_advantages(peer, entry, backend):
    case = AdvantageCase(**entry["case"])
    theirs = torch.tensor(entry["peer"], dtype=torch.float64)
    mine = peer_cases.our_advantage(case, backend)
    torch.testing.assert_close(mine, theirs, rtol=case.tolerance, atol=case.tolerance)


@pytest.mark.parametrize("peer, entry", entries("heads"))
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_heads(peer, entry, backend):
    case = HeadCase(**entry["case"])
    mine = peer_cases.our_head(case, backend)
    for name, theirs in entry["peer"].items():
        theirs = torch.tensor(theirs, dtype=torch.float64)
        torch.testing.assert_close(mine[name], theirs, rtol=case.tolerance, atol=case.tolerance, msg=name)


def test_the_oracles_are_whole():
    assert {peer: oracle["versions"][peer] for peer, oracle in ORACLES.items()} == {"verl": "0.9.1", "trl": "1.16.0"}
    names = [f"{peer} {section} {name}" for peer, oracle in ORACLES.items()
             for section in ("losses", "advantages", "heads") for name in oracle[section]]  # fmt: skip
    assert len(names) > 100
    for peer in ORACLES:
        assert (peer_cases.ORACLES / f"{peer}.json").stat().st_size < 100_000
