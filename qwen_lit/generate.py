"""Generation: one way to have a model go on from token ids, for samples, predictions, tries and chat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qwen_lit.export.serving import end_tokens


@dataclass(frozen=True)
class Answer:
    """What a model has added to a prompt."""

    ids: list[int]
    """Token ids, an end token that came included, without padding."""
    text: str
    """The ids as text, without special tokens."""
    ended: bool
    """Whether the model ended it by itself; otherwise it was cut at the most tokens."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sample: bool = False,
    own_ends: bool = False,
    **options: Any,
) -> list[Answer]:
    """The continuation of each prompt, all of them as one batch that is padded on the left.

    Args:
        model: for causal language modelling, in evaluation mode, on its device.
        tokenizer: of the model.
        prompts: token ids of each, at least one.
        max_new_tokens: most tokens of an answer.
        sample: draw by the model's generation config; False takes the likeliest token.
        own_ends: the model ends where its generation config says, as a server reads it; otherwise at the tokenizer's
            end tokens.
        options: further arguments of ``model.generate``, such as ``streamer``.

    Returns:
        An answer for each prompt.
    """
    ends = end_tokens(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[-1]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(one)) + list(one) for one in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=model.device)
    arguments = {} if own_ends else {"eos_token_id": ends, "pad_token_id": pad}
    arguments |= {} if sample else {"do_sample": False}
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **arguments, **options)
    return [_answer(row, tokenizer, ends) for row in out[:, width:].tolist()]


def _answer(ids: list[int], tokenizer: Any, ends: Sequence[int]) -> Answer:
    """The ids up to the first end token; what follows it is padding."""
    last = next((number for number, one in enumerate(ids) if one in ends), None)
    ids = ids if last is None else ids[: last + 1]
    return Answer(ids, tokenizer.decode(ids, skip_special_tokens=True), last is not None)
