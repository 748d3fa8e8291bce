"""Runs the core tests under other releases of torch and Python, each in an environment of its own.

    python -m benchmarks.torch_versions --pythons ENVIRONMENT/bin/python --versions 2.14.1 --json FILE

Environments of releases of torch are made, for the Python that runs this, which downloads gigabytes of CUDA libraries.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.lib.common import wide_console
from benchmarks.lib.results import Record, append_record

MINUTES = 30
NEEDS = "downloads of torch"
ROOT = Path(__file__).parents[1]
CORE = (
    *("absent_tangents", "accumulation", "capture_errors", "changing_floats", "channels_last", "continuations"),
    *("contract_bad_input", "contract_calls", "contract_models", "contract_recurrent", "contract_training"),
    *("contract_wrapper", "double_backward", "end_to_end", "expected_backward", "explain", "fuzz_faults", "in_place"),
    *("kernel_layouts", "loss_heads", "measure", "new_paths", "operators", "optimizer_step", "outer_context", "passes"),
    *("pending_calls", "pending_room", "plan_cache", "python_state", "recording", "resized_calls", "schedule"),
    *("several_graphs", "simulator", "step_in_backward", "symbolic", "torch_internals"),
)
QUICK = "addopts=-m 'not slow and not fuzz and not gpu'"
COUNTED = re.compile(r"(\d+) (passed|failed|error|skipped)")


def main(argv: Sequence[str] | None = None) -> None:
    """Tests each release in turn."""
    parser = argparse.ArgumentParser("python -m benchmarks.torch_versions", description=__doc__)
    parser.add_argument("--pythons", default="", help="interpreters of environments with the test extra, with commas")
    parser.add_argument("--versions", default="", help="releases of torch to make environments of, with commas")
    parser.add_argument("--json", type=Path, help="append records to this file")
    arguments = parser.parse_args(argv)
    made = (environment(version) for version in arguments.versions.split(",") if version)
    for python in (*map(Path, filter(None, arguments.pythons.split(","))), *made):
        record = run_tests(python)
        append_record(arguments.json, record)
        wide_console().print(record)


def environment(version: str) -> Path:
    """Returns the Python of an environment with one release of torch; made where it does not exist."""
    folder = Path(tempfile.gettempdir(), f"fxhybrid-torch-{version}-python-{platform.python_version()}")
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        command = [str(python), "-m", "pip", "install", "-q", f"torch=={version}", "-e", f"{ROOT}[test]"]
        subprocess.run(command, check=True)
    return python


def run_tests(python: Path) -> Record:
    """Runs the core tests; counts what passed, and names what failed."""
    files = [f"tests/test_{name}.py" for name in CORE]
    options = ("-n", "auto", "--dist", "loadfile", "-p", "no:cacheprovider", "-o", QUICK)
    with tempfile.TemporaryDirectory() as cache:
        variables = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": cache}
        command = [str(python), "-m", "pytest", *options, *files]
        run = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if run.returncode not in (0, 1):  # tests ran, whether or not all passed
        sys.exit(run.stdout[-3000:] + run.stderr[-3000:])
    counts = {name: int(count) for count, name in COUNTED.findall(run.stdout.splitlines()[-1])}
    failed = [line.split(" ")[1] for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {"part": "versions", "key": versions_of(python), "passed": counts.get("passed", 0), "failed": failed}


def versions_of(python: Path) -> str:
    """Says what an environment runs."""
    code = "import platform, torch; print(f'torch {torch.__version__}, Python {platform.python_version()}')"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def rows(records: Sequence[Record]) -> Iterator[tuple[str, str, str]]:
    """Makes a row for each environment."""
    for record in records:
        failed = ", ".join(f"`{name}`" for name in record["failed"]) or "none"
        yield str(record["key"]), str(record["passed"]), failed


if __name__ == "__main__":
    main()
