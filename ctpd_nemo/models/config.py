"""The configuration of a run, typed; each part is defined beside what it configures."""

from dataclasses import dataclass, field
from typing import Any

from ctpd_nemo.data.config import DataConfig
from ctpd_nemo.errors import InputError
from ctpd_nemo.output_paths import output_folder
from ctpd_nemo.parallel.determinism import check_environment
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.parallel.optimizer import OptimConfig
from ctpd_nemo.parallel.precision import PrecisionConfig
from ctpd_nemo.parallel.userbuffers import check_userbuffers


@dataclass
class SideConfig:
    """One of the two models.

    Attributes:
        path: Hugging Face folder of weights, config and tokenizer.
        tokenizer: Folder of the tokenizer where it is another one. Alone, without ``path``, it is all that training
            from a score cache needs of a teacher whose weights are elsewhere.
        chat_template: A chat template, or the path of a file with one, in place of the tokenizer's own. A path that is
            not there is looked for in ``conf``.
        chat_template_kwargs: Variables for the template, as ``{enable_thinking: false}``.
    """

    path: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass
class ModelsConfig:
    """Student and teacher."""

    student: SideConfig = field(default_factory=SideConfig)
    teacher: SideConfig = field(default_factory=SideConfig)


@dataclass
class TrainerConfig:
    """The loop.

    Attributes:
        epochs: Passes over the training pairs.
        max_steps: Stop after this many optimizer steps; ``None`` for all of ``epochs``.
        validate_every: Steps between two passes over the validation pairs; 0 for one at the end.
        checkpoint_every: Steps between two checkpoints; 0 for one at the end.
        keep_last: How many of the newest checkpoints stay.
        keep_best: How many more stay, of those with the best validation; with it, each validation has a checkpoint.
        best_by: What is compared: "val_loss", where less is better, or another ``val_`` metric, where more is.
        async_save: Write checkpoints while training goes on.
        max_bad_steps: How many steps in a row may have a loss or gradient that is NaN or infinite; with so many the run
            stops. Each changes no weights, counts in ``bad_steps`` and has its pairs in ``bad_batches.jsonl``.
        log_every: Steps between two points in TensorBoard; ``metrics.jsonl`` has every step.
        wandb: Also log to Weights & Biases: true, or the name of a project.
        resume: Go on from the newest checkpoint in the run folder, if there is one.
    """

    epochs: int = 1
    max_steps: int | None = None
    validate_every: int = 0
    checkpoint_every: int = 500
    keep_last: int = 2
    keep_best: int = 0
    best_by: str = "val_loss"
    async_save: bool = False
    max_bad_steps: int = 3
    log_every: int = 10
    wandb: bool | str = False
    resume: bool = True

    def check(self) -> None:
        """Stop with an ``InputError`` that names the key of a value that makes no run."""
        at_least = {"epochs": 1, "max_steps": 1, "keep_last": 1, "max_bad_steps": 1, "log_every": 1}
        at_least |= {"validate_every": 0, "checkpoint_every": 0, "keep_best": 0}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"trainer.{name}", str(value), f"{least} or more")
        if not self.best_by.startswith("val_"):
            raise InputError("trainer.best_by", repr(self.best_by), "a metric of the held-out pairs, such as val_loss")


@dataclass
class ResumeConfig:
    """Going on from a checkpoint.

    Attributes:
        allow: What may differ from what the checkpoint was trained on, by the names that an error gives: "data",
            "policy_tokenizer", "steps" and so on; "tokenizer", "template" and "weights" are those of all models.
    """

    allow: list[str] = field(default_factory=list)


@dataclass
class RunConfig:
    """One training or scoring job.

    Attributes:
        method: The config of the method, one of the classes in ``models.methods``.
        policy: Which of the two models is trained: "student" or "teacher".
        run_dir: Folder that everything is written to.
        seed: Seeds weights that are drawn, and the order of the data.
        deterministic: Equal bit for bit each time, on CPU and on one GPU; slower on a GPU.
        from_run: Folder of the run that this one does again; ``tools/train.py --from-run`` sets it.
    """

    method: Any
    policy: str = "student"
    run_dir: str = "runs/train"
    seed: int = 0
    deterministic: bool = False
    from_run: str | None = None
    model: ModelsConfig = field(default_factory=ModelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)

    def check(self, world_size: int) -> None:
        """Stop with an ``InputError`` where a value cannot be used on this machine, or sizes in a ``world_size``.

        What goes with the data is checked where it is opened.
        """
        output_folder("run_dir", self.run_dir)
        if not 0 <= self.seed < 2**32:
            raise InputError("seed", str(self.seed), "0 to 4294967295, what every library takes")
        if self.deterministic:
            check_environment()
        self.parallel.check(world_size)
        self.optim.check()
        self.precision.check()
        self.trainer.check()
        if self.trainer.keep_best and not self.data.validation:
            raise InputError("trainer.keep_best", f"{self.trainer.keep_best} without data.validation", "held-out pairs")
        self.precision.check_device(self.parallel.context)
        check_userbuffers(self.parallel, self.precision, self.data.microbatch_tokens)

    def policy_side(self) -> SideConfig:
        """The model that is trained."""
        return self.model.student if self.policy == "student" else self.model.teacher
