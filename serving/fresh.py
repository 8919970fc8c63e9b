"""The first version of a model: a fresh LoRA adapter, which changes nothing yet and is where training begins."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from feedback_store import Store
from serving.manifest import CorruptVersion, Manifest, read_version, write_version
from serving.model import LORA_TARGETS, BaseModel
from serving.tensors import tensor_shapes


def install_fresh(store: Store, home: Path, base: BaseModel, rank: int) -> None:
    """Register a fresh version of `base`, and put it in service, if the registry has no adapter that fits."""
    for version in store.versions():
        adapter = version.manifest.get("kind", "lora") == "lora"
        if adapter and version.status == "published" and version.manifest.get("base") == base.fingerprint:
            return
    folder = home / "versions" / f"base-{base.fingerprint[:8]}"
    try:
        manifest = read_version(folder, base.fingerprint)
    except CorruptVersion:
        manifest = write_fresh(folder, base, rank)
    store.add_version(manifest.id, None, str(folder), manifest.model_dump(), "published")
    store.set_current(manifest.id, f"first version of {base.id}")


def write_fresh(folder: Path, base: BaseModel, rank: int) -> Manifest:
    """As PEFT makes one: A uniform as Kaiming's, by a fixed seed, B zero; float16, alpha twice the rank."""
    import torch
    from safetensors.torch import save_file

    def save(work: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for name, (rows, columns) in _linear_layers(base.hf_dir).items():
            bound = 1 / math.sqrt(columns)
            a = (2 * torch.rand(rank, columns, generator=generator) - 1) * bound
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(torch.float16)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(rows, rank, dtype=torch.float16)
        if not tensors:
            raise ValueError(
                f"{base.hf_dir} has none of the layers {', '.join(LORA_TARGETS)}, so no LoRA version of it."
            )
        save_file(tensors, work / "adapter_model.safetensors", {"format": "pt"})
        config: dict[str, Any] = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0,
            "bias": "none", "target_modules": list(LORA_TARGETS), "base_model_name_or_path": None,
            "inference_mode": True, "use_dora": False, "use_rslora": False, "modules_to_save": None,
            "fan_in_fan_out": False,
        }  # fmt: skip
        (work / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

    return write_version(
        folder,
        save,
        lambda files: Manifest(
            id=folder.name, parent=None, base=base.fingerprint, base_name=base.id, files=files,
            command="a fresh adapter: the bare model",
        ),
    )  # fmt: skip


def _linear_layers(hf_dir: Path) -> dict[str, tuple[int, int]]:
    """(rows, columns) of the weights that adapters go on, by module."""
    found = {}
    for name, shape in tensor_shapes(hf_dir).items():
        module = name.removesuffix(".weight")
        if module.rsplit(".")[-1] in LORA_TARGETS and name.endswith(".weight"):
            rows, columns = shape
            found[module] = (rows, columns)
    return found
