"""Which version an answer should be written with: the conversation's own, the canary, or the current one."""

from __future__ import annotations

import hashlib

from feedback_store import InService


def preferred(choice: InService, owner: str) -> list[str]:
    """The versions to try, the best first: the one that can be loaded answers."""
    if choice.kept is not None:
        wanted = [choice.kept, choice.current]
    elif choice.canary is not None and on_canary(owner, choice.canary.version, choice.canary.share):
        wanted = [choice.canary.version, choice.current]
    else:
        wanted = [choice.current]
    return list(dict.fromkeys(version for version in wanted if version is not None))


def on_canary(owner: str, version: str, share: float) -> bool:
    """Whether an owner's new conversations begin on a canary: alike in every process, and each canary falls to other
    owners. Raising the share keeps those that it had."""
    digest = hashlib.sha256(f"{version}\0{owner}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
