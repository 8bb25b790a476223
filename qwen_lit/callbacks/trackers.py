"""What any logger gets beside the metrics: configuration, answers and verdict. One that fails never ends a run."""

import json
import logging
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from qwen_lit.callbacks.logger import RunLogger
from qwen_lit.errors import UserError
from qwen_lit.lines import question

log = logging.getLogger(__name__)
CALLED = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")
"""What Lightning calls of a logger while a run is under way."""
COLUMNS = ("step", "question", "answer", "stopped", "wanted")


def guard(logger: Any) -> None:
    """Let what fails in a logger of others be a warning, once, and the run go on.

    A logger that cannot begin, as one without a login, is refused before the model is loaded.

    Args:
        logger: of Lightning's kind; its class is changed in place, to one made from it.
    """
    kind = type(logger)
    changed: dict[str, Any] = {name: _quiet(kind, name) for name in CALLED}
    if isinstance(own := getattr(kind, "experiment", None), property):
        changed["experiment"] = property(lambda self: _begun(self, own))
    logger.__class__ = type(kind.__name__, (kind,), changed)
    logger.lost = False


def _quiet(kind: type, name: str) -> Callable[..., None]:
    def call(self: Any, *given: Any, **named: Any) -> None:
        attempt(self, lambda: getattr(kind, name)(self, *given, **named))

    return call


def _begun(logger: Any, own: property) -> Any:
    try:
        found = own.fget(logger)  # type: ignore[misc]
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        name = type(logger).__name__
        raise UserError(f"trainer.logger: {name} cannot begin ({reason}); set it up, or leave it out.") from error
    return found


def attempt(logger: Any, do: Callable[[], Any]) -> None:
    """Do something with a logger; its first failure is a warning, and later ones are silent."""
    try:
        do()
    except Exception as error:
        if not getattr(logger, "lost", False):
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning("%s has failed (%s); training goes on", type(logger).__name__, reason)
        logger.lost = True


def log_config(loggers: list[Any], params: dict[str, Any]) -> None:
    """The configuration as hyperparameters.

    Args:
        loggers: of the trainer.
        params: flat, numbers as numbers.
    """
    for logger in loggers:
        attempt(logger, lambda logger=logger: logger.log_hyperparams(params))  # type: ignore[misc]


def log_samples(loggers: list[Any], lines: list[dict[str, Any]], new: int) -> None:
    """Answers to fixed prompts: a table or a file of all of them where there is one, and texts elsewhere.

    Args:
        loggers: of the trainer.
        lines: of ``samples.jsonl``, all of them.
        new: so many of the last ones have come now, all of one step.
    """
    rows = [[one["step"], question(one["prompt"]), one["answer"], one["stopped"], one["wanted"]] for one in lines]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    now, step = lines[-new:], lines[-1]["step"]
    for logger in loggers:
        if isinstance(logger, RunLogger):
            for number, line in enumerate(now):
                logger.add_text(f"sample/{number + 1}", _markdown(line), step)
        else:
            attempt(logger, lambda logger=logger: _log_others(logger, rows, text, now, max(0, step - 1)))  # type: ignore[misc]


def _log_others(logger: Any, rows: list[list[Any]], text: str, now: list[dict[str, Any]], step: int) -> None:
    if hasattr(logger, "log_table"):  # W&B
        logger.log_table("samples", columns=list(COLUMNS), data=rows, step=step)
    elif hasattr(logger, "run_id"):  # MLflow
        logger.experiment.log_text(logger.run_id, text, "samples.jsonl")
    elif hasattr(logger, "log_text"):  # SwanLab
        for number, line in enumerate(now):
            logger.log_text(f"sample/{number + 1}", [_markdown(line)], step=step)
    elif isinstance(logger, TensorBoardLogger):
        for number, line in enumerate(now):
            logger.experiment.add_text(f"sample/{number + 1}", _markdown(line), step)


def _markdown(line: dict[str, Any]) -> str:
    return f"**{question(line['prompt'])}**\n\n{line['answer']}"


def log_verdict(loggers: list[Any], verdict: dict[str, Any], step: int) -> None:
    """How near the merged model is to the adapter: numbers to every logger, and a table or a file where there is one.

    Args:
        loggers: of the trainer.
        verdict: as ``Verdict.as_dict`` gives it.
        step: the optimizer step that the adapter is of, counted from 1.
    """
    values = {"verdict/adapter_loss": verdict["adapter_loss"]}
    for name, one in verdict["merges"].items():
        values |= {f"verdict/{name}_{key}": value for key, value in one.items()}
    rows = [["adapter", verdict["adapter_loss"], None, None]]
    rows += [[f"merge, {name}", one["loss"], one["kl"], one["same_top"]] for name, one in verdict["merges"].items()]

    def send(logger: Any) -> None:
        logger.log_metrics(values, max(0, step - 1))
        if hasattr(logger, "log_table"):
            columns = ["model", "loss", "kl", "same_top"]
            logger.log_table("verdict", columns=columns, data=rows, step=max(0, step - 1))
        elif hasattr(logger, "run_id"):
            logger.experiment.log_text(logger.run_id, json.dumps(verdict, indent=1), "verdict.json")
        logger.save()

    for logger in loggers:
        attempt(logger, lambda logger=logger: send(logger))  # type: ignore[misc]
