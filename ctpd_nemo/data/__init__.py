"""Preference files to microbatches.

A pair walks from ``files`` (a row) to ``forms`` (a pair) and ``preferences`` (a checked dataset), through ``templates``
and ``encode`` (token ids, shared spans), to ``packing``, ``batch`` (microbatches) and the ``loader`` (one item a step).
"""
