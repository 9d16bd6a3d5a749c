"""A Hugging Face folder at work, by plain ``transformers``: log-probs of responses, and generations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.data.folder_files import check_files, read_config
from ctpd_nemo.errors import InputError
from ctpd_nemo.json_files import read_object

# torch and transformers are imported where they are used: they take seconds to load.
if TYPE_CHECKING:
    from torch import Tensor

    from ctpd_nemo.data.encoded_pair import EncodedPair, SideTokens
    from ctpd_nemo.data.templates import Side

FloatArray = NDArray[np.float64]

CausalModel = Any
"""What ``AutoModelForCausalLM`` returns; transformers has no one type that can be called and generates."""


# Nothing of a folder is run: no code beside the weights, and no weights that are a pickle.
LOADING = {"trust_remote_code": False, "use_safetensors": True}


class Generation(NamedTuple):
    """One response: its text and token ids without the end of turn, and whether it ended by itself."""

    text: str
    token_ids: list[int]
    ended: bool


def positions(folder: str | Path) -> int | None:
    """Tokens of the longest sequence that the model of a folder knows, where there is a config that says so.

    Raises:
        InputError: ``config.json`` cannot be read.
    """
    config = Path(folder) / "config.json"
    stated = read_object(config, "the config of a model").get("max_position_embeddings") if config.is_file() else None
    return stated if isinstance(stated, int) and stated > 0 else None


def load_model(folder: str | Path, device: str | None = "auto", dtype: str = "auto") -> CausalModel:
    """The model of a folder, in evaluation mode; ``auto`` keeps the dtype that its weights are stored in.

    Its device is what :func:`chosen_device` makes of ``device``.

    A model that is broken stops with its first forward pass: of logits that are no numbers, all that is made later is
    none either, or worse, looks like one.

    Raises:
        InputError: The folder holds no usable model, or other weights than its config describes; there is no such
            device or dtype.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_runs_no_code(folder)
    device = chosen_device(device)
    check_place(device, dtype)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, local_files_only=True, **LOADING
        )
    # Readers of several libraries, and the model's own constructor, each with errors of its own.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise InputError(str(folder), f"no model ({reason})", "a Hugging Face folder of a causal model") from error
    model, report = loaded
    # transformers would draw what is missing at random, and leave out what is too much.
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[key]:
            names = ", ".join(sorted(map(str, report[key]))[:3])
            raise InputError(str(folder), f"{key.replace('_', ' ')}: {names}", "the weights that config.json describes")

    def check_logits(_module: Any, _inputs: Any, output: Any) -> None:
        # The last token has seen all the others, and what is no number passes on to whoever looks at it.
        if not bool(torch.isfinite(output.logits[:, -1]).all()):
            raise InputError(str(folder), f"logits that are not finite, in {model.dtype}", "a model that works")

    model.register_forward_hook(check_logits)
    return model.to(device).eval()


def chosen_device(device: str | None) -> str:
    """The device that a config names; for ``auto``, or nothing, a GPU where there is one, else the CPU."""
    import torch

    if device not in (None, "auto"):
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_place(device: str, dtype: str) -> None:
    """Stop where a model cannot be put there, or not in these numbers.

    Raises:
        InputError: There is no such device or dtype.
    """
    import torch

    kind = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise InputError("dtype", repr(dtype), "auto, float32, bfloat16 or float16")
    try:
        torch.empty(0, device=device)
    # A build of torch without CUDA says so by an assertion.
    except (RuntimeError, AssertionError) as error:
        raise InputError("device", f"{device!r} ({error})", "a device of this machine: cpu, cuda or cuda:1") from error


def check_runs_no_code(folder: str | Path) -> None:
    """Refuse what ``trust_remote_code=False`` leaves open: an attention kernel that would come from a repository.

    Raises:
        InputError: The folder's config names one, or there is no config; its small files are larger than any, or ask
            for tables or modules without end.
    """
    config = Path(folder) / "config.json"
    check_files(folder)
    for key, value in read_config(folder).items():
        if key.endswith("_implementation") and "/" in str(value):
            raise InputError(f"{config}, {key}", repr(value), "an implementation of transformers' own")


def pair_logprobs(model: CausalModel, pairs: Sequence[EncodedPair], batch_size: int) -> tuple[FloatArray, FloatArray]:
    """Summed log-probs of the chosen and of the rejected responses: two float64 ``[n_pairs]``."""
    sequences = [pair.chosen.policy for pair in pairs] + [pair.rejected.policy for pair in pairs]
    logprobs = np.zeros(len(sequences))
    by_length = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        logprobs[batch] = _batch_logprobs(model, [sequences[index] for index in batch])
    return logprobs[: len(pairs)], logprobs[len(pairs) :]


def _batch_logprobs(model: CausalModel, sequences: Sequence[SideTokens]) -> FloatArray:
    """Summed log-probs of each response given its prompt: float64 ``[n_sequences]``, of one right-padded batch."""
    import torch

    ids = [np.concatenate([sequence.prompt_ids, sequence.response_ids]) for sequence in sequences]
    input_ids, mask = _padded(ids, "right", model)
    # Logits of no use, those inside every prompt, are not computed.
    shortest_prompt = min(len(sequence.prompt_ids) for sequence in sequences)
    keep = input_ids.shape[1] - shortest_prompt + 1
    with torch.inference_mode():
        logits = model(input_ids, attention_mask=mask, logits_to_keep=keep).logits[:, :-1].float()
        targets = input_ids[:, shortest_prompt:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    positions = torch.arange(shortest_prompt, input_ids.shape[1], device=input_ids.device)
    starts = torch.tensor([[len(sequence.prompt_ids)] for sequence in sequences], device=input_ids.device)
    ends = torch.tensor([[len(sequence)] for sequence in sequences], device=input_ids.device)
    in_response = (positions >= starts) & (positions < ends)
    return -(losses.double() * in_response).sum(dim=1).cpu().numpy()


def generate(
    model: CausalModel,
    side: Side,
    prompts: Sequence[NDArray[np.int32]],
    batch_size: int,
    max_new_tokens: int,
    sample_seed: int | None = None,
) -> list[Generation]:
    """The response to each prompt, up to its end of turn: greedy, or sampled at temperature 1 where there is a seed."""
    import torch
    from transformers import GenerationConfig

    stops = {int(side.end_of_turn_ids[-1]), side.tokenizer.eos_token_id} - {None}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(stops), pad_token_id=side.pad_token_id
    )
    if sample_seed is not None:
        config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    # The folder's own defaults (temperature, penalties) would fill in what is not said here.
    model.generation_config = config
    responses = [Generation("", [], False)] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(sample_seed or 0)
        for start in range(0, len(by_length), batch_size):
            batch = by_length[start : start + batch_size]
            input_ids, mask = _padded([prompts[index] for index in batch], "left", model)
            output = model.generate(input_ids, attention_mask=mask)
            for index, ids in zip(batch, output[:, input_ids.shape[1] :].tolist(), strict=True):
                end = next((at for at, token in enumerate(ids) if token in stops), len(ids))
                response = _without_end(ids[:end], side.end_of_turn_ids.tolist(), ids[end : end + 1])
                text = str(side.tokenizer.decode(response, clean_up_tokenization_spaces=False))
                responses[index] = Generation(text, response, end < len(ids))
    return responses


def _without_end(ids: list[int], end_of_turn: list[int], stop: list[int]) -> list[int]:
    """The tokens before a stop without those that an end of turn of several tokens has before it."""
    before = end_of_turn[:-1]
    ended = bool(before) and stop == end_of_turn[-1:] and ids[-len(before) :] == before
    return ids[: -len(before)] if ended else ids


def _padded(rows: Sequence[NDArray[np.int32]], side: str, model: CausalModel) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 ``[n_rows, longest]``, padded with id 0, which the mask hides."""
    import torch

    longest = max(map(len, rows))
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[index, place] = row
        mask[index, place] = 1
    return torch.from_numpy(ids).to(model.device), torch.from_numpy(mask).to(model.device)
