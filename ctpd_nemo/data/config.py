"""What a user says about the data."""

from dataclasses import dataclass, field

from ctpd_nemo.errors import InputError

# A token of prose has four bytes or so; what has more than 64 a token, or cannot be cut to a part of it, is no prose.
_LEAST_BYTES, _BYTES_A_TOKEN = 2**20, 64
# More processes than any machine has cores are a slip of the pen.
_MOST_WORKERS = 1024


@dataclass
class DataConfig:
    """Files, lengths and batches.

    Attributes:
        train: Preference files, patterns of such (``data/*.jsonl``) or folders of them; read as one, in this order.
        validation: The same, held out; may be empty.
        split: Which split of a folder that holds several.
        on_bad: What to do with a row that cannot be used: "stop", or "skip" and count it.
        max_row_bytes: Longest row, in UTF-8 bytes of prompt and both responses; a longer one cannot be used. ``None``:
            a megabyte, or 64 bytes for each token of ``max_length`` where that is more.
        warn_skipped: Share of pairs that may be skipped without a warning while training or scoring goes on.
        max_length: Longest sequence, prompt and response, in tokens of either tokenizer.
        max_prompt_length: Longest prompt in tokens; a pair with a longer one is skipped and counted. ``None``: any.
        include_eos: Whether the end of the turn is trained and scored, as one last span of its own.
        response_text: "written" trains responses as the data has them, "rendered" as the chat templates of both sides
            write them: without the white space around them, or the reasoning in them, that a template drops.
        global_batch_size: Pairs an optimizer step.
        microbatch_tokens: Tokens a microbatch holds at most; at least ``2 * max_length``, so that any pair fits.
        packing: "packed" puts sequences end to end; "padded" pads each to the longest of its microbatch.
        shuffle: Draw a new order each epoch.
        num_workers: Dataloader workers that read, tokenize, align and pack; 0 does it in the training process.
        encoded: Where encoded datasets are kept: pairs are tokenized and aligned once, before the first step, and read
            from memory-mapped files by all jobs that read them alike. A folder, or "auto" for ``encoded`` beside the
            run folder; ``None`` encodes pairs as they are needed, in every epoch and job anew.
    """

    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    split: str | None = None
    on_bad: str = "stop"
    max_row_bytes: int | None = None
    warn_skipped: float = 0.1
    max_length: int = 2048
    max_prompt_length: int | None = None
    include_eos: bool = True
    response_text: str = "written"
    global_batch_size: int = 16
    microbatch_tokens: int = 4096
    packing: str = "packed"
    shuffle: bool = True
    num_workers: int = 2
    encoded: str | None = None

    def check(self) -> None:
        """Stop with an ``InputError`` that names the key of a value that cannot be used."""
        if self.on_bad not in ("stop", "skip"):
            raise InputError("data.on_bad", repr(self.on_bad), "stop or skip")
        if self.packing not in ("packed", "padded"):
            raise InputError("data.packing", repr(self.packing), "packed or padded")
        if self.response_text not in ("written", "rendered"):
            raise InputError("data.response_text", repr(self.response_text), "written or rendered")
        for name in ("max_length", "global_batch_size", "microbatch_tokens", "max_row_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"data.{name}", str(value), "1 or more")
        if not 0 <= self.warn_skipped <= 1:
            raise InputError("data.warn_skipped", str(self.warn_skipped), "a share, from 0 to 1")
        if not 0 <= self.num_workers <= _MOST_WORKERS:
            raise InputError("data.num_workers", str(self.num_workers), f"0 or more, at most {_MOST_WORKERS}")
        if self.encoded == "":
            raise InputError("data.encoded", "''", "auto, a folder, or null")
        if self.microbatch_tokens < 2 * self.max_length:
            raise InputError(
                "data.microbatch_tokens",
                str(self.microbatch_tokens),
                f"at least twice data.max_length, {2 * self.max_length}: both responses of a pair travel together",
            )


def longest_row(max_length: int, max_row_bytes: int | None = None) -> int:
    """UTF-8 bytes of a row at most.

    Args:
        max_length: Longest sequence in tokens.
        max_row_bytes: What a user says.
    """
    return max(_LEAST_BYTES, _BYTES_A_TOKEN * max_length) if max_row_bytes is None else max_row_bytes
