"""Cross-entropy on supervised positions alone, a chunk of rows at a time; and PEFT's own path to it."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from qwen_lit.data.batches import Batch
from qwen_lit.families.layer import Family
from qwen_lit.model.documents import Documents


def _chunk_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(head(hidden).float(), targets, reduction="sum")


def summed_loss(head: nn.Module, hidden: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Sum of the negative log-likelihood over rows, never holding more than one chunk of logits.

    Args:
        head: maps ``[n, hidden]`` to ``[n, vocab]``.
        hidden: ``[n, hidden]``, the final hidden state of each supervised position.
        targets: ``[n]`` int64, the token that follows each of them.
        chunk: rows of logits that exist at a time; backward recomputes them.

    Returns:
        A float32 scalar, in nats. Zero, with a graph, when there is no row.
    """
    total = hidden.float().sum() * 0.0
    for start in range(0, hidden.shape[0], chunk):
        rows, wanted = hidden[start : start + chunk], targets[start : start + chunk]
        if torch.is_grad_enabled():
            total = total + checkpoint(_chunk_loss, head, rows, wanted, use_reentrant=False)
        else:
            total = total + _chunk_loss(head, rows, wanted)
    return total


def reference_loss(model: nn.Module, family: Family, batch: Batch) -> Tensor:
    """The summed loss of a batch by the modules of transformers and PEFT.

    Args:
        model: transformers' model for causal language modelling, with adapters in its layers, for which
            ``keep_apart`` was called.
        family: where the decoder and the head stand in it.
        batch: on the model's device.

    Returns:
        A float32 scalar, in nats.
    """
    decoder = model.get_submodule(family.decoder)
    ids, positions = batch["input_ids"], batch["position_ids"]
    packed = ids.shape[0] == 1 and len(batch["lengths"]) > 1
    # Attention finds the borders in the positions; linear attention is told them.
    borders = {"documents": Documents(batch)} if packed else {}
    hidden = decoder(input_ids=ids, position_ids=positions, use_cache=False, **borders).last_hidden_state
    rows = hidden.flatten(0, 1).index_select(0, batch["target_index"])
    return summed_loss(model.get_submodule(family.head), rows, batch["targets"])
