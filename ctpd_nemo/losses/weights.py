r"""Importance weights of spans: how they are made of scores, and how they may be spread over a response.

.. math:: w_s = k \exp(\mu \, clamp(\rho_s, L, U))

(CTPD, section 3.4, with its signs of :math:`\mu`: +1 in chosen, -1 in rejected responses). They do not follow from the
derivation: by theorem 2 the ideal data are the real ones divided by :math:`k \exp(\mu r)`, so the weight in the loss of
section 3.3 is one over that, :math:`\mu` with the other sign. Section 3.4 is what the authors' code computes, and what
is computed here.

Weightings differ in the log-ratio :math:`\rho` of a span: that of a contrastive pair of models, of the fine-tuned
teacher and student, or the margin of one model. Others keep these weights and change where they lie.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from ctpd_nemo.losses.spans import sum_by


def exponential_weights(
    ratio_S: Tensor, sign: float | Tensor, scale: float = 1.0, lower: float = -0.5, upper: float = 1.5
) -> Tensor:
    r""":math:`k \exp(\mu \, clamp(\rho_s, L, U))`.

    Args:
        ratio_S: ``rho``, in nats, ``[S]``.
        sign: ``mu``: +1 for a chosen response, -1 for a rejected one.
        scale: ``k``.
        lower: ``L``.
        upper: ``U``.
    """
    return scale * torch.exp(sign * torch.clamp(ratio_S, lower, upper))


def average_weights(weights_S: Tensor, length_S: Tensor) -> Tensor:
    """Each weight divided by the length of its span (CTPD, section 4.3, "average weight").

    Args:
        weights_S: Weights, ``[S]``.
        length_S: Tokens of each span, at least 1.
    """
    return weights_S / length_S


def constant_weights(weights_S: Tensor, response_S: Tensor, num_responses: int) -> Tensor:
    """The mean weight of a response on all of its spans: as much weight in all, and none of it in a place of its own.

    Args:
        weights_S: Weights, ``[S]``.
        response_S: The response of each span, int64 ``[S]``.
        num_responses: How many responses there are.
    """
    spans_R = sum_by(torch.ones_like(weights_S), response_S, num_responses)
    mean_R = sum_by(weights_S, response_S, num_responses) / spans_R.clamp(min=1)
    return mean_R[response_S]


def shuffled_weights(weights_S: Tensor, draw_S: Tensor, response_S: Tensor) -> Tensor:
    """The weights of a response on its spans in another order: the same weights, in places that mean nothing.

    Args:
        weights_S: Weights, ``[S]``.
        draw_S: A number of each span; a response's weights are put in the order of its numbers.
        response_S: The response of each span, int64 ``[S]``, ascending.
    """
    order_S = torch.argsort(draw_S, stable=True)
    order_S = order_S[torch.argsort(response_S[order_S], stable=True)]
    return weights_S[order_S]


def draw(seed: int, pair_id: str, response: str, size: int) -> Tensor:
    """Numbers from U(-1, 1), fp32 ``[size]``, that depend on the arguments alone: not on worker, layout or epoch.

    The stream of NumPy's Philox generator is fixed for all versions (NEP 19).

    Args:
        seed: Of the run.
        pair_id: Which pair: a name that no other has.
        response: "chosen" or "rejected".
        size: How many.
    """
    key = hashlib.blake2b(f"{seed}\0{response}\0{pair_id}".encode(), digest_size=16).digest()
    raw = np.random.Philox(key=np.frombuffer(key, dtype="<u8")).random_raw(size)
    # Odd multiples of 2**-24: fp32 holds each of them, and neither an end nor zero is among them.
    return torch.from_numpy((((raw >> np.uint64(40)) * 2.0 + 1.0) * 2.0**-24 - 1.0).astype(np.float32))
