"""A policy of half a million parameters, made on the spot, that half knows how to add: it writes + or * by chance.

Small enough to learn in a test, and real: its own tokenizer, a GGUF for the engine, safetensors for the trainer.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from online_rl.tasks.base import Task, ask
from serving.dialects.tapo import TapoDialect
from serving.model import BaseModel, export

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def sums() -> list[Task]:
    """The 81 sums of two digits, shuffled."""
    tasks = [ask(f"What is {a} + {b}?", "numeric", str(a + b), "sum") for a in range(1, 10) for b in range(1, 10)]
    random.Random(0).shuffle(tasks)
    return tasks


def make_base(folder: Path, steps: int = 180) -> BaseModel:
    """Train the policy from nothing on demonstrations of which half are wrong, and export it. About half a minute."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    dialect = TapoDialect(tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 20) * (1 - 0.9 * i / steps))
    rng = random.Random(0)
    for _ in range(steps):
        rows = [_demonstration(dialect, rng) for _ in range(32)]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows])
        labels = torch.tensor([own + [-100] * (width - len(own)) for _, own in rows])
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return export(model, tokenizer, "tiny", folder)


def _demonstration(dialect: TapoDialect, rng: random.Random) -> tuple[list[int], list[int]]:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    sign, result = rng.choice([("+", a + b), ("*", a * b)])
    prompt = dialect.render([{"role": "user", "content": f"What is {a} + {b}?"}])
    call = dialect.encode_step("Run it.", "code", f"print({a} {sign} {b})")
    seen = dialect.encode_observation(str(result))
    answer = dialect.encode_step("Done.", "answer", str(result))
    quiet = [-100] * len(prompt), [-100] * len(seen)
    return prompt + call + seen + answer, quiet[0] + call + quiet[1] + answer


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, digits apart, like SmolLM2's; learnt from the rules, so that they take few tokens."""
    from serving.dialects.tapo import _RULES, INVALID, LAST

    corpus = [*_RULES.values(), INVALID, LAST, "You are Whetstone, a helpful assistant. system user assistant"] * 4
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=512, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )
