"""Which files of the environment belong to the packages that programs may import, and to what those need."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# What these packages import only when it's first asked for
_ALSO = {
    "matplotlib": ("matplotlib.pyplot",),
    "scipy": ("scipy.integrate", "scipy.linalg", "scipy.optimize", "scipy.stats"),
}


def top_levels(packages: Iterable[str]) -> dict[str, Path]:
    """The files and folders that lie directly in site-packages, by name. ValueError names what isn't installed."""
    found: dict[str, Path] = {}
    waiting = [(name, name) for name in packages]
    seen: set[str] = set()
    while waiting:
        name, wanted_by = waiting.pop()
        if canonicalize_name(name) in seen:
            continue
        seen.add(canonicalize_name(name))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"The sandbox is to have the package {wanted_by!r}, but {name!r} isn't installed: install it, or take "
                "it out of WHETSTONE_PYTHON_PACKAGES."
            ) from None
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and top not in found:
                found[top] = Path(str(distribution.locate_file(top)))
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append((requirement.name, wanted_by))
    return found


def modules(packages: Iterable[str]) -> list[str]:
    """What to import of `packages` beforehand. What a distribution is called isn't always what one imports."""
    by_distribution: dict[str, list[str]] = {}
    for module, distributions in importlib.metadata.packages_distributions().items():
        for distribution in distributions:
            by_distribution.setdefault(canonicalize_name(distribution), []).append(module)
    found: list[str] = []
    for name in packages:
        provided = by_distribution.get(canonicalize_name(name), [])
        same = [module for module in provided if canonicalize_name(module) == canonicalize_name(name)]
        found += same or [module for module in provided if module.isidentifier() and not module.startswith("_")]
    return found + [module for name in found for module in _ALSO.get(name, ())]
