"""The launches: each starts its processes once, and every test that asks for a job of it reads the same files."""

import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import plain, plain_weights
from tests.distributed.jobs import CTPD_BETA, LAYOUTS, NUM_STEPS, OPTIM, VARIANTS, layout_jobs
from tests.distributed.launch import launch
from tests.distributed.resume_jobs import continued_jobs, cut_jobs, stored_jobs
from tests.distributed.world import GLOBAL_BATCH, build_world


class Launches:
    """Launches by name, started when first asked for."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.outcomes: dict[str, str | None] = {}

    def layout(self, name: str) -> Path:
        """The folder of the jobs of a layout."""
        layout = LAYOUTS[name]
        self.run_layouts(layout.processes, layout.slow)
        return self.home / name

    def run_layouts(self, processes: int, slow: bool = False) -> None:
        """Run all layouts of so many processes, and but for the slow ones the first part of what is resumed."""
        if processes > 1:
            self.run_layouts(1)
        jobs = [
            job
            for name, layout in LAYOUTS.items()
            if (layout.processes, layout.slow) == (processes, slow)
            for job in layout_jobs(self.home, name)
        ]
        if not slow and processes < 4:
            jobs += stored_jobs(self.home, processes) + cut_jobs(self.home, processes)
        # The last job of the process that is alone kills it, but for the slow ones.
        status = -signal.SIGKILL if processes == 1 and not slow else 0
        self.run(f"layouts-{processes}" + "-slow" * slow, processes, lambda: jobs, status)

    def run_continued(self, processes: int) -> None:
        """Go on, in fresh processes, with what was cut off."""
        self.run_layouts(2)
        self.run(f"continued-{processes}", processes, lambda: continued_jobs(self.home, processes))

    def run(self, name: str, processes: int, make_jobs: Callable[[], list[dict[str, Any]]], status: int = 0) -> None:
        """Run jobs once; ``status`` is the exit status that is right."""
        if name not in self.outcomes:
            file = self.home / f"{name}.json"
            file.write_text(json.dumps(make_jobs()))
            self.outcomes[name] = "did not end"
            found, log = launch(processes, file)
            self.outcomes[name] = None if found == status else f"{name}: exit status {found}, not {status}\n{log}"
        if self.outcomes[name]:
            pytest.fail(str(self.outcomes[name]), pytrace=False)


@pytest.fixture(scope="session")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    home = tmp_path_factory.mktemp("distributed")
    build_world(home)
    return Launches(home)


@pytest.fixture(scope="session")
def plain_run(launches: Launches) -> Callable[[str], plain.Trained]:
    """``plain_run(method)`` trains by plain PyTorch, once."""
    home, done = launches.home, {}
    folders = {name: home / name for name in ("student", "teacher")}

    def ctpd(weights: str = "contrastive_teacher", reference_model: str = "teacher") -> plain.Method:
        return plain.Method(
            folders["student"],
            folders["teacher"],
            partial(plain_weights.weights, weights, home),
            at_policy=reference_model == "student",
            beta=CTPD_BETA,
        )

    methods = {
        "sft": lambda: plain.Method(folders["teacher"]),
        "dpo": lambda: plain.Method(folders["student"], folders["student"]),
        "dpo_reverse": lambda: plain.Method(folders["teacher"], folders["teacher"], beta=0.3, reverse=True),
        "ctpd": ctpd,
        **{name: partial(ctpd, **values) for name, values in VARIANTS.items()},
        "tis_dpo": lambda: plain.Method(
            folders["student"], folders["student"], partial(plain_weights.token_weights, home), beta=CTPD_BETA
        ),
        "same": lambda: plain.Method(folders["student"], folders["student"], beta=CTPD_BETA),
    }

    def trained(name: str) -> plain.Trained:
        name = "ctpd" if name == "online" else name.removesuffix("-online").removesuffix("-cached")
        if name not in done:
            done[name] = plain.train(methods[name](), home / "pairs.jsonl", GLOBAL_BATCH, OPTIM, NUM_STEPS)
        return done[name]

    return trained
