"""Made-up scores, written and read."""

from pathlib import Path
from typing import Any

import numpy as np

from ctpd_nemo.data.encoded_pair import EncodedPair, EncodedResponse, SideTokens
from ctpd_nemo.models.ctpd import CTPDConfig
from ctpd_nemo.models.roles import ROLES
from ctpd_nemo.pipeline.score_cache import FINGERPRINTS, PairScores, ScoreReader, ScoreWriter

PRINTS = {name: f"print of {name}" for name in FINGERPRINTS}
WEIGHTS = {role: f"weights of {role}" for role in ("reference", "positive", "negative")}
ALL_ROLES = tuple(ROLES)
CONTRASTIVE = CTPDConfig(scores="cache")
N_PAIRS, PAIRS_PER_SHARD = 7, 3


def writer(folder: Path, roles: tuple[str, ...] = tuple(WEIGHTS), **changed: Any) -> ScoreWriter:
    given: dict[str, Any] = {
        "fingerprints": PRINTS,
        "teacher_weights": {role: f"weights of {role}" for role in roles},
        "n_pairs": N_PAIRS,
        "pairs_per_shard": PAIRS_PER_SHARD,
    }
    return ScoreWriter(folder, **{**given, **changed})


def scores(role: str) -> list[PairScores]:
    """Made-up scores: pair 2 has one span, responses have unequal lengths, every number is another."""
    drawn = np.random.default_rng(list(role.encode()))
    return [
        PairScores(f"pair-{pair}", *(-drawn.gamma(2.0, size=length).astype(np.float32) for length in span_counts(pair)))
        for pair in range(N_PAIRS)
    ]


def encoded(pair_id: str) -> EncodedPair:
    """The pair of the scores: span s of a response has s % 3 + 1 tokens of the teacher, and one of the student."""
    number = int(pair_id.removeprefix("pair-"))
    lengths = span_counts(number) if number < N_PAIRS else (1, 1)

    def side(span: np.ndarray) -> SideTokens:
        return SideTokens(np.zeros(1, np.int32), np.zeros(len(span), np.int32), span.astype(np.int32))

    responses = [
        EncodedResponse(side(np.arange(n)), side(np.arange(n).repeat(np.arange(n) % 3 + 1)), np.arange(n + 1), n, False)
        for n in lengths
    ]
    return EncodedPair(number, pair_id, *responses)


def span_counts(pair: int) -> tuple[int, int]:
    return (1 + (3 * pair + 1) % 5, 1 + pair % 4) if pair != 2 else (1, 1)


def write_shard(cache: ScoreWriter, role: str, shard: int) -> None:
    cache.write(role, shard, scores(role)[shard * PAIRS_PER_SHARD : (shard + 1) * PAIRS_PER_SHARD])


def write_all(folder: Path, roles: tuple[str, ...] = tuple(WEIGHTS), **changed: Any) -> ScoreWriter:
    cache = writer(folder, roles, **changed)
    cache.begin()
    for role in roles:
        for shard in range(cache.n_shards):
            write_shard(cache, role, shard)
    return cache


def read(folder: Path, method: CTPDConfig | None = CONTRASTIVE, **changed: Any) -> ScoreReader:
    given: dict[str, Any] = {"fingerprints": PRINTS, "teacher_weights": WEIGHTS}
    return ScoreReader(folder, **{**given, **changed}, method=method)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
