"""CTPD in plain PyTorch, as the paper describes it: the teacher is a frozen model beside the student.

Chosen and rejected responses are padded to the longest of the batch and go through the model together; log-probs are
``log_softmax`` over all logits. Token ids, spans and the importance weights are computed beforehand (the paper's figure
1 has "pre-compute aligned span weights"), so that of the three teachers only the reference is in the loop.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM
from turns import Turn

from side_by_side.setting import BETA, Setting


def plain_ctpd(turn: Turn, setting: Setting) -> None:
    """Train the student."""
    student = AutoModelForCausalLM.from_pretrained(setting.student, dtype=torch.float32).train()
    teacher = AutoModelForCausalLM.from_pretrained(setting.teacher("reference"), dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=setting.learning_rate, weight_decay=0.0)
    pairs = setting.read_pairs()
    turn()
    for step in range(setting.steps):
        batch = setting.batch_of_step(pairs, step)
        responses = [pair["chosen"] for pair in batch] + [pair["rejected"] for pair in batch]
        spans = max(len(response["weights"]) for response in responses)
        with torch.no_grad():
            reference_BS = span_logprobs(teacher, [response["teacher"] for response in responses], spans)
        policy_BS = span_logprobs(student, [response["student"] for response in responses], spans)
        weights_BS = pad([torch.tensor(response["weights"]) for response in responses], 0.0, spans)
        chosen, rejected = (weights_BS * (policy_BS - reference_BS)).sum(1).chunk(2)
        loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        logprobs_chosen, logprobs_rejected = policy_BS.detach().sum(1).chunk(2)
        turn(
            loss=loss.item(),
            logprob_chosen=logprobs_chosen.mean().item(),
            logprob_rejected=logprobs_rejected.mean().item(),
        )


def span_logprobs(model: Any, sides: list[dict[str, list[int]]], spans: int) -> Tensor:
    """Log-probs of the spans of a batch of responses, ``[B, spans]``, zero where a response has fewer."""
    tokens_BT = pad([torch.tensor(side["prompt"] + side["response"]) for side in sides], 0)
    attended_BT = pad([torch.ones(len(side["prompt"]) + len(side["response"])) for side in sides], 0)
    # Tokens of the prompt, and padding, belong to a span of their own, which is left out.
    span_BT = pad([torch.tensor([spans] * len(side["prompt"]) + side["span"]) for side in sides], spans)
    logits_BTV = model(input_ids=tokens_BT, attention_mask=attended_BT, use_cache=False).logits
    logprobs_BTV = F.log_softmax(logits_BTV[:, :-1], dim=-1)
    logprobs_BT = logprobs_BTV.gather(2, tokens_BT[:, 1:, None]).squeeze(2)
    return logprobs_BT.new_zeros(len(sides), spans + 1).scatter_add(1, span_BT[:, 1:], logprobs_BT)[:, :spans]


def pad(rows: list[Tensor], value: float, length: int | None = None) -> Tensor:
    """Rows of different lengths as one tensor, padded at the end."""
    length = length or max(map(len, rows))
    return torch.stack([F.pad(row, (0, length - len(row)), value=value) for row in rows])
