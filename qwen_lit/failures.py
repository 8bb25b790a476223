"""What ends a command other than its end: a line for the user, and the exit code."""

import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

from qwen_lit.errors import RunError, UserError, shortened
from qwen_lit.export import ExportError
from qwen_lit.signals import Interrupted

log = logging.getLogger("qwen_lit")
OUT_OF_MEMORY = """out of GPU memory. The levers, in order:
  data.batch_size {batch_size} (lower it, raise trainer.accumulate_grad_batches {accumulate} by as much)
  model.gradient_checkpointing {checkpointing} (true keeps only layer inputs)
  model.memory_budget {budget} (for the fast engine: a size below what the card has free, such as 7GiB; layers of a
    base in 4 bits that have no room then wait in host memory)
  model.engine {engine} (the fast engine alone streams layers; reference keeps all on the card)
  data.max_length {max_length} (rows that are longer are shortened, or dropped where their answer does not fit)
  model.lora_config.r {r} (fewer trained parameters)
  model.quantization_config (nf4 with bnb_4bit_use_double_quant: true is the smallest)"""


def exit_code(
    error: BaseException, command: str, saved: Callable[[], bool] = lambda: False, config: Any = None
) -> int:
    """Say what an exception means for the command.

    Args:
        error: that ended it.
        command: as the user calls it.
        saved: tells whether ``fit`` was under way, and a checkpoint is there to go on from.
        config: of the command, where its classes were built; when memory runs out, ``levers`` reads it.

    Returns:
        2 for what the user can change, 1 for work that failed, 130 and 143 for signals.
    """
    if isinstance(error, UserError):
        log.debug("where it was found", exc_info=error)
        return _report(error, 2)
    if isinstance(error, ExportError | RunError):
        return _report(error, 1)
    if isinstance(error, Interrupted):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    if not isinstance(error, Exception):
        raise error
    if isinstance(error, torch.OutOfMemoryError) and config is not None:
        return _report(levers(config), 1)
    traceback.print_exception(error)
    reason = f"{type(error).__name__}: {shortened(' '.join(str(error).split()))}"
    if saved():
        return _report(f"the run failed ({reason}); its checkpoints are whole, resume it with --ckpt_path last", 1)
    return _report(f"{command} failed: {reason}", 1)


def levers(config: Any) -> str:
    """What can be changed when GPU memory runs out, with the values of now.

    Args:
        config: of a command, with the sections ``data``, ``trainer`` and ``model``.
    """
    return OUT_OF_MEMORY.format(
        batch_size=config.data.batch_size,
        accumulate=config.trainer.accumulate_grad_batches,
        checkpointing=config.model.gradient_checkpointing,
        budget=config.model.memory_budget,
        engine=config.model.engine,
        max_length=config.data.max_length,
        r=config.model.lora_config.r,
    )


def _report(text: object, code: int) -> int:
    print(f"error: {text}", file=sys.stderr)
    return code
