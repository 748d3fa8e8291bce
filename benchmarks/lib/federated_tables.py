"""Rows of the tables on federated runs: times to accuracies, models of failure, asynchronous rounds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence

from benchmarks.federated import ASSUMED, BUFFERED, GRID, MAIN, SWAP, TARGETS
from benchmarks.lib.results import Record
from fxhybrid.federated.protocol.messages import DEATHS, Outcome
from fxhybrid.federated.server.policies import ASYNC
from fxhybrid.federated.simulation.failures import FAILURES

Row = tuple[str, ...]
NEVER = "never"
TIME_COLUMNS = (
    *("population", "policy", *(f"to {target:.0%}, min" for target in TARGETS)),
    *("mean over 2 h", "at 2 h", "deaths"),
)
FAILURE_COLUMNS = ("population", "policy", *(f"to 80 %, {name}" for name in FAILURES), "swapping, heartbeat")
RATIO_COLUMNS = ("population", "sooner than", *(f"at {target:.0%}" for target in TARGETS), "points ahead at 2 h")

Cell = dict[str, dict[int, Record]]  # runs of one population, by policy and seed
Pair = tuple[Record, Record]


def time_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields minutes to each target, accuracies and deaths of every policy in every population."""
    for name, cell in _cells(records).items():
        for policy in (p for p in (*MAIN, *BUFFERED) if p in cell):
            own = list(cell[policy].values())
            times = (_minutes([run["reached_s"][ASSUMED][i] for run in own]) for i in range(len(TARGETS)))
            yield (name, f"`{policy}`", *times, _percent(own, "mean"), _percent(own, "end"), _deaths(own))


def failure_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields minutes to 80 % under each model of failure in the first population, and where devices swap."""
    place, cells, first = TARGETS.index(0.8), _cells(records), next(iter(GRID))
    for name in (f"phones-{first}", first):
        cell, swapping = cells.get(name, {}), cells.get(name + SWAP, {})
        for policy in (p for p in MAIN if p in cell):
            own = cell[policy].values()
            times = (_minutes([run["reached_s"][model][place] for run in own]) for model in FAILURES)
            swapped = [run["reached_s"][ASSUMED][place] for run in swapping.get(policy, {}).values()]
            yield name, f"`{policy}`", *times, _minutes(swapped)


def ratio_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields how many times sooner fxhybrid is than the others, and how far ahead at the end."""
    yield from _ratio_rows(records, [("fxhybrid", other) for other in MAIN if other != "fxhybrid"])


def buffered_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields how many times sooner asynchronous rounds are than synchronous ones of the same policy, then over all."""
    pairs = [(policy, policy.removesuffix(ASYNC)) for policy in BUFFERED]
    yield from _ratio_rows(records, pairs)
    cells = _cells(records).values()
    for policy, other in pairs:
        yield from _ratio_row("all", other, [both for cell in cells for both in _both(cell, policy, other)])


def among_buffered_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields how many times sooner asynchronous rounds of fxhybrid are than the others', in the first population."""
    first = next(iter(GRID))
    own, *others = BUFFERED
    yield from _ratio_rows([r for r in records if r["cell"] == first], [(own, other) for other in others])


def _ratio_rows(records: Sequence[Record], pairs: Sequence[tuple[str, str]]) -> Iterator[Row]:
    for name, cell in _cells(records).items():
        for policy, other in pairs:
            yield from _ratio_row(name, other, _both(cell, policy, other))


def _both(cell: Cell, policy: str, other: str) -> list[Pair]:
    """Returns the runs of two policies with the same seed."""
    mine, theirs = cell.get(policy, {}), cell.get(other, {})
    return [(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]


def _ratio_row(name: str, other: str, both: Sequence[Pair]) -> Iterator[Row]:
    if both:
        ahead = [100 * (run["end"] - against["end"]) for run, against in both]
        ratios = (_ratio(both, i) for i in range(len(TARGETS)))
        yield name, f"`{other}`", *ratios, _spread(ahead)


def _cells(records: Sequence[Record]) -> dict[str, Cell]:
    """Groups runs by population, in the order of the grid, phones first."""
    found: dict[str, Cell] = defaultdict(lambda: defaultdict(dict))
    order = [f"{prefix}{cell}{end}" for cell in GRID for prefix in ("phones-", "") for end in ("", SWAP)]
    for record in records:
        name = ("phones-" if record["task"] == "phones" else "") + record["cell"]
        found[name][record["policy"]][record["seed"]] = record
    return {name: found[name] for name in order if name in found}


def _minutes(times_s: Sequence[float | None]) -> str:
    """Returns the mean of those that got there, and how many did if not all."""
    if not times_s:
        return "-"
    reached = [s / 60 for s in times_s if s is not None]
    if not reached:
        return NEVER
    mean = f"{statistics.fmean(reached):.0f}"
    return mean if len(reached) == len(times_s) else f"{mean} ({len(reached)} of {len(times_s)})"


def _ratio(both: Sequence[Pair], place: int) -> str:
    """Returns the mean ratio of times, its spread, and of how many seeds if not all.

    Where one of the two never got there it counts with its whole run. The mark is ">" where that is the other, so that
    the ratio is at least so large, "<" where it is the policy itself, and "~" where there are both.
    """
    times = [[run["reached_s"][ASSUMED][place] for run in pair] for pair in both]
    ends_s = [[3600 * run["hours"] for run in pair] for pair in both]
    known = [(pair, ends) for pair, ends in zip(times, ends_s, strict=True) if any(pair)]
    if not any(own_s for (own_s, _), _ in known):
        return "slower" if known else NEVER
    later, sooner = (sum(pair[i] is None for pair, _ in known) for i in (0, 1))
    mark = "~ " if later and sooner else "< " if later else "> " if sooner else ""
    ratios = [(other_s or other_end_s) / (own_s or own_end_s) for (own_s, other_s), (own_end_s, other_end_s) in known]
    seeds = "" if len(known) == len(both) else f", {len(known)} of {len(both)}"
    return f"{mark}{_spread(ratios)}{seeds}"


def _spread(values: Sequence[float]) -> str:
    mean, low, high = statistics.fmean(values), min(values), max(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({low:.1f}, {high:.1f})"


def _percent(runs: Sequence[Record], name: str) -> str:
    return f"{100 * statistics.fmean(run[name] for run in runs):.1f}"


def _deaths(runs: Sequence[Record]) -> str:
    """Returns the share of deaths by memory among all that was heard of devices."""
    outcomes = [run["outcomes"] for run in runs]
    heard = sum(n for own in outcomes for outcome, n in own.items() if outcome != Outcome.UNUSED.value)
    deaths = sum(own.get(death.value, 0) for own in outcomes for death in DEATHS)
    return f"{deaths / heard:.1%}"
