"""Draws programs: random canvases as plain data, each a function of its seed."""

from __future__ import annotations

import random
import uuid

VALUES = ("value",) * 12
SAFE = (*VALUES, "none", "retry", "state", "lost once", "ignored")
"""What has one outcome, however often a worker is killed meanwhile."""
ENDS = (
    *SAFE,
    *("error", "odd error", "error"),
    *("no result", "retry", "out of retries", "ignore", "reject", "expired", "revoked", "lost", "twice"),
    *("out of time", "out of soft time", "begin"),
)


class Author:
    """Writes one program.

    Args:
        seed: Of everything in it, task ids excepted.
        kills: Leave out what has more than one right answer where workers are killed.
    """

    def __init__(self, seed: int, *, kills: bool) -> None:
        self._chance = random.Random(seed)
        self._seed = seed
        self._ends = (*SAFE, "error", "odd error") if kills else ENDS
        self._kills = kills
        self._labels = 0
        self._left = 14
        self._second_results = False
        self.revoked: list[str] = []

    def program(self) -> dict:
        canvas = self._canvas(self._chance.choice((1, 2, 2, 3)))
        if self._may(0.3):
            self._decorate(canvas)
        how = self._chance.choice(("delay", "apply_async", "apply_async", "call", "inside", "twice", "frozen", "again"))
        if how == "again" and self._second_results:
            how = "delay"  # what is sent again some seconds later is a new run, whose success counts
        return {
            "seed": self._seed,
            "canvas": canvas,
            "how": how,
            "revoked": self.revoked,
        }

    def _may(self, share: float) -> bool:
        return self._chance.random() < share

    def _label(self) -> str:
        self._labels += 1
        return f"p{self._seed}.{self._labels}"

    def _canvas(self, depth: int, *, member: bool = False) -> dict:
        kind = self._chance.choice(("task", "chain", "group", "chord", "chord", "chain")) if depth > 0 else "task"
        if self._left <= 0:
            kind = "task"
        made = getattr(self, f"_{kind}")(depth, member=member)
        if self._may(0.08):
            made["clone"] = True
        if self._may(0.08):
            made["by json"] = True
        if kind != "task" and self._may(0.15):
            self._decorate(made)
        return made

    def _task(self, depth: int, *, member: bool = False) -> dict:
        self._left -= 1
        if self._may(0.04):
            return self._many()
        label = self._label()
        made = {"kind": "task", "name": "work", "kwargs": {"label": label}, "options": {}}
        end = self._chance.choice(self._ends)
        if member and not self._kills and self._may(0.06):
            end = "extend"
        if depth > 0 and self._left > 0 and self._may(0.12):
            end = "replace"
        self._end(made, end, depth)
        if self._may(0.25):
            made["immutable"] = True
        if self._may(0.15):
            made["options"]["priority"] = self._chance.choice((0, 3, 6, 9))
        if self._may(0.1):
            made["options"]["queue"] = "aside"
        if self._may(0.1):
            made["options"]["headers"] = {"mine": self._chance.randrange(9)}
        if self._may(0.08):
            made["options"]["countdown"] = 0.1
        if self._may(0.1):
            self._decorate(made)
        return made

    def _end(self, made: dict, end: str, depth: int) -> None:
        kwargs, options = made["kwargs"], made["options"]
        match end:
            case "retry":
                kwargs |= {"fate": "retry", "more": self._chance.choice((1, 2))}
            case "out of retries":
                kwargs |= {"fate": "retry", "more": 3}
            case "ignored":
                options["ignore_result"] = True
            case "twice":
                kwargs["fate"] = end
                self._second_results = True
            case "expired":
                options |= {"expires": 0.05, "countdown": 0.4}
            case "revoked":
                options["task_id"] = str(uuid.uuid4())
                self.revoked.append(options["task_id"])
            case "lost":
                made["name"] = "early"
                kwargs["fate"] = end
            case "out of time":
                kwargs["fate"] = end
                options["time_limit"] = 1
            case "out of soft time":
                kwargs["fate"] = end
                options["soft_time_limit"] = 1
            case "replace":
                kwargs |= {"fate": end, "more": self._canvas(depth - 1)}
            case "extend":
                kwargs |= {"fate": end, "more": self._plain()}
                kwargs["more"]["kwargs"]["fate"] = "none"
            case "begin":
                kwargs |= {"fate": end, "more": self._plain()}
            case _:
                kwargs["fate"] = end

    def _plain(self) -> dict:
        return {"kind": "task", "name": "work", "kwargs": {"label": self._label()}, "immutable": True}

    def _many(self) -> dict:
        items = [[self._chance.randrange(9), self._label()] for _ in range(self._chance.randint(1, 4))]
        items = [[a, a + 1, label] for a, label in items]
        return {
            "kind": "many",
            "how": self._chance.choice(("starmap", "chunks", "chunks task")),
            "items": items,
            "size": 2,
        }

    def _chain(self, depth: int, *, member: bool = False) -> dict:
        parts = [self._canvas(depth - 1, member=member) for _ in range(self._chance.randint(2, 3))]
        return {"kind": "chain", "by": self._chance.choice(("|", "chain")), "parts": parts}

    def _group(self, depth: int, *, member: bool = False) -> dict:
        parts = self._parts(depth, member=member)
        return {"kind": "group", "parts": parts, "generator": self._may(0.15)}

    def _chord(self, depth: int, *, member: bool = False) -> dict:
        header = self._parts(depth, member=True)
        body = self._canvas(self._chance.choice((0, 0, depth - 1)))
        return {"kind": "chord", "header": header, "body": body, "generator": self._may(0.15)}

    def _parts(self, depth: int, *, member: bool) -> list[dict]:
        size = self._chance.choice((0, 1, 1, 2, 2, 3, 3, 4) if self._may(0.2) else (1, 2, 2, 3))
        return [self._canvas(depth - 1, member=member) for _ in range(size)]

    def _decorate(self, made: dict) -> None:
        match self._chance.choice(("link", "link_error", "link_error", "link_error", "stamps")):
            case "link":
                made.setdefault("link", []).append(self._plain() | {"immutable": self._may(0.5)})
            case "link_error":
                made.setdefault("link_error", []).append(
                    {
                        "kind": "task",
                        "name": self._chance.choice(("heard", "told")),
                        "kwargs": {"label": self._label()},
                        "immutable": False,
                    }
                )
                if made["link_error"][-1]["name"] == "told" and self._may(0.4):
                    made["link_error"][-1]["immutable"] = True
            case "stamps":
                made["stamps"] = {"tenant": self._label()}
