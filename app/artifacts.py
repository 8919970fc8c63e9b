"""The files and figures that a tool left in the conversation's workspace, as its artifact names them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from serving.trajectory import Observation, Trajectory
from tools.file_rules import UNKNOWN, BadName, check_name


@dataclass(frozen=True)
class Left:
    """A file or a figure. `bytes` is its size, None where the tool didn't say (figures)."""

    name: str
    media_type: str
    bytes: int | None = None


def files_in(observation: Observation) -> list[Left]:
    return _named(observation.artifact.get("files"))


def images_in(observation: Observation) -> list[Left]:
    return _named(observation.artifact.get("images"))


def files_of(trajectory: Trajectory) -> list[Left]:
    """Each file once, as the last program that wrote it left it."""
    return list({left.name: left for seen in _observations(trajectory) for left in files_in(seen)}.values())


def images_of(trajectory: Trajectory) -> list[Left]:
    return list({left.name: left for seen in _observations(trajectory) for left in images_in(seen)}.values())


def file_path(conversation_id: str, name: str) -> str:
    """Below the routes' prefix, of the endpoint and of the chat alike."""
    return f"conversations/{quote(conversation_id, safe='')}/files/{quote(name, safe='')}"


def image_path(conversation_id: str, name: str) -> str:
    return f"conversations/{quote(conversation_id, safe='')}/images/{quote(name, safe='')}"


def _observations(trajectory: Trajectory) -> list[Observation]:
    return [step.observation for step in trajectory.steps if step.observation is not None]


def _named(listed: Any) -> list[Left]:
    """What has a name that a workspace would take: an artifact may come from a tool that anyone wrote."""
    found = []
    for given in listed if isinstance(listed, list) else []:
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            continue
        try:
            name = check_name(given["name"])
        except BadName:
            continue
        media_type, size = given.get("media_type"), given.get("bytes")
        found.append(
            Left(name, media_type if isinstance(media_type, str) else UNKNOWN, size if isinstance(size, int) else None)
        )
    return found
