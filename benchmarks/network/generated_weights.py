"""Generate weights for tests and benchmarks that lack the released ones: numbers made from each tensor's name.

    python -m benchmarks.network.generated_weights FILE [--salt TEXT]    # a checkpoint to import, 432 MB

The same name, shape and salt give the same numbers everywhere. They keep the network's activations near one, so that it
computes as with trained weights, but finds nothing. Names, shapes and numbers come from `../shared/sam6d` beside the
project's root.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor

SHARED = Path(__file__).parents[2] / "../shared/sam6d"


def available() -> bool:
    """Return True if the folder that defines the numbers exists."""
    return (SHARED / "weights.py").is_file() and (SHARED / "state_dict.json").is_file()


def state_dict(salt: str = "") -> dict[str, Tensor]:
    """Return every tensor of the network by its name, float32 and a few int64; another salt gives other numbers."""
    shapes = json.loads((SHARED / "state_dict.json").read_text())
    make = module("weights").make
    return {name: torch.from_numpy(make(name, shape, salt)) for name, shape in shapes.items()}


def write(path: Path, salt: str = "") -> None:
    """Write the tensors as a safetensors file: 432 MB, in a few seconds."""
    save_file(state_dict(salt), path)


def module(name: str) -> ModuleType:
    """Import a file of the shared folder as a module: "weights" (the numbers) or "cases" (constructed logits)."""
    spec = importlib.util.spec_from_file_location(f"shared_{name}", SHARED / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--salt", default="", help="another salt gives other numbers")
    arguments = parser.parse_args()
    write(arguments.file, arguments.salt)


if __name__ == "__main__":
    main()
