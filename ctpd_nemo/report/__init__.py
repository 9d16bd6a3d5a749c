"""Pages to look at: spans over a text, and what became of a run. One HTML file each, nothing fetched.

``spans_page`` and ``run_page`` are the two jobs. What they show comes from ``mismatch``, ``bands`` and ``scores``, and
from ``run_folder``, ``metric_log`` and ``charts``; ``templates`` turns it into HTML, with autoescape on.
"""
