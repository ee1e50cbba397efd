"""What `samples` and `why` have found, in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from launcher.runs.terminal import plain_table, plain_text

MOST = 12  # keys of a record
LINES = 60  # of a file's difference


def samples_table(found: dict[str, Any]) -> Group:
    """`samples.samples`'s outcome."""
    head = f"step {found['step']}: batch {found['batch']} of epoch {found['epoch']}, "
    head += f"{found['samples']} samples on {found['world_size']} rank"
    table = plain_table("rank", "micro-batch", found["are"])
    table.columns[2].justify, table.columns[2].no_wrap = "left", False
    for one in found["ranks"]:
        for number, batch in enumerate(one["micro_batches"]):
            table.add_row(str(one["rank"]), str(number), " ".join(map(str, batch)))
        if not one["micro_batches"]:
            table.add_row(str(one["rank"]), "-", "")
    notes = [plain_text(f"note: {note}") for note in found["notes"]]
    return Group(Text(head + "s" * (found["world_size"] > 1)), table, *notes)


def why_text(found: dict[str, Any]) -> Group:
    """`why.why`'s outcome: what differs first, what may explain it, and what is not known."""
    records = found["records"]
    differs = records["first"] is not None
    parts: list[RenderableType] = []
    parts += _first(found) if differs else [Text(_no_difference(records), "bold")]
    parts += map(Text, _digests(records))
    if records["apart"]:
        parts.append(
            Text(
                f"training values of {records['apart']} steps are not compared: they are means "
                "over other steps (LOG.EVERY)"
            )
        )
    for name, keys in zip(found["runs"], records["only"], strict=True):
        parts += [plain_text(f"only in {name}: {', '.join(keys)}")] if keys else []
    if found["causes"]:
        title = (
            "what may explain it, the likeliest first" if differs else "what differs all the same"
        )
        parts.append(Text(f"\n{title}", "bold"))
    elif differs:
        parts.append(Text("\nall that is known of both is equal: none of it is why", "bold"))
    for number, cause in enumerate(found["causes"], 1):
        parts.append(plain_text(f"  {number}. {cause_line(cause)}"))
        lines = [line for hunk in cause["hunks"] for line in hunk]
        parts += [plain_text(f"       {line}") for line in lines[:LINES]]
        if len(lines) > LINES:
            parts.append(Text(f"       and {len(lines) - LINES} lines more"))
    if replayed := found.get("replay"):
        parts.append(Text("\nboth run again", "bold"))
        where, keys = replayed["where"], replayed["keys"]
        parts.append(plain_text(f"  {where or 'their steps are equal: the difference is gone'}"))
        if keys:
            parts.append(
                plain_text(f"  the smallest set of keys that explains it: {', '.join(keys)}")
            )
        elif replayed["tried"]:
            parts.append(
                plain_text(f"  of the keys none explains it: {', '.join(replayed['tried'])}")
            )
    for title, told in (
        ("differs, and cannot change bits unless the task's own code reads it", found["harmless"]),
        ("not known", found["unknown"]),
        ("no file of a run tells", found["remains"]),
        ("next", found["next"]),
    ):
        if told:
            parts.append(Text(f"\n{title}", "bold"))
        for one in told:
            parts.append(plain_text(f"  {one if isinstance(one, str) else cause_line(one)}"))
    return Group(*parts)


def _first(found: dict[str, Any]) -> list[RenderableType]:
    """The first step at which values differ, and these."""
    records = found["records"]
    known = f", equal up to step {records['before']}" if records["before"] else ""
    table = plain_table("", *found["runs"])
    shown = list(records["values"].items())
    for key, values in shown[:MOST]:
        # A null stands for what JSON has no number for.
        sides = ("nan or infinite" if value is None else str(value) for value in values)
        table.add_row(plain_text(f"  {key}"), *map(Text, sides))
    head = f"the first record that differs is of step {records['first']}{known}"
    more = [Text(f"  and {len(shown) - MOST} more")] if len(shown) > MOST else []
    return [Text(head, "bold"), table, *more]


def _no_difference(records: dict[str, Any]) -> str:
    if not records["steps"]:
        return "they have no recorded step in common: nothing can be compared"
    return (
        f"no record differs: {records['steps']} steps that both have recorded, up to step "
        f"{records['last']}"
    )


def _digests(records: dict[str, Any]) -> list[str]:
    """What the digests of the weights say."""
    lines = []
    if records["digest_equal"] is not None:
        lines.append(f"the weights are equal at step {records['digest_equal']}, by their digests")
    if records["digest_first"] is not None:
        step, (ours, theirs) = records["digest_first"]
        lines.append(f"the weights differ at step {step}, by their digests: {ours}, {theirs}")
    return lines


def cause_line(cause: dict[str, Any]) -> str:
    """A cause on one line."""
    values = cause["values"]
    told = cause["what"] + ("" if values is None else f": {' | '.join(map(_side, values))}")
    steps = cause["steps"]
    if steps:
        last = f"s {steps[0]} to {steps[1]}" if steps[0] != steps[1] else f" {steps[0]}"
        told += f" (step{last})"
    return told + (f" ({cause['note']})" if cause["note"] else "")


def _side(value: Any) -> str:
    return "-" if value is None else str(value)
