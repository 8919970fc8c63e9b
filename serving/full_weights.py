"""Full weights as a version: whether a folder holds those of the served model, and a version's folder made of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from serving.manifest import Manifest, write_version
from serving.model import BaseModel
from serving.tensors import model_shapes

_MAY_DIFFER = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}  # of config.json
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json",
              "merges.txt", "added_tokens.json", "chat_template.jinja")  # fmt: skip
_SAMPLE = "def f(x): return x**2  # naïve 日本 😀\n<|im_start|>user\n1234.5"


class ForeignWeights(ValueError):
    """A folder doesn't hold whole weights of the model. The message says what differs."""


def check_fits(folder: Path, base: BaseModel) -> None:
    """Raises ForeignWeights where configuration, shapes or tokenizer aren't the base's, or numbers aren't finite."""
    ours, theirs = _config(base.hf_dir), _config(folder)
    for key in sorted((ours.keys() | theirs.keys()) - _MAY_DIFFER):
        if ours.get(key) != theirs.get(key):
            raise ForeignWeights(
                f"{folder} is another model than {base.id}: {key} in config.json is {theirs.get(key)!r}, not "
                f"{ours.get(key)!r}."
            )
    try:
        found, wanted = model_shapes(folder), model_shapes(base.hf_dir)
        index = folder / "model.safetensors.index.json"
        named = set(json.loads(index.read_text())["weight_map"]) if index.exists() else set()
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ForeignWeights(f"{folder} holds no whole safetensors: {error}") from error
    missing = sorted((wanted.keys() | (named - {"lm_head.weight"})) - found.keys())
    if missing:
        raise ForeignWeights(f"{folder} lacks {len(missing)} tensors, {missing[0]} among them.")
    for name in sorted(found):
        if found[name] != wanted.get(name):
            raise ForeignWeights(f"{name} is {found[name]} in {folder}, and {wanted.get(name)} in {base.id}.")
    _check_finite(folder)
    if any((folder / name).exists() for name in _TOKENIZER):
        _check_tokenizer(folder, base)


def write_weights(source: Path, target: Path, base: BaseModel, parent: str | None) -> Manifest:
    """Copy the weights in `source` as the version that `target` names, with the base's tokenizer. Raises
    ForeignWeights; OSError, and then nothing is left."""
    check_fits(source, base)

    def save(work: Path) -> None:
        for file in [*source.glob("*.safetensors"), *source.glob("*.safetensors.index.json"), source / "config.json"]:
            shutil.copyfile(file, work / file.name)
        for name in (*_TOKENIZER, "generation_config.json"):
            if (base.hf_dir / name).exists():
                shutil.copyfile(base.hf_dir / name, work / name)

    return write_version(
        target,
        save,
        lambda files: Manifest(
            id=target.name, parent=parent, base=base.fingerprint, base_name=base.id, kind="weights", files=files,
            command=f"whetstone versions add {source} --id {target.name}",
        ),
    )  # fmt: skip


def _config(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ForeignWeights(f"{folder} is no transformers folder with a config.json: {error}") from error
    return found


def _check_finite(folder: Path) -> None:
    import torch

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            weights: Any = opened
            for name in weights.keys():  # noqa: SIM118
                if not torch.isfinite(weights.get_tensor(name)).all():
                    raise ForeignWeights(f"{name} in {file} holds numbers that aren't finite: the training diverged.")


def _check_tokenizer(folder: Path, base: BaseModel) -> None:
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ForeignWeights(f"The tokenizer in {folder} can't be read: {error}") from error
    ours = base.tokenizer
    alike = (
        theirs.get_vocab() == ours.get_vocab()
        and theirs.eos_token_id == ours.eos_token_id
        and theirs.encode(_SAMPLE) == ours.encode(_SAMPLE)
    )
    if not alike:
        raise ForeignWeights(f"The tokenizer in {folder} isn't that of {base.id}: the prompts are rendered with its.")
