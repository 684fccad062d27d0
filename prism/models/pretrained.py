"""The base of the embedded default: a tiny policy that answers well in a style of its own, shipped with the package.

`prism run --config configs/tiny_base.toml` trains such a one (that file says how the shipped one was made); then
`python -m prism.models.pretrained FOLDER` takes the policy of that run's folder.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from prism_kernels import check

NAME = "tiny base"
PATH = Path(__file__).parent / "tiny_base.safetensors"


def load_tiny_base(model: nn.Module) -> None:
    """Gives a tiny policy of the default sizes the shipped weights."""
    if not PATH.exists():
        wanted = f"{PATH}, which `prism run --config configs/tiny_base.toml` and `python -m {__name__}` make"
        check.fail(NAME, wanted, "none", RuntimeError)
    tensors = load_file(PATH)
    for name, value in model.state_dict().items():
        if name not in tensors or tensors[name].shape != value.shape:
            found = "none" if name not in tensors else tuple(tensors[name].shape)
            check.fail(NAME, f"{name} of shape {tuple(value.shape)} in {PATH.name}", found)
    model.load_state_dict(tensors)


def write_tiny_base(folder: str | Path) -> None:
    """Writes the shipped file from a transformers folder, in half precision."""
    tensors = load_file(Path(folder) / "model.safetensors")
    save_file({name: value.to(torch.float16) for name, value in tensors.items()}, PATH)
    print(f"wrote {PATH}, {PATH.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    write_tiny_base(sys.argv[1])
