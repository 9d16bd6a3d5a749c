"""Seeds side by side, each in a process of one thread: on two cores two of them are done in the time of one."""

import logging
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from omegaconf import OmegaConf

from ctpd_nemo.parallel.children import end_with_parent
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.reproduce.config import StudentEvaluation, WorldConfig


def run_seeds(
    recipe: Any, world: WorldConfig, asked: StudentEvaluation, seeds: Sequence[int], students: Sequence[str], count: int
) -> list[dict[str, Any]]:
    """What ``run_seed`` returns for each seed.

    Args:
        recipe: Config of the pipeline.
        world: Of ``run_seed``, as are ``asked`` and ``students``.
        asked: Likewise.
        seeds: The seeds.
        students: Likewise.
        count: Seeds at a time.

    Raises:
        InputError: What a seed met; the others that had begun run to their end.
    """
    # Fresh processes: one that is forked would have this one's threads' locks without its threads.
    context = multiprocessing.get_context("spawn")
    values = OmegaConf.to_container(recipe)
    with ProcessPoolExecutor(min(count, len(seeds)), context, _begin) as pool:
        runs = [pool.submit(_run, values, world, asked, seed, list(students)) for seed in seeds]
        try:
            return [run.result() for run in runs]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin() -> None:
    quiet.before_imports()
    # A process that outlived the one that was killed would keep its stages locked.
    end_with_parent()


def _run(values: Any, world: WorldConfig, asked: StudentEvaluation, seed: int, students: list[str]) -> dict[str, Any]:
    import torch

    from ctpd_nemo.reproduce.seed import run_seed

    quiet.after_imports()
    torch.set_num_threads(1)
    _log(seed)
    return run_seed(OmegaConf.create(values), world, asked, seed, students)


def _log(seed: int) -> None:
    """This project's messages, with the seed before them; steps of training are in ``metrics.jsonl``."""
    logger = logging.getLogger("ctpd_nemo")
    logger.setLevel(logging.INFO)
    logging.getLogger("ctpd_nemo.pipeline.callbacks").setLevel(logging.WARNING)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s seed {seed}  %(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.propagate = False
