"""A frozen model that scores spans: the teacher beside the student, or alone in a scoring job."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctpd_nemo.convert.architecture import Architecture, read_architecture
from ctpd_nemo.convert.load import load_hf_weights
from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.models.cost import stage_parameters
from ctpd_nemo.models.forward import OutputReader, StepLoss, run_microbatches, span_logprobs
from ctpd_nemo.models.gpt import build_gpt
from ctpd_nemo.parallel.layout import ParallelConfig, local_device
from ctpd_nemo.parallel.precision import PrecisionConfig


def weight_bytes(architecture: Architecture, parallel: ParallelConfig, precision: PrecisionConfig) -> int:
    """Bytes of a frozen model's weights on the rank that holds most; process groups need not be there."""
    stages = {(True, True)} if parallel.pipeline == 1 else {(True, False), (False, True)}
    most = max(stage_parameters(architecture, parallel.tensor, parallel.pipeline, *ends) for ends in stages)
    return most * precision.torch_dtype().itemsize


class FrozenModel:
    """Weights that never change, forward only.

    Attributes:
        architecture: Of the folder it was read from.
    """

    def __init__(self, path: str, parallel: ParallelConfig, precision: PrecisionConfig) -> None:
        """Read a Hugging Face folder into this rank's part of the layout; process groups must be there.

        Raises:
            InputError: The folder cannot be used.
        """
        self.architecture = read_architecture(path)
        with torch.no_grad():  # Transformer Engine then keeps no copy of FP8 weights for a backward pass
            self.chunks = build_gpt(self.architecture, parallel, precision, frozen=True)
        load_hf_weights(self.chunks, path, self.architecture)
        for chunk in self.chunks:
            chunk.requires_grad_(False).eval()

    def score(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        """Span log-probs of each microbatch, fp32 ``[num_spans]``, on the last pipeline stage; elsewhere nothing.

        Every rank of the layout calls this together, with as many microbatches.
        """
        return self.read(microbatches, span_logprobs)

    def read(self, microbatches: Sequence[Microbatch], reader: OutputReader) -> list[Any]:
        """What a reader makes of the output of each microbatch, likewise."""
        found: list[Any] = []

        def collect(output: Any, microbatch: Microbatch) -> StepLoss:
            found.append(output)
            return StepLoss(total=torch.zeros((), device=local_device()), count=0)

        vocab_size, device = self.architecture.vocab_size, local_device()
        run_microbatches(self.chunks, microbatches, vocab_size, collect, True, device, reader)
        return found[: len(microbatches)]
