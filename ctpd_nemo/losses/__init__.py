"""Tensors in, a scalar out: plain functions; a process group comes in as an argument.

Read ``logprobs`` (hidden states to token log-probs), then ``spans`` (token to span to response), ``weights`` and
``preference``.
"""
