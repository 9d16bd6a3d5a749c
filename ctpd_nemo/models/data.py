"""The data of a run: opened, checked and cut into steps."""

import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.convert.architecture import read_architecture
from ctpd_nemo.data.batch import Microbatch, Renumbered, Responses, SideName, SpanScores
from ctpd_nemo.data.config import longest_row
from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded import EncodedDataset
from ctpd_nemo.data.encoded_pair import Skipped
from ctpd_nemo.data.loader import Batching, StepLoader, build_step_loader
from ctpd_nemo.data.packing import check_budget
from ctpd_nemo.data.preferences import PreferenceDataset, open_preferences
from ctpd_nemo.data.source import PairSource, TextSource
from ctpd_nemo.data.steps import StepPlan
from ctpd_nemo.data.template_probe import OF_RESPONSES
from ctpd_nemo.data.templates import Side
from ctpd_nemo.data.tokenizer_folder import load_tokenizer
from ctpd_nemo.data.top_k import TopKSource
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig, SideConfig
from ctpd_nemo.models.cost import sequence_cost

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A run of which so many pairs are left out from the beginning is one that somebody did not mean.
FIRST_PAIRS = 32
# Kinds of rows that are more than text, of which one each is encoded before any work.
_MOST_KINDS = 100


def load_side(config: SideConfig, key: str) -> Side:
    """Tokenizer and chat template of one model.

    Args:
        config: Where they are.
        key: The config key to name in an error, e.g. ``model.student``.

    Raises:
        InputError: There is no path, or no tokenizer at it.
    """
    folder = config.tokenizer or config.path
    if folder is None:
        raise InputError(f"{key}.path", "nothing", "a Hugging Face folder")
    if folder == config.path and (Path(folder) / "config.json").exists():
        # What is wrong with a model's config is said of it, and not of the tokenizer, whose loader reads it too.
        read_architecture(folder)
    return Side(load_tokenizer(folder), config.chat_template, config.chat_template_kwargs)


class RunData:
    """Datasets, encoder and loaders of a run.

    Attributes:
        policy_path: Folder of the model that is trained.
        policy: Tokenizer and template of the model that is trained.
        reference: Those of the model it is measured against; ``None`` where it reads as the policy does.
        train: Training pairs.
        validation: Held-out pairs, ``None`` where there are none.
        plan: Which pairs each step sees.
        batching: How pairs become microbatches.
        scores: Span scores by pair id, ``None`` where nothing is cached.
        top_k: What the teacher finds most likely, by pair id, likewise.
        encoded: Encoded datasets of "train" and "validation"; those that are not here are encoded as they are read.
        weights: Fingerprints of the weights that the run starts from, by what they are to it.
    """

    def __init__(
        self,
        run: RunConfig,
        responses: Responses,
        two_sided: bool,
        online: bool = False,
    ) -> None:
        """Open and check everything that the run reads.

        Args:
            run: The configuration.
            responses: Both responses of a pair, or the chosen ones alone.
            two_sided: The policy is the student and its reference the teacher, with a tokenizer of its own.
            online: Also build the reference's microbatches, to score them as training goes.

        Raises:
            InputError: A config value, file or tokenizer cannot be used.
        """
        run.data.check()
        self.run = run
        if run.policy not in ("student", "teacher"):
            raise InputError("policy", repr(run.policy), "student or teacher")
        side = run.policy_side()
        if side.path is None:
            raise InputError(f"model.{run.policy}.path", "nothing", "a Hugging Face folder")
        self.policy_path = side.path
        self.policy = load_side(side, f"model.{run.policy}")
        self.reference = load_side(run.model.teacher, "model.teacher") if two_sided else None
        self.encoder = PairEncoder(
            self.policy,
            self.reference,
            run.data.include_eos,
            run.data.max_length,
            run.data.max_prompt_length,
            run.data.response_text,
            on_bad=run.data.on_bad,
        )
        self.scores: SpanScores | None = None
        self.top_k: TopKSource | None = None
        self.encoded: dict[str, EncodedDataset] = {}
        self.weights: dict[str, str] = {}
        self.batching = batching_of(run, responses, online)
        if not run.data.train:
            raise InputError("data.train", "no files", "one or more preference files")
        self.train = self._open(run.data.train)
        self.validation = self._open(run.data.validation) if run.data.validation else None
        if run.data.on_bad == "stop":
            self._check_kinds()
        self.plan = StepPlan(
            len(self.train),
            run.data.global_batch_size,
            epochs=run.trainer.epochs,
            max_steps=run.trainer.max_steps,
            shuffle=run.data.shuffle,
            seed=run.seed,
        )
        if run.data.encoded is None:
            # A tokenizer that cannot be aligned is known before any model is built, and so is a limit that is wrong.
            self.encoder.prepare()
            self._check_first_pairs()

    def _open(self, paths: Sequence[str]) -> PreferenceDataset:
        data = self.run.data
        longest = longest_row(data.max_length, data.max_row_bytes)
        return open_preferences(paths, data.split, data.on_bad, self.encoder.kept, longest)

    def _check_kinds(self) -> None:
        """Stop where a template refuses the roles of some rows, or leaves out what some hold beside their text.

        Raises:
            RefusedConversationError: It names the first such row.
        """
        for dataset in self.datasets().values():
            for reader in filter(None, (self.policy, self.reference)):
                reader.check_roles(dataset.role_orders)
            for row in dataset.first_of_kinds[:_MOST_KINDS]:
                self.encoder.encode([row], [dataset[row]])

    def _check_first_pairs(self) -> None:
        """Stop where none of the pairs that the first steps see can be used.

        Raises:
            InputError: It says why, by reason.
        """
        steps = (self.plan.batch(step)[1].tolist() for step in range(self.plan.steps_per_epoch))
        rows = list(itertools.islice(itertools.chain.from_iterable(steps), FIRST_PAIRS))
        skipped = [
            pair for pair in self.encoder.encode(rows, [self.train[row] for row in rows]) if isinstance(pair, Skipped)
        ]
        if len(skipped) == len(rows):
            reasons = Counter(pair.reason for pair in skipped)
            raise no_usable_pair(", ".join(self.run.data.train), reasons, next((one.why for one in skipped), ""))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.plan.total_steps

    def train_loader(self, dp_rank: int, dp_size: int, start_step: int) -> StepLoader:
        """Steps of training from ``start_step`` on."""
        return self._loader("train", self.plan, dp_rank, dp_size, start_step)

    def validation_loader(self, dp_rank: int, dp_size: int) -> StepLoader | None:
        """Held-out pairs in file order, a global batch at a time; ``None`` where there are none."""
        if self.validation is None:
            return None
        plan = StepPlan.in_order(len(self.validation), self.run.data.global_batch_size)
        return self._loader("validation", plan, dp_rank, dp_size, 0)

    def warn_of_choices(self) -> None:
        """Say in what the turns that are trained are not those that a template writes, and what decides it."""
        sides = {f"model.{self.run.policy}": self.policy}
        if self.reference is not None and not self.encoder.one_sided:
            sides["model.teacher"] = self.reference
        for key, side in sides.items():
            for note in side.notes:
                if note.key != OF_RESPONSES or self.encoder.response_text == "written":
                    logger.warning("%s", note.line(key))

    def check_unchanged(self) -> None:
        """Stop where a data file no longer holds what it did when the job began.

        Raises:
            InputError: It names the file.
        """
        for dataset in self.datasets().values():
            dataset.check_unchanged()

    def datasets(self) -> dict[str, PreferenceDataset]:
        """The pairs by name: "train", and "validation" where there are such."""
        return {"train": self.train} | ({"validation": self.validation} if self.validation is not None else {})

    def source(self, name: str) -> PairSource:
        """Where the encoded pairs of a dataset come from."""
        return self.encoded.get(name, TextSource(self.datasets()[name], self.encoder))

    @cached_property
    def _balanced(self) -> Batching:
        """Batching by what sequences cost on the policy."""
        return dataclasses.replace(self.batching, cost=sequence_cost(read_architecture(self.policy_path)))

    def _loader(self, name: str, plan: StepPlan, dp_rank: int, dp_size: int, start_step: int) -> StepLoader:
        return build_step_loader(
            self.datasets()[name],
            self.encoder,
            plan,
            self._balanced,
            scores=self.scores_of(name),
            dp_rank=dp_rank,
            dp_size=dp_size,
            start_step=start_step,
            num_workers=self.run.data.num_workers,
            encoded=self.encoded.get(name),
            top_k=self.top_k_of(name),
        )

    def scores_of(self, name: str) -> SpanScores | None:
        """Span scores of the pairs of a dataset; caches hold those of training, which held-out ones then are among.

        Raises:
            InputError: A held-out pair is not.
        """
        if name == "train" or self.scores is None or not self.scores.of_numbers:
            return self.scores
        return self._of_train(self.scores)

    def top_k_of(self, name: str) -> TopKSource | None:
        """What the teacher finds most likely in the responses of a dataset; as ``scores_of``."""
        return self.top_k if name == "train" or self.top_k is None else self._of_train(self.top_k)

    def _of_train(self, source: T) -> T:
        """Scores by the numbers of training pairs, for the held-out ones."""
        return Renumbered(source, self.train, self._numbers_in_train)  # type: ignore[return-value]

    @cached_property
    def _numbers_in_train(self) -> NDArray[np.int64]:
        assert self.validation is not None
        return self.validation.numbers_in(self.train)

    def filler(self, side: SideName = "policy") -> Microbatch:
        """A microbatch without pairs."""
        pad = (self.encoder.policy if side == "policy" else self.encoder.reference).pad_token_id
        return Microbatch.filler(self.batching.whole_multiple, pad)

    def fingerprints(self) -> dict[str, str]:
        """What the order and content of the training data depend on, by name."""
        data = self.run.data
        sides = {"policy": self.policy} | ({"reference": self.reference} if self.reference else {})
        return {
            "data": self.train.fingerprint,
            "batches": f"{data.global_batch_size} pairs a step, seed {self.run.seed}, shuffle {data.shuffle}",
            "lengths": self.encoder.lengths,
            **{f"{name}_tokenizer": side.tokenizer_fingerprint for name, side in sides.items()},
            **{f"{name}_template": side.template_fingerprint for name, side in sides.items()},
            **({"scores": self.scores.fingerprint} if self.scores else {}),
            **({"top_k": self.top_k.fingerprint} if self.top_k else {}),
            **{f"{name}_weights": fingerprint for name, fingerprint in self.weights.items()},
        }


def no_usable_pair(place: str, skipped: Counter[str], why: str = "") -> InputError:
    """What a run says that has met no pair which it can use.

    Args:
        place: The training data.
        skipped: How many pairs were left out, by reason.
        why: More of the first of them, where there is more to say.
    """
    reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.most_common())
    found = f"0 pairs, {skipped.total()} skipped ({reasons}), of those that come first" + (f": {why}" if why else "")
    return InputError(place, found, "pairs that can be trained on, within data.max_length and data.max_prompt_length")


def batching_of(run: RunConfig, responses: Responses = ("chosen", "rejected"), online: bool = False) -> Batching:
    """How pairs become microbatches under the layout and the number formats of a run.

    Args:
        run: The configuration.
        responses: Both responses of a pair, or the chosen ones alone.
        online: Also build the reference's microbatches.

    Raises:
        InputError: Microbatches of the token budget cannot be shared out so, or do not hold a longest pair.
    """
    batching = Batching(
        run.data.microbatch_tokens,
        online=online,
        responses=responses,
        padding=run.data.packing,  # type: ignore[arg-type]
        pad_to_multiple=_pad_to_multiple(run, online),
        # A context-parallel rank takes two of a sequence's 2 x context equal parts, one from either end.
        sequence_multiple=2 * run.parallel.context if run.parallel.context > 1 else 1,
    )
    # A scoring job has a budget of its own.
    own = getattr(run.method, "microbatch_tokens", None)
    check_budget(
        own or run.data.microbatch_tokens,
        run.data.max_length,
        batching.pad_to_multiple,
        batching.sequence_multiple,
        batching.padding,
        place="method.microbatch_tokens" if own else "data.microbatch_tokens",
    )
    return batching


def _pad_to_multiple(run: RunConfig, online: bool) -> int:
    """What the layout and the number formats can share out: the tokens of a microbatch are a multiple of it.

    Raises:
        InputError: Communication is to be overlapped, and microbatches cannot all be of one size.
    """
    multiple = run.parallel.token_shares() * run.precision.token_multiple
    if not run.parallel.overlap_tensor:
        return multiple
    if run.method.name == "score":
        raise InputError("parallel.overlap_tensor", "true", "false: microbatches are as large as fit when scoring")
    # Its buffers are of one size, which every microbatch then has.
    if run.data.microbatch_tokens % multiple:
        found = f"{run.data.microbatch_tokens} with parallel.overlap_tensor"
        raise InputError("data.microbatch_tokens", found, f"a multiple of {multiple}")
    if run.data.packing != "packed":
        raise InputError("data.packing", f"{run.data.packing} with parallel.overlap_tensor", "packed")
    if online:
        raise InputError("parallel.overlap_tensor", "true with teachers beside the student", "scores from a cache")
    return run.data.microbatch_tokens
