"""What all ranks have found, as one page: the same said once, and what differs named. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from launcher.debug.doctor.findings import OK, Finding, Topic, size
from launcher.debug.doctor.variables import OF_RANK

TOPIC = Topic("ranks")
CLOCK_S = 1.0


@dataclass(frozen=True)
class Told:
    """What a rank tells rank 0: `versions` must be the same on all; `facts` should be;
    `environment` are the variables that matter; `room` bytes by what they are of, told by one rank
    of each node."""

    host: str
    findings: list[Finding]
    versions: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    room: dict[str, int] = field(default_factory=dict)


def merged(told: Sequence[Told]) -> list[tuple[Finding, list[int]]]:
    """Each finding once, with the ranks that have made it. Of what is ok and differs between ranks
    only the first rank's: what matters of that is named by `differences`."""
    ranks: dict[Finding, list[int]] = {}
    for rank, one in enumerate(told):
        for finding in one.findings:
            ranks.setdefault(finding, []).append(rank)
    seen, found = set(), []
    for finding, those in ranks.items():
        what = finding.topic, finding.name
        if finding.state != OK or what not in seen:
            found.append((finding, those))
            seen.add(what)
    return found


def differences(told: Sequence[Told]) -> Iterator[Finding]:
    """What is not the same on all ranks."""
    for name in told[0].versions:
        if groups := _differ(told, [one.versions.get(name, "") for one in told]):
            yield TOPIC.problem(
                name, groups, "install the same on all nodes: a run refuses to start otherwise"
            )
    for name in told[0].facts:
        if groups := _differ(told, [one.facts.get(name, "") for one in told]):
            remedy = "the slowest rank sets the pace: ask for nodes of one kind, with equal shares"
            yield TOPIC.warning(name, groups, remedy)
    for name in sorted({name for one in told for name in one.environment}):
        if groups := _differ(told, [one.environment.get(name, "not set") for one in told]):
            if name in OF_RANK:
                yield TOPIC.ok(name, groups)
            else:
                remedy = "set it alike on all nodes, or nowhere (srun --export, torchrun's own env)"
                yield TOPIC.warning(name, groups, remedy)
    for name in told[0].room:
        rooms = {one.host: one.room[name] for one in told if name in one.room}
        least, most = min(rooms, key=lambda h: rooms[h]), max(rooms, key=lambda h: rooms[h])
        if rooms[least] < rooms[most] / 2:
            yield TOPIC.warning(
                name,
                f"{size(rooms[least])} on {least}, {size(rooms[most])} on {most}",
                f"the least counts for all: free some on {least}, or leave that node out",
            )
    if len(told) > 1:
        yield TOPIC.ok("compared", f"{len(told)} ranks, on {_hosts(told)}")


def clocks(told: Sequence[Told], offsets: Sequence[float]) -> Iterator[Finding]:
    """Clocks that are more than a second apart, one a host."""
    hosts: dict[str, float] = {}
    for one, offset in zip(told, offsets, strict=True):
        hosts.setdefault(one.host, offset)
    for host, offset in hosts.items():
        if abs(offset) > CLOCK_S:
            yield TOPIC.warning(
                "clock",
                f"that of {host} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} "
                f"that of {told[0].host}: times in logs and records do not fit together",
                "have both ask a time server (NTP: timedatectl set-ntp true)",
            )


def _differ(told: Sequence[Told], values: Sequence[str]) -> str:
    """Who has which value, in words; "" where all have the same."""
    if len(set(values)) == 1:
        return ""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return "; ".join(
        f"{value or 'none'} on {named(ranks)} ({_hosts(told[rank] for rank in ranks)})"
        for value, ranks in groups.items()
    )


def _hosts(told: Iterable[Told]) -> str:
    return ", ".join(dict.fromkeys(one.host for one in told))


def named(ranks: Sequence[int]) -> str:
    """Ranks in words: "rank 3", "ranks 0-3, 6"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][-1] == rank - 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    text = ", ".join("-".join(map(str, span)) for span in spans)
    return f"rank{'s' * (len(ranks) > 1)} {text}"
