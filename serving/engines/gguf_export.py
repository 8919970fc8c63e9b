"""Writes what llama.cpp reads: a base model and LoRA adapters as GGUF, from transformers' and PEFT's files.

Only Llama-shaped models are written (SmolLM2 is one). The vocabulary in the file is for stop strings alone, since
tokens go in and come out as ids: a token that isn't whole UTF-8 by itself gets a placeholder text, because
llama.cpp's server holds back, and then loses, the ids of tokens that end in the middle of a character.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

QUANTISATION = "Q8_0"  # measured: within 0.4 % of the released weights, and faster here than the Q4_1 they came in

_MODULES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight"}  # fmt: skip


class UnsupportedModel(ValueError):
    """The model or adapter has a part that this exporter doesn't write."""


def write_base(hf_dir: Path, tokenizer: Any, out: Path) -> None:
    """Write the model in `hf_dir` (safetensors) as GGUF in Q8_0, atomically."""
    config = json.loads((hf_dir / "config.json").read_text())
    if config["model_type"] != "llama":
        raise UnsupportedModel(f"{hf_dir}: model_type {config['model_type']!r}; the embedded engine exports 'llama'.")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _write_vocabulary(writer, tokenizer, config["vocab_size"])
    for name, tensor in _tensors(hf_dir):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        target = _base_name(name)
        if target.endswith(("attn_q.weight", "attn_k.weight")):
            tensor = _permute(tensor, heads if "attn_q" in target else kv_heads)
        if tensor.ndim == 1 or tensor.shape[-1] % 32:
            writer.add_tensor(target, tensor)
        else:
            kind = gguf.GGMLQuantizationType[QUANTISATION]
            writer.add_tensor(target, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    _finish(writer, partial, out)


def write_adapter(adapter_dir: Path, hf_dir: Path, out: Path) -> None:
    """Write the PEFT LoRA adapter in `adapter_dir`, trained on the model in `hf_dir`, as GGUF, atomically.

    Rows of lora_B for q and k are permuted as llama.cpp's rotary layout wants.
    """
    base = json.loads((hf_dir / "config.json").read_text())
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        raise UnsupportedModel(f"{adapter_dir}: only plain LoRA adapters can be served by the embedded engine.")
    alpha = config["lora_alpha"] * (config["r"] ** 0.5 if config.get("use_rslora") else 1)
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for name, tensor in _tensors(adapter_dir):
        module, part = name.removeprefix("base_model.model.").split(".lora_")
        target = _base_name(f"{module}.weight")
        if part.startswith("B") and target.endswith(("attn_q.weight", "attn_k.weight")):
            tensor = _permute(
                tensor, base["num_attention_heads"] if "attn_q" in target else base["num_key_value_heads"]
            )
        writer.add_tensor(f"{target}.lora_{part[0].lower()}", tensor)
    _finish(writer, partial, out)


def _tensors(folder: Path) -> Any:
    """(name, float32 array) of every tensor in the folder's safetensors files."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                yield name, opened.get_tensor(name).float().numpy()


def _base_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.split(".", 3)
    module = rest.removesuffix(".weight")
    if module not in _MODULES:
        raise UnsupportedModel(f"Tensor {name!r} has no place in a Llama GGUF.")
    return f"blk.{layer}.{_MODULES[module]}.weight"


def _permute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """(heads * d, n): each head's rows from two halves (transformers) to interleaved pairs (llama.cpp)."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def _rope_theta(config: dict[str, Any]) -> float:
    return float(config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta", 10000.0))


def _write_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, size: int) -> None:
    special = set(tokenizer.all_special_ids)
    texts: list[str] = []
    kinds = []
    for i in range(size):
        whole = i < len(tokenizer) and "\ufffd" not in tokenizer.decode([i], skip_special_tokens=False)
        texts.append(tokenizer.convert_ids_to_tokens(i) if whole else f"[token{i}]")
        kinds.append(gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])  # required, unused: nothing is tokenised there
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)


def _finish(writer: gguf.GGUFWriter, partial: Path, out: Path) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, out)
