"""What a job will need, looked at before it begins: what it finds missing later costs all that was done until then."""

import contextlib
import math
import os
import shutil
import socket
import time
from pathlib import Path

import torch.distributed as dist

from ctpd_nemo.convert.architecture import read_architecture
from ctpd_nemo.convert.layout import hf_tensor_shapes
from ctpd_nemo.data.templates import Side
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.base import LEFT_OUT
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.data import RunData
from ctpd_nemo.models.distillation import DistillationConfig
from ctpd_nemo.models.folder import check_model
from ctpd_nemo.models.methods import METHODS, Method
from ctpd_nemo.models.roles import ROLES
from ctpd_nemo.models.scorer import ScoreConfig
from ctpd_nemo.models.weighted import WeightedConfig
from ctpd_nemo.output_paths import output_folder
from ctpd_nemo.parallel.agreement import first_reason
from ctpd_nemo.parallel.ranks import world_size
from ctpd_nemo.pipeline.score_cache import read_manifest
from ctpd_nemo.pipeline.wandb_run import check_wandb
from ctpd_nemo.run_folder import check_run_folder

# Of a parameter in a checkpoint: its weight and two moments in fp32.
CHECKPOINT_BYTES = 12
# As long as clients of NFS believe, as they are usually set up, that what was not there is not.
_SIGHT_SECONDS = 60.0


def check_job(run: RunConfig) -> None:
    """Look at the values of a training or scoring job, and at all that it will write to; nothing is read or made.

    Raises:
        InputError: Names the key.
    """
    run.check(world_size())
    run.data.check()
    check_outputs(run)
    check_wandb(run)
    if not isinstance(run.method, ScoreConfig):
        _check_best_by(run, method_of(run))


def check_outputs(run: RunConfig) -> None:
    """Look at the folders that a job writes to; at the name of its ``run_dir`` ``RunConfig.check`` looks.

    Raises:
        InputError: Names the key, or what is in ``run_dir`` and of no job.
    """
    check_run_folder(Path(run.run_dir))
    check_encoded(run.run_dir, run.data.encoded)
    if isinstance(run.method, ScoreConfig):
        run.method.check()
        output_folder("method.cache", run.method.cache)


def check_encoded(run_dir: str, encoded: str | None) -> None:
    """Look at the folder of encoded datasets, if a job has one.

    Raises:
        InputError: It cannot be written.
    """
    if encoded is not None:
        output_folder("data.encoded", Path(run_dir).parent / "encoded" if encoded == "auto" else encoded)


def method_of(run: RunConfig) -> Method:
    """The method that a job trains by.

    Raises:
        InputError: There is none of that name.
    """
    if run.method.name not in METHODS:
        raise InputError("method.name", repr(run.method.name), "one of " + ", ".join(METHODS))
    return METHODS[run.method.name]


def model_folders(run: RunConfig) -> dict[str, str]:
    """The folder of each model that a job holds, by its role; "policy" is the one that is trained.

    Models that a score cache speaks for are not among them.

    Raises:
        InputError: The run names no folder for one.
    """
    method = run.method
    if isinstance(method, ScoreConfig):
        return method.folders()
    online: dict[str, str] = {}
    if isinstance(method, WeightedConfig):
        online = method.online_folders(run)
    elif isinstance(method, DistillationConfig) and method.reference == "online" and run.model.teacher.path:
        online = {"reference": run.model.teacher.path}
    path = run.policy_side().path
    if path is None:
        raise InputError(f"model.{run.policy}.path", "nothing", "a Hugging Face folder")
    return {"policy": path, **online}


def open_data(run: RunConfig) -> RunData:
    """The data of a job, and tokenizers and templates of its models.

    Raises:
        InputError: A value, file or tokenizer cannot be used.
    """
    if isinstance(run.method, ScoreConfig):
        return RunData(run, ("chosen", "rejected"), is_two_sided(run))
    beside = is_two_sided(run) and getattr(run.method, "reference", None) == "online"
    if isinstance(run.method, WeightedConfig):
        beside = beside and "reference" in run.method.sides()
    return RunData(run, method_of(run).responses, is_two_sided(run), online=beside)


def is_two_sided(run: RunConfig) -> bool:
    """Whether the reference of a job reads with a tokenizer of its own."""
    if isinstance(run.method, ScoreConfig):
        return run.method.two_sided(run.policy)
    return method_of(run).two_sided


def check_models(run: RunConfig, policy: Side, reference: Side) -> None:
    """Look at the models of a job before they are built.

    Args:
        run: The config.
        policy: How the model that is trained, or the student that is scored, reads.
        reference: How the others do.

    Raises:
        InputError: One cannot be used, or does not go with its tokenizer or the job.
    """
    words: dict[str, int] = {}
    for role, folder in model_folders(run).items():
        reads_as_policy = role == "policy" or ROLES[role].side == "policy"
        words[role] = check_model(folder, policy if reads_as_policy else reference, run).vocab_size
    kept = getattr(run.method, "top_k", None)
    # Of a scoring job the reference's are kept; in distillation both models are asked for as many.
    known = words["reference"] if isinstance(run.method, ScoreConfig) and kept else min(words.values())
    if kept is not None and kept > known:
        raise InputError("method.top_k", str(kept), f"at most {known}, the words of the vocabulary")


def check_cache(run: RunConfig) -> None:
    """Look at a score cache that no job of this run makes; that it belongs to the run is checked where it is opened.

    Raises:
        InputError: There is none, or it has not the roles that are needed.
    """
    method = run.method
    if getattr(method, "reference", None) != "cache" or method.scores is None:
        return
    caches = [method.scores, *filter(None, [getattr(method, "student_scores", None)])]
    held = {role for cache in caches for role in read_manifest(cache)["teacher_weights"]}
    needed = method.roles() if isinstance(method, WeightedConfig) else ("reference",)
    for role in needed:
        if role not in held:
            raise InputError(method.scores, f"scores of {', '.join(sorted(held)) or 'nothing'}", f"{role} among them")


def checkpoint_bytes(folder: str) -> int:
    """What a checkpoint of a model takes on a disk, at least."""
    return CHECKPOINT_BYTES * sum(math.prod(shape) for shape in hf_tensor_shapes(read_architecture(folder)).values())


def check_room(run_dir: str | Path, needed: int) -> None:
    """Stop where a disk has no room for what a job leaves there, at least.

    Args:
        run_dir: On the disk.
        needed: Bytes.

    Raises:
        InputError: It has not.
    """
    folder = Path(run_dir).absolute()
    disk = shutil.disk_usage(next(path for path in (folder, *folder.parents) if os.path.isdir(path)))
    # Some file systems, of object stores, say that they have no room at all.
    if disk.total and disk.free < needed:
        found = f"{disk.free / 1e9:,.3f} GB free on the disk of {run_dir}"
        raise InputError("run_dir", found, f"{needed / 1e9:,.3f} GB, for the last checkpoint of each model at least")


def check_shared(key: str, folder: Path) -> None:
    """Stop where a node does not see the folder that rank 0 has made; every rank calls it together.

    What ranks write on disks of their own would be missed when all of it is put together.

    Raises:
        InputError: Names a rank that does not see it.
    """
    if dist.get_world_size() == 1:
        return
    seen = _comes_into_sight(folder.absolute())
    if (unseen := first_reason(None if seen else f"rank {dist.get_rank()} on {socket.gethostname()}")) is not None:
        raise InputError(key, f"{folder}, which is not there for {unseen}", "a folder that all nodes share")


def _comes_into_sight(folder: Path) -> bool:
    """Whether a folder is there, or will be once a client of a network's file system has looked anew."""
    until = time.monotonic() + _SIGHT_SECONDS
    while not folder.is_dir():
        if time.monotonic() > until:
            return False
        # To list what is above has the client look; a name that it has once missed it may miss for a while.
        with contextlib.suppress(OSError):
            os.listdir(folder.parent)
        time.sleep(1.0)
    return True


def _check_best_by(run: RunConfig, method: Method) -> None:
    known = [f"val_{name}" for name in (*method.model.metric_names, *LEFT_OUT)]
    if run.trainer.keep_best and run.trainer.best_by not in known:
        raise InputError("trainer.best_by", repr(run.trainer.best_by), f"one of {', '.join(known)}")
