"""Engines: what turns token ids into token ids and logprobs for a named version of the policy."""

from serving.engines.base import Engine, EngineError, GenerateRequest, Sampling, TokenChunk

__all__ = ["Engine", "EngineError", "GenerateRequest", "Sampling", "TokenChunk"]
