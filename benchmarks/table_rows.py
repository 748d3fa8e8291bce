"""Turns the records of benchmark runs into the rows of the tables in README.md and docs/."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence

from benchmarks.convergence import TASKS, bound, complete_seeds, score
from benchmarks.held_out_error import WHEN, quantile
from benchmarks.lib.peer_methods import BOTH_OURS
from benchmarks.lib.results import Record
from benchmarks.peers import newest, ours_at
from fxhybrid.ir.plan import GAP_FLOOR_SHARE

Row = tuple[str, ...]
MIB = 1 << 20
LABELS = {
    "mobilenetv2": "MobileNetV2",
    "bert": "BERT",
    "gpt2": "GPT-2",
    "vit": "ViT",
    "resnet50": "ResNet-50",
    "unet": "U-Net",
    "t5": "T5",
    "mlp": "MLP",
    "gru": "GRU",
}
SUITE_LABELS = {
    "mobilenetv2": "MobileNetV2, 32 x 96 px",
    "bert": "BERT, 4 layers",
    "gpt2": "GPT-2, 6 layers",
    "vit": "ViT, 12 layers",
    "resnet50": "ResNet-50, 16 x 112 px",
    "t5": "T5 encoder-decoder",
    "gru": "GRU classifier",
}
TASK_LABELS = {
    "digits": "digits, CNN with batch norm: accuracy",
    "packages": "standard-library packages, transformer: accuracy",
    "language": "next byte of library source, transformer: loss",
}
WHEN_LABELS = dict(
    zip(
        WHEN,
        ("at the start", "after 100 training steps, same plan", "after 100 training steps, planned anew"),
        strict=True,
    )
)
SHARING_LABELS = {"all": "all tensors, as in a plan", "none": "none: each tensor keeps its own"}
OWN_ROW = 0.5  # of the limit, after training: cases below share one row


def suite_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields reach and step time of each model of which both are there."""
    parts: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        if "error" not in record and record["size"] == "full":
            parts[record["model"]][record["part"]] = record
    for model, found in parts.items():
        if {"reach", "cheap"} <= set(found):
            reach, cheap = found["reach"], found["cheap"]
            yield (
                SUITE_LABELS.get(model, LABELS.get(model, model)),
                f"{reach['eager_peak_bytes'] / MIB:.0f} MiB",
                f"{reach['minimum_bytes'] / MIB:.0f} MiB ({reach['minimum_share']:.2f})",
                f"{reach['budget_bytes'] / MIB:.1f} MiB",
                f"{reach['measured_bytes'] / MIB:.1f} MiB",
                f"{cheap['ratio']:.2f} at {cheap['share']:.2f}",
                f"{cheap['compile_s']:.0f} s",
            )


def convergence_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields one row per task of which at least two seeds are complete."""
    for name, (_, _, measure) in TASKS.items():
        seeds = complete_seeds(records, name)
        if len(seeds) < 2:
            continue
        share = max(r["fxhybrid"]["peak_bytes"] / r["float32"]["peak_bytes"] for own in seeds.values() for r in own)
        plain, ours = ([score(own, kind, measure) for own in seeds.values()] for kind in ("float32", "fxhybrid"))
        if measure == "accuracy":
            low = bound([b - a for a, b in zip(plain, ours, strict=True)])
            digits, text = 2, f"at least {low:+.2f} points"
        else:
            low = bound([1 - b / a for a, b in zip(plain, ours, strict=True)])
            digits, text = 3, f"at most {-low:+.2%}".replace("%", " %")
        means = [f"{statistics.fmean(values):.{digits}f}" for values in (plain, ours)]
        spread = f"{means[0]} ({statistics.stdev(plain):.{digits}f})"
        yield TASK_LABELS[name], f"{share:.2f}", spread, means[1], text


def held_out_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields the worst case at each time, as shares of the limits."""
    for when in WHEN:
        planned = max(r[when]["example"] / r["key"] for r in records)
        worst = max(records, key=lambda r: quantile(r[when]["held_out"]) / r["key"])
        share = quantile(worst[when]["held_out"]) / worst["key"]
        own = "" if when == "trained" else f"{planned:.2f}"  # there the planned batch is as new as the others
        yield WHEN_LABELS[when], own, f"{share:.2f} ({LABELS[worst['model']]} at {worst['key']:g})"


def held_out_case_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields the cases whose error grew most in training, and the largest of the others."""

    def shares(record: Record) -> list[float]:
        pairs = [(record[when]["example"], quantile(record[when]["held_out"])) for when in WHEN]
        return [value / record["key"] for pair in pairs for value in pair]

    found = sorted(((shares(r), r) for r in records), key=lambda item: -item[0][3])
    own = [(s, r) for s, r in found if s[3] >= OWN_ROW]
    for s, r in own:
        case = f"{LABELS[r['model']]} at {r['key']:g}"
        yield case, f"{s[0]:.2f}, {s[1]:.2f}", f"{s[3]:.2f}", f"{s[4]:.2f}, {s[5]:.2f}"
    if rest := [s for s, _ in found[len(own) :]]:
        most = [max(column) for column in zip(*rest, strict=True)]
        start, anew = (f"at most {most[i]:.2f}, {most[i + 1]:.2f}" for i in (0, 4))
        yield f"the other {len(rest)}", start, f"at most {most[3]:.2f}", anew


def peer_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields share of the peak, step time and first step of each other way, and our time at no higher a peak."""
    for r in newest(records):
        if r["method"] in BOTH_OURS or "ratio" not in r:
            continue
        ours = ours_at(r, records)
        same = f"{ours['ratio']:.2f} ({ours['gradient_error']:.0e})" if ours else "not reached"
        figures = f"{r['peak_bytes'] / r['eager_peak_bytes']:.2f}", f"{r['ratio']:.2f} ({r['gradient_error']:.0e})"
        yield LABELS[r["model"]], r["key"], *figures, f"{r['compile_s']:.0f} s", same


def overhead_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields the step time of each model where all is stored."""
    for r in records:
        yield r["model"], r["key"], f"{1e3 * r['eager_s']:.1f}", f"{r['ratio']:.3f}"


def no_rows(_: Sequence[Record]) -> Iterator[Row]:
    """Yields nothing: the table was printed by a command that is gone."""
    yield from ()


def channelwise_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields the ratios right after training and later, for the two ways to share bytes."""
    for sharing, label in SHARING_LABELS.items():
        own = [r for r in records if r["sharing"] == sharing]
        ratios = [[f"{r['ratio']:.2f}" for r in own if r["model"] == name] for name in ("resnet50", "mobilenetv2")]
        if all(ratios):
            yield (label, *map(", ".join, ratios))


def corpus_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields one row per recorded problem: MPS over ILP, both plus 0.1 % of the step, and proven gaps."""
    for model in sorted({r["model"] for r in records if r["part"] == "corpus"}):
        own = [r for r in records if r["model"] == model and r["part"] == "corpus"]
        floors = [GAP_FLOOR_SHARE * r["step_s"] for r in own]
        ratios = [(r["mps_s"] + f) / (r["added_s"] + f) for r, f in zip(own, floors, strict=True)]
        gaps = [f"{max(r[name] for r in own):.1%}".replace("%", " %") for name in ("quick_gap", "long_gap")]
        solve_s = statistics.median(r["quick_solve_s"] for r in own)
        figures = f"{statistics.geometric_mean(ratios):.3f}", f"{max(ratios):.3f}", *gaps, f"{solve_s:.1f}"
        yield LABELS[model], str(own[0]["nodes"]), f"{own[0]['frontier_s']:.1f}", *figures


def synthetic_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields the seconds of the frontier of each synthetic problem, by its length."""
    own = [r for r in records if r["part"] == "synthetic"]
    for model in dict.fromkeys(r["model"] for r in own):
        yield model, *(f"{r['frontier_s']:.1f}" for r in sorted(own, key=lambda r: r["key"]) if r["model"] == model)


def forecast_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields the shares of rounds missed and of memory used, by the length of a round."""
    by_length: dict[float, list[Record]] = defaultdict(list)
    for r in records:
        by_length[r["round_s"]].append(r)
    own = [by_length[length] for length in sorted(by_length)]
    if own:
        missed = [statistics.fmean(r["predictor"]["miss_rate"] for r in group) for group in own]
        reading = [statistics.fmean(r["reading"]["miss_rate"] for r in group) for group in own]
        fifths = [[r["four fifths"]["miss_rate"] for r in group] for group in own]
        used = [statistics.fmean(r["predictor"]["used"] for r in group) for group in own]
        yield "missed", *(f"{x:.1%}" for x in missed)
        yield "missed by the reading at the start", *(f"{x:.0%}" for x in reading)
        yield "missed by 0.8 x that, lowest and highest", *(f"{min(x):.0%}, {max(x):.0%}" for x in fifths)
        yield "share of memory used (a missed round uses none)", *(f"{x:.2f}" for x in used)


def forecast_population_rows(records: Sequence[Record]) -> Iterator[Row]:
    """Yields memory used over that of the best fixed method, the lower of the fleets, by population and length."""
    lengths = sorted({r["round_s"] for r in records})
    for name in dict.fromkeys(r["model"] for r in records):
        own = [[r["used_of_best"] for r in records if r["model"] == name and r["round_s"] == s] for s in lengths]
        yield name, *(f"{min(values):.2f}" for values in own)
