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


def model_shapes(path: str | Path) -> Shapes:
    """Of every tensor of a model's folder, or none where there is no such folder here. A tied head isn't told: some
    files hold it, some don't."""
    shapes = tensor_shapes(Path(path)) if Path(path).is_dir() else {}
    if "lm_head.weight" in shapes and shapes["lm_head.weight"] == shapes.get("model.embed_tokens.weight"):
        del shapes["lm_head.weight"]
    return shapes
