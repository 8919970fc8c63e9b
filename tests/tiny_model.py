"""A random Llama of a hundred thousand parameters, its byte-level tokenizer, and rollouts of it: no download."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from online_rl.rollouts import Rollout
from online_rl.tasks.base import Task
from serving.trajectory import Step, Trajectory
from tests.tiny_tokenizer import tiny_tokenizer


def tiny_model(seed: int = 0, hidden: int = 64, layers: int = 2) -> LlamaForCausalLM:
    """fp32, tied embeddings, the vocabulary of `tiny_tokenizer`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,  # wide enough that some tokens are clearly likelier than others
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def tiny_policy(seed: int = 0, rank: int = 8, **size: int) -> PeftModel:
    """`tiny_model` with a LoRA adapter to train, its B not zero, so that every part of it has a gradient."""
    model = tiny_model(seed, **size)
    policy = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    return policy


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Model and tokenizer as a folder that transformers loads; under a megabyte."""
    tiny_model(seed).save_pretrained(str(folder))
    tiny_tokenizer().save_pretrained(str(folder))
    return folder


def spoken(prompt_ids: list[int], ids: list[int], logprobs: list[float], mask: list[int] | None = None) -> Trajectory:
    """A trajectory of one step with these completion tokens; `mask` 0 marks what a tool wrote."""
    mask = mask or [1] * len(ids)
    step = Step(0, ids, logprobs, mask, "v", "", "answer", "")
    return Trajectory(prompt_ids, [step], "", "answer", "v")


def sampler(policy: PeftModel, tokenizer: PreTrainedTokenizerFast, length: int) -> Rollout:
    """Rollouts of `length` tokens drawn from the policy itself, by the seed alone."""

    async def rollout(task: Task, seed: int) -> Trajectory:
        generator = torch.Generator().manual_seed(seed)
        prompt = list(tokenizer(task.question).input_ids)
        ids: list[int] = []
        logprobs: list[float] = []
        with torch.no_grad():
            for _ in range(length):
                logp = policy(input_ids=torch.tensor([prompt + ids])).logits[0, -1].log_softmax(-1)
                ids.append(int(torch.multinomial(logp.exp(), 1, generator=generator)))
                logprobs.append(float(logp[ids[-1]]))
        return spoken(prompt, ids, logprobs)

    return rollout
