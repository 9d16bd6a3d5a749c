"""Text to aligned spans: the smallest runs of teacher tokens and student tokens that cover the same bytes.

The idea: write both tokenizations on one ruler, the bytes of ``text.encode("utf-8")``. Every token of either side
ends at some byte. The bytes at which *both* sides end a token are the bounds; the tokens between two bounds are a span.

So all the work is to know the byte at which a token ends:

1. ``text_backend``: a private copy of the tokenizer that reads special tokens' strings as text and trims nothing.
2. ``pieces``: the bytes that each token id stands for, and the text that a row of ids spells.
3. ``byte_ends``: when the ids spell the text, ends are a running sum of byte lengths and exact by construction;
   when a normalizer changed the text, ends are traced back through the tokenizer's character offsets (``tracing``).
4. ``align``: the intersection of the two sides, vectorised over a batch of texts.

``given_ids`` does the same for ids that a model has sampled, whose text is what they spell.
"""

from ctpd_nemo.spans.align import AlignedSpans, align, align_batch
from ctpd_nemo.spans.byte_ends import token_byte_ends
from ctpd_nemo.spans.given_ids import align_ids, align_ids_batch

__all__ = ["AlignedSpans", "align", "align_batch", "align_ids", "align_ids_batch", "token_byte_ends"]
