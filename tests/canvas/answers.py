"""What makes two answers different."""

from __future__ import annotations

import json
from collections import Counter


def differences(expected: dict, found: dict, *, kills: bool) -> list[str]:
    """Return them, a line each; none: the same answer, or one where Celery's Redis backend has none.

    Args:
        expected: That of Celery's Redis backend, without kills.
        found: Ours.
        kills: What ran may have run more than once.
    """
    told = []
    if expected["sent"] != found["sent"]:
        told.append(f"sending: {expected['sent']!r} / {found['sent']!r}")
    hung = has_none(expected)
    told += [
        line
        for name in ("trees", "gets")
        if not (hung and name == "gets")
        for one, other in zip(expected[name], found[name], strict=False)
        for line in _unlike(one, other, name, hung=hung)
    ]
    for label in expected["docs"].keys() & found["docs"].keys():
        one, other = set(expected["docs"][label]), set(found["docs"][label])
        # A RETRY that was stored after its successor's end stays there.
        if one != other and not any(each.startswith(("PENDING", "RETRY")) for each in one):
            told.append(f"document of {label}: {sorted(one)} / {sorted(other)}")
    one, other = (Counter(set(answer["ran"]) if kills else answer["ran"]) for answer in (expected, found))
    told += [f"did not happen: {line}" for line in one - other]
    if not hung and not expected["open"]:  # what waited there for ever went on here
        told += [f"happened besides: {line}" for line in other - one]
    return told


def has_none(answer: dict) -> bool:
    """Whether some result of a program never came."""
    return "PENDING" in json.dumps(answer["trees"])


def _unlike(one, other, where, *, hung) -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        if str(one.get("doc")).startswith(("PENDING", "RETRY")):
            return []
        names = one.keys() - ({"counts"} if hung else set())
        return [line for name in names for line in _unlike(one[name], other[name], f"{where}.{name}", hung=hung)]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        both = enumerate(zip(one, other, strict=True))
        return [line for n, (a, b) in both for line in _unlike(a, b, f"{where}[{n}]", hung=hung)]
    return [] if one == other else [f"{where}: {json.dumps(one)} / {json.dumps(other)}"]
