"""What safetensors files hold, without reading the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(folder: Path, pattern: str = "*.safetensors") -> Shapes:
    """Of every tensor in the folder's files. Opening a file checks that it is as long as its header says."""
    shapes: Shapes = {}
    for file in sorted(folder.glob(pattern)):
        with safe_open(file, framework="np") as opened:
            weights: Any = opened
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return shapes
