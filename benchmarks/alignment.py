"""Time of aligning spans beside the time of tokenizing the same texts.

    python benchmarks/alignment.py --tokenizers FOLDER FOLDER ... [--texts pairs.jsonl] [--json FILE]

Every ordered pair of the tokenizers takes its turn on the same batches. One turn tokenizes a batch with both sides
(ids taken out of the encodings: what any data loader must do), then does the rest of ``align_batch`` on those ids; the
two parts are timed apart. A second figure is the tokenization that keeps character offsets, as an aligner that works by
offsets would need it. One thread, as in a data loader's worker. A batch's time is its median over the repeats.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import time
from pathlib import Path

from report import Table, add_report_arguments, begin, write_report
from transformers import AutoTokenizer

from ctpd_nemo.spans import align_batch
from ctpd_nemo.spans.align import intersect
from ctpd_nemo.spans.byte_ends import place_ends, utf8
from ctpd_nemo.spans.text_reader import TextReader, text_reader


def main() -> None:
    """Measure every ordered pair of tokenizers, report."""
    arguments = parse_arguments()
    begin(arguments)
    # Read when a tokenizer is first called.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    texts = read_texts(arguments.texts)[: arguments.limit] if arguments.texts else generated_texts(arguments.limit)
    tokenizers = {Path(folder).name: AutoTokenizer.from_pretrained(folder) for folder in arguments.tokenizers}
    n_bytes = sum(len(data) for data in utf8(texts))
    pairs = []
    for teacher, student in itertools.permutations(tokenizers, 2):
        readers = text_reader(tokenizers[teacher]), text_reader(tokenizers[student])
        check_parts_make_the_whole(texts[:8], tokenizers[teacher], tokenizers[student])
        for batch_size in arguments.batch_sizes:
            sides = {"teacher": teacher, "student": student, "batch_size": batch_size}
            pairs.append(sides | measure(texts, batch_size, *readers, repeats=arguments.repeats))
    results = {"n_texts": len(texts), "n_bytes": n_bytes, "pairs": pairs}
    write_report("Aligning spans beside tokenizing", [pairs_table(results, arguments)], results, arguments)


def pairs_table(results: dict, arguments: argparse.Namespace) -> Table:
    """One row an ordered pair of tokenizers and a size of batch."""
    mean = results["n_bytes"] / results["n_texts"]
    caption = f"{results['n_texts']} texts, {mean:.0f} bytes each on average; medians of {arguments.repeats} repeats."
    header = ["teacher", "student", "batch", "tokenize, ms", "with offsets, ms", "align, ms", "align / tokenize"]
    rows = [
        [
            *(str(row[name]) for name in ("teacher", "student", "batch_size")),
            *(f"{row[name]:.1f}" for name in ("tokenize_ms", "with_offsets_ms", "align_ms")),
            f"{row['align_over_tokenize']:.1%}",
        ]
        for row in results["pairs"]
    ]
    return Table(caption, header, rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="+", required=True, help="two or more Hugging Face tokenizer folders")
    parser.add_argument("--texts", help="JSONL: rows with `text`, or preference pairs with `chosen` and `rejected`")
    parser.add_argument("--limit", type=int, default=256, help="how many texts")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--repeats", type=int, default=7)
    add_report_arguments(parser)
    return parser.parse_args()


def read_texts(path: str) -> list[str]:
    """The texts of a JSONL file; of a preference pair both responses."""
    texts = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for key in ("text", "chosen", "rejected"):
            if key in row:
                texts.append(row[key] if isinstance(row[key], str) else row[key][-1]["content"])
    return texts


def generated_texts(count: int) -> list[str]:
    """Texts of 50 to 400 words: invented words, some Chinese and Arabic letters, numbers, code and emoji."""
    rng = random.Random(0)
    syllables = ["ba", "con", "der", "ing", "lo", "mi", "per", "qua", "rst", "the", "tion", "un"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(2000)]
    words += ["".join(map(chr, rng.choices(range(0x4E00, 0x9000), k=3))) for _ in range(100)]
    words += ["".join(map(chr, rng.choices(range(0x621, 0x64A), k=5))) for _ in range(100)]
    words += ["🦙", "é", "3.14", "2024", "\n\n", "\tif x:\n", "'s", "{}", "—"] * 10
    return [" ".join(rng.choices(words, k=rng.randint(50, 400))) for _ in range(count)]


def check_parts_make_the_whole(texts, teacher, student) -> None:
    """The parts that are timed are what ``align_batch`` does, or this stops."""
    readers = text_reader(teacher), text_reader(student)
    parts = align_ids(texts, [reader.ids(texts) for reader in readers], readers)
    for part, whole in zip(parts, align_batch(texts, teacher, student), strict=True):
        assert part.bounds.tolist() == whole.bounds.tolist()
        assert part.teacher_span.tolist() == whole.teacher_span.tolist()


def align_ids(texts, rows, readers):
    """All of ``align_batch`` behind the tokenization."""
    encoded = utf8(texts)
    return intersect(*(place_ends(texts, encoded, row, reader) for row, reader in zip(rows, readers, strict=True)))


def measure(texts: list[str], batch_size: int, teacher: TextReader, student: TextReader, repeats: int) -> dict:
    """Milliseconds over all texts: tokenization of both sides, the same with offsets, and alignment."""
    batches = [texts[begin : begin + batch_size] for begin in range(0, len(texts), batch_size)]
    names = ("tokenize_ms", "align_ms", "with_offsets_ms")
    times: dict[str, list[list[float]]] = {name: [[] for _ in batches] for name in names}
    # The repeats go around the batches, so that no batch finds its own words in the tokenizers' caches.
    for _ in range(repeats):
        for index, batch in enumerate(batches):
            start = time.perf_counter()
            rows = [reader.ids(batch) for reader in (teacher, student)]
            tokenized = time.perf_counter()
            align_ids(batch, rows, (teacher, student))
            aligned = time.perf_counter()
            for reader in (teacher, student):
                encodings = reader.backend.encode_batch(batch, add_special_tokens=False)
                [(encoding.ids, encoding.offsets) for encoding in encodings]
            end = time.perf_counter()
            for name, seconds in zip(names, (tokenized - start, aligned - tokenized, end - aligned), strict=True):
                times[name][index].append(1e3 * seconds)
    totals = {name: sum(statistics.median(values) for values in times[name]) for name in names}
    return totals | {"align_over_tokenize": totals["align_ms"] / totals["tokenize_ms"]}


if __name__ == "__main__":
    main()
