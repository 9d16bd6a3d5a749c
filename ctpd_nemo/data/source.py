"""Where the loader takes encoded pairs from: text that is encoded as it is asked for, or an encoded dataset."""

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded_pair import EncodedPair, Responses, SideName, Skipped
from ctpd_nemo.data.preferences import PreferenceDataset

Int64Array = NDArray[np.int64]

# Pairs that are encoded to see how many tokens a byte of text makes.
_SAMPLE = 32


class PairSource(Protocol):
    """Encoded pairs by row of the dataset."""

    def __len__(self) -> int: ...

    def prepare(self, lengths: bool) -> None:
        """Build what forked workers can share, with ``lengths`` also what ``lengths`` needs."""

    def pairs(self, rows: Sequence[int]) -> list[EncodedPair | Skipped]:
        """The pairs of some rows, in order.

        Raises:
            InputError: A row, template or file cannot be used.
        """

    def check_unchanged(self) -> None:
        """Stop where the pairs are no longer those of the dataset's fingerprint.

        Raises:
            InputError: It names the file.
        """

    def lengths(self, rows: Sequence[int], side: SideName, responses: Responses) -> tuple[Int64Array, Int64Array]:
        """Tokens of each sequence, and those of its response, int64 ``[n, responses]``; maybe an estimate.

        Found without encoding anything, and alike on every data-parallel rank.
        """


class TextSource:
    """Pairs from text; lengths are estimates from bytes of text."""

    def __init__(self, dataset: PreferenceDataset, encoder: PairEncoder) -> None:
        self._dataset = dataset
        self._encoder = encoder

    def __len__(self) -> int:
        return len(self._dataset)

    def prepare(self, lengths: bool) -> None:
        """Build what alignment keeps for each tokenizer; with ``lengths`` encode a sample of the pairs."""
        self._encoder.prepare()
        if lengths:
            _ = self._tokens_per_byte

    def pairs(self, rows: Sequence[int]) -> list[EncodedPair | Skipped]:
        """Read and encode."""
        return self._encoder.encode(rows, [self._dataset[row] for row in rows])

    def check_unchanged(self) -> None:
        """Look at the files of the dataset."""
        self._dataset.check_unchanged()

    def lengths(self, rows: Sequence[int], side: SideName, responses: Responses) -> tuple[Int64Array, Int64Array]:
        """As many tokens as so many bytes make in a sample of the pairs, ``max_length`` at most."""
        tokens_3 = self._tokens_per_byte[side]
        tokens_P3 = np.rint(self._dataset.text_bytes[np.asarray(rows, dtype=np.int64)] * tokens_3).astype(np.int64)
        response_PR = tokens_P3[:, 1 : 1 + len(responses)]
        return np.minimum(tokens_P3[:, :1] + response_PR, self._encoder.max_length), response_PR

    @cached_property
    def _tokens_per_byte(self) -> dict[SideName, NDArray[np.float64]]:
        """Tokens a byte of prompt, chosen and rejected response, f64 ``[3]``, of each side; a template's own count."""
        rows = np.unique(np.linspace(0, len(self._dataset) - 1, _SAMPLE, dtype=np.int64)).tolist()
        whole = [
            pair
            for pair in self.pairs(rows)
            if isinstance(pair, EncodedPair) and not (pair.chosen.truncated or pair.rejected.truncated)
        ]
        prompt_bytes, *response_bytes = self._dataset.text_bytes[[pair.index for pair in whole]].sum(axis=0).tolist()

        def of(side: SideName) -> NDArray[np.float64]:
            if not whole:
                return np.ones(3)
            tokens = [pair.chosen.side(side) for pair in whole] + [pair.rejected.side(side) for pair in whole]
            # A prompt stands in both of a pair's sequences.
            prompt = sum(len(sequence.prompt_ids) for sequence in tokens) / max(1, 2 * prompt_bytes)
            response = sum(len(sequence.response_ids) for sequence in tokens) / max(1, sum(response_bytes))
            return np.array([prompt, response, response])

        return {"policy": of("policy"), "reference": of("reference")}
