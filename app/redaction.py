"""Redaction by DataFog's patterns: no model, no network, no look-up elsewhere.

It finds e-mail addresses, telephone, social-security and card numbers, IP addresses and German IBANs by their shape. It
doesn't know names, streets or anything that has no shape.
"""

from __future__ import annotations

import os

from online_rl.redaction import Redact, Redacted

KINDS = ["EMAIL", "PHONE", "SSN", "CREDIT_CARD", "IP_ADDRESS", "DE_IBAN"]  # dates and postal codes look like any number


class RedactionMissing(RuntimeError):
    """The library isn't installed."""


def redactor() -> Redact:
    """What replaces each find by its kind in brackets. Raises RedactionMissing."""
    os.environ.setdefault("DATAFOG_NO_TELEMETRY", "1")  # it is off unless asked for; this makes sure
    try:
        from datafog.engine import scan
    except ImportError as error:
        raise RedactionMissing(
            "Redaction needs the library datafog: pip install 'whetstone[redact]', or turn redact_training off."
        ) from error

    def redact(text: str) -> Redacted:
        out, removed, end = [], [], 0
        for found in scan(text, engine="regex", entity_types=KINDS, locales=["de"]).entities:  # in order, none overlaps
            out += [text[end : found.start], f"[{found.type.removeprefix('DE_')}]"]
            removed.append(found.text)
            end = found.end
        return Redacted("".join([*out, text[end:]]), removed)

    return redact
