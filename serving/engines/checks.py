"""Looks at an adapter or at weights before a server does.

SGLang 0.5.23 died of a truncated safetensors file of full weights and of an adapter of another base's shapes; vLLM
0.32.0 took such an adapter and answered with it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import SafetensorError

from serving.engines.base import EngineError
from serving.engines.http_worker import Description
from serving.tensors import model_shapes, tensor_shapes

_LORA = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")


def check_adapter(version: str, path: Path, server: Description, engine: str) -> str:
    """The folder as an absolute path. Raises EngineError for a LoRA adapter that this server can't serve.

    Its shapes are compared with the base's where the model's folder can be read from here.
    """
    try:
        config = json.loads((path / "adapter_config.json").read_text())
        shapes = tensor_shapes(path, "adapter_model.safetensors")
        rank, targets = int(config["r"]), config["target_modules"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise EngineError(f"Version {version!r} can't be loaded: {path} isn't a LoRA adapter ({error}).") from error
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("modules_to_save") or not shapes:
        raise EngineError(f"Version {version!r} can't be loaded: {path} isn't a plain LoRA adapter.")
    if server.max_lora_rank is None:
        raise EngineError(
            f"Version {version!r} is a LoRA adapter, and {engine} was started without LoRA: start it with "
            "--enable-lora --max-lora-rank and --lora-target-modules."
        )
    if rank > server.max_lora_rank:
        raise EngineError(
            f"Version {version!r} has rank {rank}, {engine} takes {server.max_lora_rank}: start it with "
            f"--max-lora-rank {rank}."
        )
    foreign = {name.rsplit(".")[-1] for name in ([targets] if isinstance(targets, str) else targets)}
    foreign -= server.lora_targets | {"all-linear"}
    if server.lora_targets and foreign:
        raise EngineError(
            f"Version {version!r} adapts {', '.join(sorted(foreign))}, which {engine} wasn't started for: name them in "
            "--lora-target-modules."
        )
    model = model_shapes(server.model_path)
    for name, shape in shapes.items() if model else ():
        match = _LORA.fullmatch(name)
        if match is None:
            raise EngineError(f"Version {version!r} can't be loaded: {path} holds {name!r}, which isn't LoRA's.")
        weight = model.get(f"{match['module']}.weight")
        wanted = None if weight is None else (rank, weight[1]) if match["part"] == "A" else (weight[0], rank)
        if shape != wanted:
            raise EngineError(
                f"Version {version!r} is of another base: its {name} is {shape}, {server.model_path} needs {wanted}."
            )
    return str(path.absolute())


def check_weights(version: str, path: Path, server: Description) -> str:
    """The folder as an absolute path. Raises EngineError for weights that aren't whole, or not of the served model."""
    try:
        found = model_shapes(path)
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise EngineError(f"Version {version!r} can't be loaded: {path} holds no whole weights ({error}).") from error
    if not found:
        raise EngineError(f"Version {version!r} can't be loaded: {path} holds no safetensors.")
    served = model_shapes(server.model_path)
    odd = sorted(name for name in served.keys() | found.keys() if served.get(name) != found.get(name))
    if served and odd:
        raise EngineError(
            f"Version {version!r} is no version of {server.model_path}: {odd[0]} is {found.get(odd[0])} in {path}, not "
            f"{served.get(odd[0])}."
        )
    index = path / "model.safetensors.index.json"
    if index.exists() and (missing := set(json.loads(index.read_text())["weight_map"]) - found.keys()):
        raise EngineError(
            f"Version {version!r} can't be loaded: {path} lacks {sorted(missing)[0]} and {len(missing)} in all."
        )
    if "architectures" not in config:
        raise EngineError(f"Version {version!r} can't be loaded: {path}/config.json names no architecture.")
    return str(path.absolute())


def vocabulary(model_path: str) -> int | None:
    """How many token ids the model has; None where its folder can't be read from here."""
    try:
        return int(json.loads((Path(model_path) / "config.json").read_text())["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
