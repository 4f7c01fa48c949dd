"""
pytest runs the experiments: the `bench` fixture, the `experiment` marker, the verdicts.

Every test with the marker becomes one item per kernel. Each gets a bench whose kernel no
other experiment has touched; afterwards it is judged: FAIL if the module is wrong, CRASH if
the kernel died, ERROR if the bench is at fault, SKIP if the bench lacks a capability.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pilab.bench import Bench
from pilab.errors import UnknownNameError
from pilab.events import Verdict
from pilab.experiment import Experiment, experiment, experiment_of
from pilab.ports import Capability
from pilab.session import BenchPool, die_with_parent
from pilab.store.kernels import SERIES
from pilab.trial import Trial

__all__ = ["Bench", "Capability", "experiment"]

TRIAL = pytest.StashKey[Trial]()
POOL = pytest.StashKey[BenchPool]()


@dataclass(frozen=True)
class Variant:
    """
    One way to run an experiment.

    Args:
        kernel: Series of the kernel.
        mutant: Name of the mutant to run in the module's place; "" for the module itself.
        source_dir: The mutant's folder.
    """

    kernel: str
    mutant: str = ""
    source_dir: str = ""

    @property
    def id(self) -> str:
        """ "6.12" or "6.12-led_never_output"."""
        return f"{self.kernel}-{self.mutant}" if self.mutant else self.kernel


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options; `pytest --help` shows them under "pilab"."""
    group = parser.getgroup("pilab", "experiments on a bench")
    group.addoption("--bench", default="virt", metavar="NAME", help="bench name or bench file")
    group.addoption(
        "--kernel", default="6.1", metavar="V", help="kernel series, comma list, or 'all'"
    )
    group.addoption(
        "--pilab-run", metavar="DIR", help="write events.jsonl and console logs to this folder"
    )
    group.addoption("--pilab-select", metavar="NAMES", help="experiments to run, comma list")
    group.addoption("--pilab-list", metavar="FILE", help="write the experiments as JSON")
    group.addoption(
        "--pilab-mutant-plan", metavar="FILE", help="run these mutants instead of the modules"
    )
    group.addoption("--kmod", metavar="DIR", help="folder of the modules (default: kmod/)")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and end with the process that started us."""
    config.addinivalue_line("markers", "experiment(spec): an experiment of the curriculum")
    if hasattr(config, "workerinput"):
        die_with_parent()
    config.stash[POOL] = BenchPool(
        bench=config.getoption("--bench"),
        kmod=_path(config.getoption("--kmod")),
        run=_path(config.getoption("--pilab-run")),
        worker=os.environ.get("PYTEST_XDIST_WORKER", ""),
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close the benches."""
    if (pool := config.stash.get(POOL, None)) is not None:
        pool.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one item per kernel (and mutant) of every experiment."""
    spec = experiment_of(metafunc.definition)
    if spec is None or "bench" not in metafunc.fixturenames:
        return
    variants = _variants(metafunc.config, spec)
    metafunc.parametrize("bench", variants, indirect=True, ids=[v.id for v in variants])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what was selected; kernels one after the other, so that benches change rarely."""
    specs = {item: experiment_of(item) for item in items}
    if (listing := config.getoption("--pilab-list")) is not None:
        _write_list(Path(listing), [spec for spec in specs.values() if spec is not None])
    selection = config.getoption("--pilab-select")
    if selection:
        wanted = selection.split(",")
        known = sorted({spec.name for spec in specs.values() if spec is not None})
        for name in wanted:
            if name not in known:
                raise pytest.UsageError(str(UnknownNameError("experiment", name, known)))
        dropped = [i for i in items if (s := specs[i]) is None or s.name not in wanted]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]
    items.sort(key=_kernel_order)


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Bench:
    """A live bench with a pristine kernel, for a test that is an experiment."""
    variant: Variant = request.param
    spec = experiment_of(request.node)
    assert spec is not None, "the bench fixture belongs to experiments"
    trial = Trial(spec, variant.kernel, variant.mutant)
    request.node.stash[TRIAL] = trial
    sources = {spec.module: Path(variant.source_dir)} if variant.source_dir else {}
    live = request.config.stash[POOL].bench(variant.kernel)
    trial.begin(live, sources)
    if missing := [need for need in spec.needs if need not in live.capabilities]:
        pytest.skip(f"bench {live.name} lacks {', '.join(missing)}")
    return live


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """Judge an experiment as soon as it has ended, one way or the other."""
    report: pytest.TestReport = yield
    trial = item.stash.get(TRIAL, None)
    spec = experiment_of(item)
    if spec is None or call.when == "teardown" or (call.when == "setup" and report.passed):
        return report
    if trial is None:  # not even a bench could be opened: the fixture did not get that far
        variant: Variant = item.callspec.params["bench"]  # type: ignore[attr-defined]
        trial = Trial(spec, variant.kernel, variant.mutant)
    pool = item.config.stash[POOL]
    verdict = trial.judge(None if call.excinfo is None else call.excinfo.value, pool.recorder)
    if verdict.verdict is Verdict.ERROR:
        pool.distrust(trial.kernel)
    _shape(report, trial)
    return report


def _shape(report: pytest.TestReport, trial: Trial) -> None:
    """Let pytest's own outcome and text say what the verdict says."""
    verdict = trial.verdict
    assert verdict is not None
    report.user_properties += [
        ("experiment", trial.label),
        ("kernel", trial.kernel),
        ("verdict", str(verdict.verdict)),
        ("reason", verdict.reason),
    ]
    if verdict.verdict in (Verdict.PASS, Verdict.SKIP):
        return
    report.outcome = "failed"
    if verdict.verdict is Verdict.ERROR:
        # pytest and JUnit call a failure outside the call phase an error, which it is.
        report.when = "setup"
    report.longrepr = f"{verdict.verdict}: {verdict.reason}\n{trial.explanation}".rstrip()
    report.sections.append(("timeline", trial.story()))


def _variants(config: pytest.Config, spec: Experiment) -> list[Variant]:
    kernels = kernel_series(config.getoption("--kernel"))
    plan = config.getoption("--pilab-mutant-plan")
    if plan is None:
        return [Variant(kernel) for kernel in kernels]
    entries = json.loads(Path(plan).read_text())
    return [
        Variant(kernel, entry["mutant"], entry["source_dir"])
        for entry in entries
        if entry["experiment"] == spec.name
        for kernel in kernels
        if kernel in entry.get("kernels", kernels)
    ]


def kernel_series(text: str) -> list[str]:
    """
    Return the kernel series that a person named: "6.1", "6.1,6.12" or "all".

    Raises:
        UsageError: There is no such kernel.
    """
    known = list(SERIES)
    if text == "all":
        return known
    for name in text.split(","):
        if name not in known:
            raise pytest.UsageError(str(UnknownNameError("kernel", name, known)))
    return text.split(",")


def _kernel_order(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    variant = callspec.params.get("bench") if callspec is not None else None
    return variant.kernel if isinstance(variant, Variant) else ""


def _write_list(file: Path, specs: list[Experiment]) -> None:
    unique = {spec.name: spec for spec in specs}
    rows = [
        {
            "name": spec.name,
            "chapter": spec.chapter,
            "topic": spec.topic,
            "module": spec.module,
            "needs": [str(need) for need in spec.needs],
            "destructive": spec.destructive,
        }
        for spec in unique.values()
    ]
    file.write_text(json.dumps(rows, indent=1))


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
