"""LoRA adapters of the policy: a fresh one, a version's to train on, and saving one as a version."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.manifest import Manifest, read_version, write_version
from serving.model import BaseModel


def fresh_adapter(base: BaseModel, rank: int, alpha: int, dtype: str = "bfloat16") -> Any:
    """The base model with a new, trainable adapter on every linear layer."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base.load(dtype), config)


def load_adapter(base: BaseModel, folder: Path, dtype: str = "bfloat16") -> Any:
    """The base model with a version's adapter, trainable. Raises CorruptVersion."""
    from peft import PeftModel

    read_version(folder, base.fingerprint)
    return PeftModel.from_pretrained(base.load(dtype), str(folder), is_trainable=True)


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter as float16 safetensors: half the bytes, and finer than the base's own quantisation."""
    import torch
    from safetensors.torch import load_file, save_file

    model.save_pretrained(str(folder))
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.float16) for name, tensor in load_file(file).items()}, file)
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text())
    settings["base_model_name_or_path"] = None  # a path of this machine means nothing on another
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)


def save_version(
    save: Callable[[Path], None], folder: Path, base: BaseModel, parent: str | None, **about: Any
) -> Manifest:
    """Make the version named by the folder; `save` writes its adapter, `about` fills the manifest's other fields."""
    return write_version(
        folder,
        save,
        lambda files: Manifest(
            id=folder.name, parent=parent, base=base.fingerprint, base_name=base.id, files=files, **about
        ),
    )
