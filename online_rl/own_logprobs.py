"""Logprobs of a policy's own tokens alone: projecting every position onto the vocabulary is most of a CPU's step."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor


class OwnLogprobs(torch.autograd.Function):
    """Logprobs and entropies of `targets` (N) given `hidden` (N, H) through a frozen head `weight` (V, H).

    d log p(t) / d hidden = W[t] - sum_v p(v) W[v] needs nothing from later layers, so it is made in the forward pass,
    a chunk of tokens at a time: no (N, V) tensor is kept and nothing is computed twice. Entropies carry no gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_autocast_enabled(hidden.device.type):
            kind = torch.get_autocast_dtype(hidden.device.type)
            weight = weight.to(kind)
        logps, entropies, slopes = [], [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for part, target in zip(hidden.split(512), targets.split(512), strict=True):
                logits = (part.to(weight.dtype) @ weight.T).float()  # (512, V)
                log_z = logits.logsumexp(-1, keepdim=True)
                p = (logits - log_z).exp()
                logps.append((logits.gather(-1, target[:, None]) - log_z).squeeze(-1))
                entropies.append(log_z.squeeze(-1) - (p * logits).sum(-1))
                slopes.append(weight[target].float() - (p.to(weight.dtype) @ weight).float())
        ctx.save_for_backward(torch.cat(slopes) if slopes else hidden.float())
        ctx.dtype = hidden.dtype
        flat = torch.cat(logps) if logps else hidden.new_zeros(0, dtype=torch.float32)
        entropy = torch.cat(entropies) if entropies else flat.clone()
        ctx.mark_non_differentiable(entropy)
        return flat, entropy

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, grad_entropies: Any) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (slopes,) = ctx.saved_tensors
        return (slopes * grad_logps[:, None]).to(ctx.dtype), None, None


def plain_frozen_head(model: PeftModel) -> bool:
    """On CPU, where TRL projects every position: a head that is one frozen matrix, so OwnLogprobs fits."""
    policy: Any = model.get_base_model()
    head, config = policy.get_output_embeddings(), policy.config
    scaled = any(
        getattr(config, name, None) is not None
        for name in (
            "final_logit_softcapping",
            "logit_scale",
            "logits_scaling",
            "lm_head_multiplier",
            "output_multiplier",
        )
    )
    frozen = not head.weight.requires_grad and head.bias is None
    return frozen and not scaled and head.weight.device.type == "cpu"
