"""The client selectors: utility, and what it is compared with.

Utility of candidate i; every factor lies in [0, 1], so that no unit outweighs the others:

    score_i = data_i * memory_i * compute_i + sqrt(0.1 * ln(round) / last_seen_i)

    data     |B_i| * sqrt(mean squared sample loss)     (Oort's statistical utility), of a high quantile of all
    memory   min(M_i / M_G, 1)                          M_G: peak of the unmodified step
    compute  rank of 1 / predicted seconds of a step

Data is no rank: who has nothing left to teach must fall to nothing, however fast and large its device is.

A client must pass the hard gate first: its smallest plan fits its forecast. Clients that were never chosen are
explored for a share of the places that falls from round to round. Among the others those within ``CUTOFF`` of the
last winning score are drawn in proportion to their scores, so that a client just below it is not left out for ever.
Who took part ``REPEAT_CAP`` times more often than the average rests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fxhybrid.errors import InvalidArgument
from fxhybrid.federated.selection.candidates import Candidate, Selection, Selector

CUTOFF = 0.95
EXPLORATION, EXPLORATION_DECAY, LEAST_EXPLORATION = 0.9, 0.98, 0.2
CONFIDENCE = 0.1
REPEAT_CAP = 2.0
CLIP_QUANTILE = 0.95  # Oort: outliers in utility count as much as this quantile
DURATION_QUANTILE, PENALTY = 0.8, 2.0  # Oort: slower than this quantile of durations is penalised with this power

Factors = dict[str, float]
Floats = NDArray[np.float64]


def select_randomly(candidates: Sequence[Candidate], count: int, *, round_index: int, seed: int = 0) -> Selection:
    """Draws evenly among all candidates."""
    random = _generator(seed, round_index, count)
    factors = {c.client: {"score": 1.0} for c in candidates}
    order = random.permutation(len(candidates))[:count]
    return _selection(round_index, candidates, [candidates[i].client for i in order], factors)


def select_by_utility(candidates: Sequence[Candidate], count: int, *, round_index: int, seed: int = 0) -> Selection:
    """Multiplies data, memory and compute utility after normalising; explores and caps repeats."""
    return _bandit(seed, candidates, count, round_index, _utility_rewards, gate=True)


def select_as_oort(candidates: Sequence[Candidate], count: int, *, round_index: int, seed: int = 0) -> Selection:
    """Selects as Oort does (Lai et al., OSDI 2021): data utility, a penalty on slow clients, no look at memory.

    Who was chosen and did not answer has shown no utility. The preferred duration is a fixed quantile of the predicted
    durations; Oort's pacer, which moves it, is left out.
    """
    return _bandit(seed, candidates, count, round_index, _oort_rewards, gate=False)


SELECTORS: Mapping[str, Selector] = {
    "utility": select_by_utility,
    "random": select_randomly,
    "oort": select_as_oort,
}


def _utility_rewards(pool: Sequence[Candidate]) -> list[Factors]:
    losses = [c.mean_squared_loss for c in pool if c.mean_squared_loss is not None]
    usual = sum(losses) / len(losses) if losses else 0.0  # who did not answer may yet teach as much as others
    data = _shares_of_top([_data_utility(c, usual) for c in pool])
    memory = [_memory_share(c) for c in pool]
    compute = _ranks([1 / c.predicted_step_s for c in pool])
    return [
        {"data": float(d), "memory": float(m), "compute": float(s), "reward": float(d * m * s)}
        for d, m, s in zip(data, memory, compute, strict=True)
    ]


def _oort_rewards(pool: Sequence[Candidate]) -> list[Factors]:
    utilities = np.array([_data_utility(c, 0.0) for c in pool])
    top = float(np.quantile(utilities, CLIP_QUANTILE, method="higher"))
    low = float(utilities.min())
    finite = [c.predicted_round_s for c in pool if math.isfinite(c.predicted_round_s)]
    preferred_s = float(np.quantile(finite, DURATION_QUANTILE)) if finite else math.inf
    found = []
    for c, utility in zip(pool, utilities.tolist(), strict=True):
        data = (min(utility, top) - low) / (top - low) if top > low else 1.0
        system = min(1.0, preferred_s / c.predicted_round_s) ** PENALTY if finite else 1.0
        found.append({"data": data, "system": system, "reward": data * system})
    return found


def _bandit(
    seed: int,
    candidates: Sequence[Candidate],
    count: int,
    round_index: int,
    rewards: Callable[[Sequence[Candidate]], list[Factors]],
    *,
    gate: bool,
) -> Selection:
    """Explores, then samples above a cut-off of the highest upper confidence bounds, as Oort does."""
    random = _generator(seed, round_index, count)
    pool = [c for c in candidates if c.fits or not gate]
    known, new = [c for c in pool if not c.is_new], [c for c in pool if c.is_new]
    factors: dict[str, Factors] = {}
    if known:
        for c, own in zip(known, rewards(known), strict=True):
            bonus = _bonus(c, round_index)
            factors[c.client] = {**own, "bonus": bonus, "score": own["reward"] + bonus, "explored": 0.0}
    for c in new:
        factors[c.client] = {"explored": 1.0, "score": c.n_examples / c.predicted_round_s}
    mean_times = sum(c.times_selected for c in pool) / max(len(pool), 1)
    for c in pool:
        factors[c.client]["rested"] = float(c.times_selected > max(1.0, REPEAT_CAP * mean_times))
    n_new = _places_to_explore(random, count, round_index, len(known), len(new))
    chosen = _draw(random, [c.client for c in new], n_new, factors)
    fresh = [c.client for c in known if not factors[c.client]["rested"]]
    chosen += _draw(random, _above_cutoff(fresh, count - len(chosen), factors), count - len(chosen), factors)
    left = [c.client for c in known if c.client not in chosen]  # the cap gives way where places would stay empty
    chosen += sorted(left, key=lambda client: (-factors[client]["score"], client))[: count - len(chosen)]
    return _selection(round_index, candidates, chosen, factors)


def _places_to_explore(random: np.random.Generator, count: int, round_index: int, n_known: int, n_new: int) -> int:
    share = max(EXPLORATION * EXPLORATION_DECAY ** (round_index - 1), LEAST_EXPLORATION)
    # one place at a time is explored in that share of the choices
    return min(n_new, max(int(share * count + random.random()), count - n_known))


def _above_cutoff(clients: Sequence[str], places: int, factors: Mapping[str, Factors]) -> list[str]:
    """Lists the clients whose score is at least ``CUTOFF`` times that of the last winner."""
    order = sorted(clients, key=lambda client: (-factors[client]["score"], client))
    if places <= 0 or not order:
        return []
    last = factors[order[min(places, len(order)) - 1]]["score"]
    return [client for client in order if factors[client]["score"] >= CUTOFF * last]


def _draw(
    random: np.random.Generator, clients: Sequence[str], places: int, factors: Mapping[str, Factors]
) -> list[str]:
    """Draws ``places`` of the clients without repetition, in proportion to their scores."""
    places = min(places, len(clients))
    if places <= 0:
        return []
    weights = np.array([factors[client]["score"] for client in clients])
    weights = np.maximum(weights, 1e-9 * max(float(weights.max()), 1e-9))
    drawn = random.choice(len(clients), size=places, replace=False, p=weights / weights.sum())
    return [clients[i] for i in drawn]


def _selection(
    round_index: int, candidates: Sequence[Candidate], chosen: Sequence[str], factors: Mapping[str, Factors]
) -> Selection:
    if len({c.client for c in candidates}) != len(candidates):
        raise InvalidArgument("every candidate must be named once")
    excluded = {"fits": 0.0, "score": 0.0}
    every = {
        c.client: {
            **factors.get(c.client, excluded),
            "fits": float(c.fits),
            "available_share": _memory_share(c),
            "chosen": float(c.client in chosen),
        }
        for c in candidates
    }
    return Selection(round_index, tuple(chosen), every)


def _generator(seed: int, round_index: int, count: int) -> np.random.Generator:
    if count < 0 or round_index < 1:
        raise InvalidArgument(f"count must not be negative and rounds count from 1, got {count} and {round_index}")
    return np.random.default_rng((seed, round_index))


def _data_utility(candidate: Candidate, unknown: float) -> float:
    loss = candidate.mean_squared_loss
    return candidate.n_examples * math.sqrt(unknown if loss is None else loss)


def _shares_of_top(utilities: Sequence[float]) -> Floats:
    """Divides utilities by their ``CLIP_QUANTILE``; at most 1."""
    top = float(np.quantile(utilities, CLIP_QUANTILE, method="higher"))
    return np.minimum(np.asarray(utilities) / top, 1.0) if top > 0 else np.ones(len(utilities))


def _memory_share(candidate: Candidate) -> float:
    return min(candidate.available_bytes / candidate.full_bytes, 1.0)


def _bonus(candidate: Candidate, round_index: int) -> float:
    """Computes the width of the confidence interval: the longer unseen, the wider."""
    return math.sqrt(CONFIDENCE * math.log(round_index) / max(candidate.last_seen_round or 1, 1))


def _ranks(values: Sequence[float]) -> Floats:
    """Computes ranks in (0, 1]; equal values share the mean of their ranks."""
    array = np.asarray(values, dtype=np.float64)
    below = (array[None, :] < array[:, None]).sum(axis=1)
    equal = (array[None, :] == array[:, None]).sum(axis=1)
    return np.asarray((below + (equal + 1) / 2) / len(array))
