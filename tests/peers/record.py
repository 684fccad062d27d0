"""Stores the results of an installed peer: `python tests/peers/record.py verl` (or trl), in its environment."""

import importlib
import sys
from importlib.metadata import version

import peer_cases

OTHERS = {
    "verl": ("verl", "torch", "transformers", "tensordict"),
    "trl": ("trl", "torch", "transformers", "accelerate"),
}


def main(peer: str) -> None:
    module = importlib.import_module(f"{peer}_cases")
    batches = peer_cases.batches()
    store = peer_cases.stored
    oracle = {
        "versions": {name: version(name) for name in OTHERS[peer]},
        "batches": peer_cases.stored_batches(),
        "losses": {k: store(case, module.loss(batches[case.batch], call)) for k, (case, call) in module.LOSSES.items()},
        "advantages": {k: store(x[0], module.advantage(*x)) for k, x in module.ADVANTAGES.items()},
        "heads": {k: store(case, function(case)) for k, (case, function) in module.HEADS.items()},
    }
    path = peer_cases.write(peer, oracle)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main(sys.argv[1])
