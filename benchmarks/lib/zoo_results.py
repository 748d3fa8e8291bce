"""Turns the records of the zoo into rows of docs/MODELS.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from benchmarks.lib.results import Record
from benchmarks.lib.zoo_list import ARCHITECTURES
from benchmarks.lib.zoo_trial import BREAK, FAULTS, REFUSED, WORKS

Row = tuple[str, ...]
MODEL_COLUMNS = (
    *("architecture", "trained on", "gradients at budget 1.0", "peak there", "smallest peak"),
    *("gradient error there", "seconds in all"),
)
COUNT_COLUMNS = ("family", "architectures", "one graph", "work", "refused", "several graphs", "wrong, over or crashing")
FAILURE_COLUMNS = ("architecture", "trained on", "what the error says")
PLACE = "  at "
REASON_LENGTH = 160


def result_of(record: Record) -> str:
    """Returns the verdict, and where nothing works the error's class, first line and reason."""
    if record["verdict"] == WORKS:
        shares = (record[part]["peak_bytes"] / record["eager_peak_bytes"] for part in ("lossless", "smallest"))
        return f"{WORKS}, {' and '.join(f'{share:.2f}' for share in shares)} of the unmodified peak"
    part = record.get("smallest") or record.get("lossless") or record
    if "error" not in part:
        return f"{record['verdict']}: gradient error {part['gradient_error']:.2g}, " + (
            f"{part['peak_bytes']} bytes of {part['budget_bytes']}"
        )
    return f"{record['verdict']}: {part['error']}: {reason_of(part['message'])}"


def reason_of(message: str) -> str:
    """Shortens an error's message: no paths, and the reason behind a general first line."""
    lines = [line for line in message.splitlines() if line.strip() and not line.startswith(PLACE)]
    text = " / ".join(lines[:2])
    return text if len(text) <= REASON_LENGTH else f"{text[: REASON_LENGTH - 3]}..."


def count_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields a row for each family of architectures, and their sum."""
    counts: dict[str, Counter[str]] = {}
    several: Counter[str] = Counter()
    for name, record in _listed(records):
        family = ARCHITECTURES[name].family
        counts.setdefault(family, Counter())[record["verdict"]] += 1
        several[family] += record["verdict"] == BREAK or n_graphs(record) > 1
    rows = [(found, several[family]) for family, found in counts.items()]
    rows.append((sum(counts.values(), Counter()), several.total()))
    for family, (found, n_several) in zip((*counts, "all"), rows, strict=True):
        faults = sum(found[verdict] for verdict in FAULTS)
        refused = found[REFUSED] + found[BREAK]
        cells = (found.total(), found.total() - n_several, found[WORKS], refused, n_several, faults)
        yield family, *map(str, cells)


def n_graphs(record: Record) -> int:
    """Returns how many graphs the step takes, as far as it was planned; of records from before that was noted, one."""
    return int(record.get("lossless", {}).get("graphs", 1))


def model_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields a row for each architecture that works; peaks are shares of the unmodified one."""
    for name, record in _listed(records):
        if record["verdict"] == WORKS:
            first, second, eager_bytes = record["lossless"], record["smallest"], record["eager_peak_bytes"]
            equal = "bit-equal" if first["bit_equal"] else f"{first['gradient_error']:.0e} {_why_not_equal(first)}"
            shares = (f"{part['peak_bytes'] / eager_bytes:.2f}" for part in (first, second))
            error = f"{second['gradient_error']:.3f}"
            yield name, ARCHITECTURES[name].kind, equal, *shares, error, f"{record['seconds']:.0f}"


def _why_not_equal(part: Record) -> str:
    if part.get("graphs", 1) > 1:
        return "(sums of several graphs)"
    return "(traced on the path for compiling)" if part["eager_repeats"] else "(eager differs from itself)"


def failure_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields a row for each architecture that does not work, with the error's words."""
    for name, record in _listed(records):
        if record["verdict"] != WORKS:
            yield name, ARCHITECTURES[name].kind, _escaped(result_of(record))


def _listed(records: Sequence[Record]) -> Iterator[tuple[str, Record]]:
    """The records family by family, in the order of the list; those of architectures that have left it are left out."""
    known = {record["model"]: record for record in records}
    families = dict.fromkeys(architecture.family for architecture in ARCHITECTURES.values())
    for family in families:
        yield from (
            (name, known[name]) for name in ARCHITECTURES if name in known and ARCHITECTURES[name].family == family
        )


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
