"""What a scoring job writes: span scores of each role, and the reference's largest log-probs where they are kept."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from numpy.typing import NDArray

from ctpd_nemo.errors import InputError
from ctpd_nemo.models.data import RunData
from ctpd_nemo.models.scorer import Float32Array
from ctpd_nemo.parallel.agreement import first_reason
from ctpd_nemo.pipeline.folder_watch import KeptFolder
from ctpd_nemo.pipeline.preflight import check_shared
from ctpd_nemo.pipeline.rank_zero import on_rank_0
from ctpd_nemo.pipeline.score_cache import PairScores, ScoreWriter
from ctpd_nemo.pipeline.top_k_cache import PairTopK, TopKWriter


class ScoreOutput:
    """The cache of a scoring job.

    Attributes:
        folder: It.
        n_shards: Shards of each role.
    """

    def __init__(self, data: RunData, fingerprints: Mapping[str, str], weights: Mapping[str, str]) -> None:
        """Check a cache that is there, or make a new one in memory.

        Args:
            data: Of the job, with its configuration.
            fingerprints: Of everything but the weights, by the names in ``score_cache.FINGERPRINTS``.
            weights: Fingerprint of the weights of each role that this job scores.

        Raises:
            InputError: The cache that is there was computed from something else.
        """
        method, layout = data.run.method, (len(data.train), data.run.method.pairs_per_shard)
        self.folder = Path(str(method.cache))
        self._pairs = data.train
        self._scores = ScoreWriter(self.folder, fingerprints, weights, *layout)
        self._top_k: TopKWriter | None = None
        if method.top_k is not None:
            kept = method.top_k, method.top_k_dtype
            self._top_k = TopKWriter(self.folder, fingerprints, weights["reference"], *layout, *kept)
        self.n_shards = self._scores.n_shards
        self._written: dict[str, set[int]] = defaultdict(set)

    def begin(self) -> None:
        """Make the folder and what says what is in it; every rank calls it together.

        Raises:
            InputError: A rank does not see it.
            OSError: It cannot be written.
        """
        on_rank_0(self._scores.begin)
        check_shared("method.cache", self.folder)
        if self._top_k is not None:
            on_rank_0(self._top_k.begin)

    def missing(self, roles: Sequence[str]) -> list[int]:
        """Shards that are not there for every one of the roles."""
        more = self._top_k.missing() if self._top_k is not None and "reference" in roles else []
        return sorted({*self._scores.missing(roles), *more})

    def write(self, role: str, shard: int, rows: Sequence[int], scores: Sequence[tuple[Float32Array, ...]]) -> None:
        """Write one shard of one role; see ``scorer.ScoreSink``.

        Raises:
            InputError: A score is not finite, or a log-prob above 0.
        """
        scored = zip(rows, scores, strict=True)
        pairs = [PairScores(self._pairs[row].id, chosen, rejected, row) for row, (chosen, rejected) in scored]
        self._scores.write(role, shard, pairs)
        self._written[role].add(shard)

    def write_top_k(self, shard: int, rows: Sequence[int], found: Sequence[tuple[NDArray[Any], ...]]) -> None:
        """Write one shard of the reference's largest log-probs.

        Raises:
            InputError: A number cannot be one of them.
        """
        assert self._top_k is not None
        kept = zip(rows, found, strict=True)
        pairs = [PairTopK(self._pairs[row].id, logprobs, ids, tail, row) for row, (logprobs, ids, tail) in kept]
        self._top_k.write(shard, pairs)

    def kept_folders(self) -> Iterator[KeptFolder]:
        """The folder, which is to stay; the first rank writes what says what is in it anew."""
        for writer, what in ((self._scores, "the manifest"), (self._top_k, "the manifest of top_k")):
            if writer is not None:
                restore = writer.write_manifest if dist.get_rank() == 0 else None
                name = writer.manifest.name
                yield KeptFolder("method.cache", self.folder, " from its shards", name, what, restore)

    def check_written(self) -> None:
        """Stop where a shard that this job has written is not there any more; every rank calls it together.

        Each rank looks for its own: to others, files of a network that are new may not be there for a while.

        Raises:
            InputError: It says how many, of the first rank that misses some.
        """
        gone = [shard for role, written in self._written.items() for shard in written & set(self.missing([role]))]
        reason = first_reason(f"{len(gone)} shards less than were written into it" if gone else None)
        if reason is not None:
            raise InputError(str(self.folder), reason, "all to stay; started again, scoring makes these anew")
