"""Profile: seconds and allocator rise of every operator call of a graph, measured on this device.

Each distinct call (operator, shapes, strides, dtypes, constants) runs alone a few times on synthetic inputs; the
smallest time counts, since noise only ever adds. All calls are gone through twice, so that a busy moment of the
machine does not make some of them look slow; two runs of long ones are enough. The processor's caches are full of other
data by then, as they are in a step: on cached inputs every call bound by memory, codecs and masks first of all, looks
cheaper than it is. Filling a large cache takes longer than most calls, so it is done once for a batch of them. Results
are kept on disk per processor, thread count, torch version and flags.
"""

from __future__ import annotations

import contextlib
import glob
import math
import platform
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxhybrid.codecs.kernels.cache_folder import cache_folder
from fxhybrid.console import progress_bar
from fxhybrid.errors import ProfileError
from fxhybrid.profiling.cost_cache import OpCost, cost_path, read_costs, write_costs
from fxhybrid.profiling.cost_estimate import estimate_cost
from fxhybrid.profiling.recording import Recording, recording, run_recordable
from fxhybrid.profiling.state_bytes import storage_bytes
from fxhybrid.profiling.synthetic_inputs import synthetic_arguments
from fxhybrid.torch_internals import tree_leaves

ROUNDS = 2  # over all calls
FEWEST_RUNS, MOST_RUNS = 2, 4  # of a call, in each round
LONG_S = 0.03  # calls that take longer run once in each round: of them, less is noise
LEAST_S = 0.01  # calls faster than this run more often: their smallest time is what noise has not touched
CACHE_FILES = "/sys/devices/system/cpu/cpu0/cache/index*/size"
USUAL_CACHE_BYTES = 8 * 2**20  # where the system does not say


@dataclass(frozen=True)
class Call:
    """An operator call without its data: equal calls cost the same.

    Attributes:
        key: the call as text.
        target: the operator.
        args: arguments, with fake tensors standing for the real ones.
        kwargs: keyword arguments.
    """

    key: str
    target: Any = field(compare=False, hash=False)
    args: tuple[Any, ...] = field(compare=False, hash=False)
    kwargs: Mapping[str, Any] = field(compare=False, hash=False)


@dataclass(frozen=True)
class Profile:
    """Measured costs by call key, and the device that they were measured on."""

    device: str
    costs: Mapping[str, OpCost]

    def cost(self, call: Call) -> OpCost:
        """The cost of ``call``.

        Raises:
            ProfileError: the call was not profiled.
        """
        if call.key not in self.costs:
            raise ProfileError(f"no cost is known for {call.key}")
        return self.costs[call.key]

    @property
    def estimated(self) -> list[str]:
        """Calls whose costs are estimated, as text."""
        return [key for key, cost in self.costs.items() if cost.estimated]

    def __str__(self) -> str:
        estimated = f", {len(self.estimated)} of them estimated" if self.estimated else ""
        return f"Profile: {len(self.costs)} calls on {self.device}{estimated}"


def call_of(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Call:
    """The call with fake tensors (or fx nodes carrying them) as arguments."""

    def value(argument: Any) -> Any:
        return argument.meta["val"] if isinstance(argument, fx.Node) else argument

    plain_args: Any = fx.node.map_aggregate(args, value)
    plain_kwargs: Any = fx.node.map_aggregate(dict(kwargs or {}), value)
    return Call(f"{target}{_text(plain_args)}{_text(plain_kwargs)}", target, plain_args, plain_kwargs)


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{','.join(map(str, value.shape))}|{','.join(map(str, value.stride()))}]{value.device.type}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, Mapping):
        return f"({', '.join(f'{k}={_text(v)}' for k, v in value.items())})" if value else ""
    return repr(value)


def device_key() -> str:
    """What a measured time depends on besides the call: processor, threads, torch version, flags."""
    flags = (
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
    )
    return f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {flags}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def profile_calls(calls: Iterable[Call], *, cache_dir: Path | None = None) -> Profile:
    """Measures every distinct call that the cache does not know yet.

    Args:
        calls: the operator calls of a graph.
        cache_dir: where to keep results; ``None`` is ``$XDG_CACHE_HOME/fxhybrid``.

    Raises:
        ProfileError: a call fails that ran before, or memory does not suffice for it.
    """
    device = device_key()
    folder = cache_dir or cache_folder()
    path = None if folder is None else cost_path(device, folder)
    costs = {} if path is None else read_costs(path)
    missing = list({call.key: call for call in calls if call.key not in costs}.values())
    if missing:
        with progress_bar() as bar:
            calls = bar.track(missing * ROUNDS, description="profiling operators")
            costs.update(run_recordable(partial(_measure, calls)))
        if path is not None:
            write_costs(path, costs)
    return Profile(device, costs)


def measure_alloc_peaks(calls: Iterable[Call]) -> dict[str, int]:
    """Runs each distinct call, and returns the bytes that it has allocated at most, by key; times nothing.

    Calls that take no synthetic inputs are estimated, as ``profile_calls`` does.

    Raises:
        ProfileError: a call fails that ran before, or memory does not suffice for it.
    """
    distinct = list({call.key: call for call in calls}.values())
    return run_recordable(partial(_alloc_peaks, distinct)) if distinct else {}


def _alloc_peaks(calls: Sequence[Call]) -> dict[str, int]:
    refused: dict[str, Call] = {}
    ran: list[str] = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]), recording() as recorded:
        torch.manual_seed(0)
        for trials in _batches(calls, 0, refused, {}):
            for trial in trials:
                trial.run(recorded)
                ran.append(trial.call.key)
    found = {key: recorded.peak_rise_bytes(2 * i + 1) for i, key in enumerate(ran)}
    return found | {key: _estimated(call).alloc_peak_bytes for key, call in refused.items()}


def _measure(calls: Iterable[Call]) -> dict[str, OpCost]:
    """Runs each call on synthetic inputs: smallest time of a few runs, and the allocator's rise.

    Args:
        calls: the distinct calls, several times over.
    """
    seconds: dict[str, float] = {}
    refused: dict[str, Call] = {}
    other_data = torch.zeros(cache_bytes() // 4 + 1)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), recording() as recorded:
        torch.manual_seed(0)
        for trials in _batches(calls, cache_bytes(), refused, seconds):
            _time(trials, recorded, other_data)
            for trial in trials:
                key = trial.call.key
                seconds[key] = min(trial.best_s, seconds.get(key, math.inf))
    # segments: before the first mark, call 0, between, call 1, between ...
    rises = (recorded.peak_rise_bytes(2 * i + 1) for i in range(len(seconds)))
    costs = {key: OpCost(s, rise) for (key, s), rise in zip(seconds.items(), rises, strict=True)}
    estimates = {key: _estimated(call) for key, call in refused.items() if key not in costs}
    return costs | estimates


def _estimated(call: Call) -> OpCost:
    with torch.no_grad():
        return OpCost(*estimate_cost(call.target, call.args, call.kwargs), estimated=True)


class _Trial:
    """A call with synthetic inputs, and how long it took so far."""

    def __init__(self, call: Call, *, is_ready: bool) -> None:
        """Makes the inputs and, unless it is ready, runs the call once: kernels are chosen at the first run."""
        self.call = call
        self.best_s, self.spent_s, self.runs = math.inf, 0.0, 0
        self.args, self.kwargs = synthetic_arguments(call.target, call.args, call.kwargs)
        if not is_ready:
            call.target(*self.args, **self.kwargs)

    @property
    def wanted(self) -> bool:
        """Whether another run would tell more."""
        fewest = FEWEST_RUNS if self.best_s < LONG_S else 1
        return self.runs < fewest or (self.spent_s < LEAST_S and self.runs < MOST_RUNS)

    def run(self, recorded: Recording) -> None:
        """One timed run; the first is recorded."""
        if self.runs == 0:
            recorded.mark()
        start = time.perf_counter()
        with _as_profile_error(self.call):
            result = self.call.target(*self.args, **self.kwargs)
        seconds = time.perf_counter() - start
        if self.runs == 0:
            recorded.mark()
        del result
        self.best_s, self.spent_s, self.runs = min(self.best_s, seconds), self.spent_s + seconds, self.runs + 1


@contextlib.contextmanager
def _as_profile_error(call: Call) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProfileError(f"cannot measure {call.key}: {error}") from error


def _batches(
    calls: Iterable[Call], room_bytes: int, refused: dict[str, Call], seconds: Mapping[str, float]
) -> Iterator[list[_Trial]]:
    """Yields calls whose inputs take ``room_bytes`` together: they are there at the same time.

    Calls that refuse synthetic inputs are put into ``refused``. Long ones of known ``seconds`` are ready at once.
    """
    trials: list[_Trial] = []
    taken_bytes = 0
    for call in calls:
        if call.key in refused:
            continue
        try:
            trials.append(_Trial(call, is_ready=seconds.get(call.key, 0.0) >= LONG_S))
        except MemoryError:
            raise
        except Exception as error:
            if "allocate" in str(error):
                raise ProfileError(f"memory does not suffice to measure {call.key}: {error}") from error
            refused[call.key] = call
            continue
        tensors = tree_leaves((trials[-1].args, trials[-1].kwargs))
        taken_bytes += storage_bytes(x for x in tensors if isinstance(x, torch.Tensor))
        if taken_bytes >= room_bytes:
            yield trials
            trials.clear()  # before the next inputs are made
            taken_bytes = 0
    if trials:
        yield trials


def _time(trials: Sequence[_Trial], recorded: Recording, other_data: torch.Tensor) -> None:
    """Runs all trials in turn until none is wanted, the caches filled with other data before each turn."""
    while wanted := [trial for trial in trials if trial.wanted]:
        other_data.add_(1)
        for trial in wanted:
            trial.run(recorded)


def cache_bytes() -> int:
    """Size of the processor's largest cache, in bytes."""
    sizes = [USUAL_CACHE_BYTES]
    for path in glob.glob(CACHE_FILES):
        found = re.fullmatch(r"(\d+)([KM]?)", Path(path).read_text(encoding="ascii").strip())
        if found:
            sizes.append(int(found[1]) * {"": 1, "K": 2**10, "M": 2**20}[found[2]])
    return max(sizes)
