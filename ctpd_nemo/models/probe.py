"""Log-probs of two short responses under the weights that a run ended with, to compare its export with."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from ctpd_nemo.convert.layout import hf_tensor_shapes
from ctpd_nemo.data.batch import Microbatch, build_microbatch
from ctpd_nemo.data.chat_template import RefusedConversationError
from ctpd_nemo.data.encoded_pair import EncodedPair
from ctpd_nemo.data.forms import Message, PreferencePair
from ctpd_nemo.errors import InputError
from ctpd_nemo.json_files import read_object
from ctpd_nemo.models.base import MegatronModel
from ctpd_nemo.models.forward import StepLoss, run_microbatches
from ctpd_nemo.parallel.layout import local_device
from ctpd_nemo.text_files import replace_text

FILE = "probe.json"
# Weights of a model that an export runs on the CPU of whoever makes it: seconds, and twice as much memory.
RUN_BYTES = 4 * 2**30
_PAIR = PreferencePair(
    "probe", (Message("user", "Name the capital of France."),), "It is Paris.", "I do not know.", "the probe"
)
_EXPECTED = "what a job wrote down"


@dataclass(frozen=True)
class ProbedResponse:
    """One response: token ids, the span of each of its tokens, and the log-prob of each span in nats."""

    prompt: list[int]
    response: list[int]
    span: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Probe:
    """Log-probs of a run's weights.

    Attributes:
        step: After so many steps.
        precision: In which they were computed.
        responses: Of which.
    """

    step: int
    precision: str
    responses: list[ProbedResponse]

    def write(self, folder: Path) -> None:
        """Put it into a run folder."""
        replace_text(folder / FILE, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path, checkpoint: str) -> "Probe | None":
        """That of a run folder, where there is one of the step that a checkpoint has its name from.

        Raises:
            InputError: There is something else.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        there = read_object(path, _EXPECTED)
        try:
            probe = cls(int(there["step"]), str(there["precision"]), [_response(one) for one in there["responses"]])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(str(path), f"what no job wrote ({error!r})", _EXPECTED) from error
        return probe if checkpoint == f"step-{probe.step:08d}" else None

    def largest_difference(self, model: Any) -> float:
        """How far log-probs of a ``transformers`` model are off, in nats a token: the largest mean of a response."""
        differences = [_difference(one, model) for one in self.responses]
        # A NaN is no smaller than anything.
        return math.nan if any(map(math.isnan, differences)) else max(differences, default=math.nan)


def take_probe(model: MegatronModel) -> Probe | None:
    """The log-probs of a model's weights of now; every rank calls it together, and gets the same.

    ``None`` where no export would compare them: of large models, and in FP8, where a forward pass leaves its mark.
    """
    size = sum(map(math.prod, hf_tensor_shapes(model.architecture).values()))
    precision = model.run.precision
    if size * precision.torch_dtype().itemsize > RUN_BYTES or precision.fp8 is not None:
        return None
    encoder, batching = model.run_data.encoder, model.run_data.batching
    try:
        (pair,) = encoder.encode([0], [_PAIR])
    except RefusedConversationError:
        return None
    if not isinstance(pair, EncodedPair):
        # Longer than the sequences of this run.
        return None
    microbatch = build_microbatch(
        [pair],
        pad_token_id=encoder.policy.pad_token_id,
        pad_to_multiple=batching.pad_to_multiple,
        sequence_multiple=batching.sequence_multiple,
        padding=batching.padding,
    )
    logprobs = _span_logprobs(model, microbatch.to(local_device())).tolist()
    responses, at = [], 0
    for response in (pair.chosen, pair.rejected):
        own = response.policy
        spans = logprobs[at : at + response.n_spans]
        at += response.n_spans
        prompt, ids, span = own.prompt_ids.tolist(), own.response_ids.tolist(), own.response_span.tolist()
        responses.append(ProbedResponse(prompt, ids, span, spans))
    # A GPU multiplies fp32 as TF32.
    where = "" if local_device().type == "cpu" else f" on {local_device().type}"
    return Probe(model.trainer.global_step, f"{precision.name}{where}", responses)


def _span_logprobs(model: MegatronModel, microbatch: Microbatch) -> Tensor:
    """Log-prob of each span on every rank, fp32 ``[num_spans]``."""
    found: list[Tensor] = []

    def collect(logprobs_S: Tensor, _: Microbatch) -> StepLoss:
        found.append(logprobs_S.detach())
        return StepLoss(total=torch.zeros((), device=local_device()), count=0)

    vocab_size, device = model.architecture.vocab_size, local_device()
    run_microbatches(model.chunks, [microbatch], vocab_size, collect, True, device)
    logprobs_S = torch.zeros(microbatch.num_spans, device=device)
    ranks = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    # The last pipeline stage has them, each of its ranks alike.
    if found and not any(ranks):
        logprobs_S += found[0]
    dist.all_reduce(logprobs_S)
    return logprobs_S


def _response(there: Any) -> ProbedResponse:
    prompt, ids, span = ([int(one) for one in there[key]] for key in ("prompt", "response", "span"))
    response = ProbedResponse(prompt, ids, span, [float(one) for one in there["logprobs"]])
    if not response.prompt or not response.response or len(response.span) != len(response.response):
        raise ValueError("a response without tokens, or spans")
    if not 0 <= min(response.span) <= max(response.span) < len(response.logprobs):
        raise ValueError("spans without log-probs")
    if min(response.prompt + response.response) < 0:
        raise ValueError("a negative id")
    return response


def _difference(probed: ProbedResponse, model: Any) -> float:
    ids = [*probed.prompt, *probed.response]
    if max(ids) >= model.get_input_embeddings().num_embeddings:
        return math.inf
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, len(probed.prompt) - 1 : -1].float()
    tokens = torch.tensor(probed.response)
    logprobs_T = torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None])[:, 0]
    spans = torch.zeros(len(probed.logprobs)).index_add(0, torch.tensor(probed.span), logprobs_T)
    return float((spans - torch.tensor(probed.logprobs)).abs().sum() / len(tokens))
