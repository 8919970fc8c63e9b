"""Answers: the agent loop, the dialects that a policy acts in, the engines behind it, and the version in service."""
