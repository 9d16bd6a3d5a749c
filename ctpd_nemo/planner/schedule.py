"""How many microbatches a pipeline stage has in the air: between their forward pass and their backward pass.

Megatron-Core's schedules (``megatron.core.pipeline_parallel.schedules``): one forward, one backward; and interleaved,
where a stage holds several chunks and works through them in groups of as many microbatches as there are stages.
"""

from ctpd_nemo.parallel.layout import ParallelConfig


def in_flight(parallel: ParallelConfig, stage: int, microbatches: int) -> list[int]:
    """Microbatches in the air at the worst moment, for each chunk of a stage.

    Args:
        parallel: The layout.
        stage: From 0.
        microbatches: Of one step, on one rank.
    """
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline or 1
    if chunks == 1:
        return [min(stages - stage, microbatches)]
    microbatches = -(-microbatches // stages) * stages
    warm_up = (stages - stage - 1) * 2 + (chunks - 1) * stages
    held = [0] * chunks
    for number in range(min(warm_up + 1, microbatches * chunks)):
        held[number // stages % chunks] += 1
    return held
