"""What one training step's own tokens looked like: clip fractions, entropy, mismatch with the sampler, seconds."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from online_rl.recipe import Recipe

Metrics = dict[str, Any]


class Tally:
    """Sums over one step's own tokens, and its seconds by phase."""

    def __init__(self) -> None:
        self.tokens = self.low = self.high = 0
        self.entropy = self.gap = self.gap_max = 0.0
        self.sync_s = self.update_s = 0.0

    def add(self, logps: Tensor, entropies: Tensor, inputs: dict[str, Any], recipe: Recipe) -> None:
        own = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        if not own.any():
            return
        advantage = inputs["advantages"][:, None].expand_as(own)[own]
        gap = logps[own] - inputs["old_per_token_logps"][own]
        ratio = gap.exp()
        self.tokens += int(own.sum())
        self.low += int(((ratio < 1 - recipe.epsilon_low) & (advantage < 0)).sum())
        self.high += int(((ratio > 1 + recipe.epsilon_high) & (advantage > 0)).sum())
        self.entropy += float(entropies[own].sum())
        self.gap += float(gap.abs().sum())
        self.gap_max = max(self.gap_max, float(gap.abs().max()))

    def means(self) -> Metrics:
        """`mismatch`: mean |logprob of the trainer - of the sampler|, before the step's update."""
        n = max(self.tokens, 1)
        return {
            "trained_tokens": self.tokens,
            "clip_low": self.low / n,
            "clip_high": self.high / n,
            "entropy": self.entropy / n,
            "mismatch": self.gap / n,
            "mismatch_max": self.gap_max,
            "sync_s": round(self.sync_s, 2),
            "update_s": round(self.update_s, 2),
            "update_tokens_per_s": round(self.tokens / self.update_s, 1) if self.update_s else 0.0,
        }
