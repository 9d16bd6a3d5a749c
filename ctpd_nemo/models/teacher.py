"""A frozen model that scores spans: the teacher beside the student, or alone in a scoring job."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctpd_nemo.convert.architecture import Architecture, read_architecture
from ctpd_nemo.convert.load import load_hf_weights
from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.models.cost import layer_matrix_parameters, stage_parameters
from ctpd_nemo.models.forward import OutputReader, StepLoss, run_microbatches, span_logprobs
from ctpd_nemo.models.gpt import build_gpt
from ctpd_nemo.parallel.layout import ParallelConfig, local_device
from ctpd_nemo.parallel.precision import PrecisionConfig


def weight_bytes(architecture: Architecture, parallel: ParallelConfig, precision: PrecisionConfig) -> int:
    """Bytes of a frozen model's weights on the rank that holds most, FP8 ones included; needs no process groups."""
    element = precision.torch_dtype().itemsize
    more_of_layer = (precision.frozen_matrix_bytes - element) * layer_matrix_parameters(architecture) / parallel.tensor
    found = []
    for stage in range(parallel.pipeline):
        ends = stage == 0, stage == parallel.pipeline - 1
        weights = stage_parameters(architecture, parallel.tensor, parallel.pipeline, *ends)
        found.append(weights * element + more_of_layer * _fp8_layers(architecture, parallel, precision, stage))
    return round(max(found))


def _fp8_layers(architecture: Architecture, parallel: ParallelConfig, precision: PrecisionConfig, stage: int) -> int:
    """Layers of a pipeline stage that do not stay in bf16; chunks of a stage lie a round of the pipeline apart."""
    first, behind = precision.bf16_first_layers, architecture.num_layers - precision.bf16_last_layers
    in_chunk = architecture.num_layers // (parallel.pipeline * (parallel.virtual_pipeline or 1))
    layers = (n for n in range(architecture.num_layers) if n // in_chunk % parallel.pipeline == stage)
    return sum(first <= layer < behind for layer in layers)


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
        self.architecture, precision = read_architecture(path), precision.of_frozen()
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
