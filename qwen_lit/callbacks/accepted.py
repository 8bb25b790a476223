"""Which of Lightning's callbacks, loggers and strategies work here, checked before anything is loaded."""

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Imported so that the short name of a logger is known, whose package is then asked for by name.
import lightning.pytorch.loggers.neptune  # noqa: F401
from lightning.pytorch.plugins.io import CheckpointIO

from qwen_lit.errors import UserError
from qwen_lit.names import expanded
from qwen_lit.run import Run

REFUSED = {
    "LearningRateFinder": "it needs a step that Lightning makes by itself, and here the module makes it over all its "
    "micro-batches; compare a few values of model.learning_rate with a small trainer.max_steps",
    "BatchSizeFinder": "it changes data.batch_size after rows are grouped and memory is planned; `qwen_lit plan` "
    "tells what fits, data.batch_size and trainer.accumulate_grad_batches set it",
    "GradientAccumulationScheduler": "accumulation is part of the schedule and of the memory plan; set "
    "trainer.accumulate_grad_batches",
    "StochasticWeightAveraging": "it copies the whole module with its frozen base, and puts its own schedule in the "
    "place of model.lr_scheduler; leave it out",
    "WeightAveraging": "it loads and copies the whole module with its frozen base; leave it out",
    "BackboneFinetuning": "the base stays frozen and only the adapter is trained; leave it out",
    "BaseFinetuning": "the base stays frozen and only the adapter is trained; leave it out",
    "ModelPruning": "pruned weights would not be those of the base that the adapter is served on; leave it out",
    "SpikeDetection": "it ends the run at the first loss that is far off; steps that are not finite are skipped and "
    "named by model.max_skipped_steps",
    "OnExceptionCheckpoint": "it saves in the middle of an optimizer step, from which no run goes on exactly; "
    "checkpoint.every_n_train_steps saves between steps",
    "BasePredictionWriter": "`qwen_lit predict` writes its own file; leave it out",
}
"""Lightning's callbacks that cannot do here what they say: the reason and the remedy."""
PACKAGES = {
    "RichProgressBar": ("rich", "rich"),
    "RichModelSummary": ("rich", "rich"),
    "DeviceStatsMonitor": ("psutil", "psutil"),
    "WandbLogger": ("wandb", "wandb"),
    "MLFlowLogger": ("mlflow", "mlflow"),
    "CometLogger": ("comet_ml", "comet-ml"),
    "NeptuneLogger": ("neptune", "neptune"),
    "LitLogger": ("litlogger", "litlogger"),
    "SpikeDetection": ("torchmetrics", "torchmetrics"),
}
"""What a class of Lightning needs beside it: the module and the name to install it by."""
NEED_A_LOGGER = ("LearningRateMonitor", "DeviceStatsMonitor", "ThroughputMonitor")
EVERY_STEP = ("train/loss", "train/grad_norm", "train/lr", "train/supervised_tokens", "train/skipped_steps")
VALIDATED = ("val/loss", "val/perplexity")
STRATEGIES = ("auto", "single_device", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")
TRAINING = ("fit", "plan", "verify_resume")


def check_trainer(config: Any, command: str, run: Run) -> None:
    """Refuse what cannot work, and give each callback of Lightning what it leaves open.

    Args:
        config: of the command, with the sections ``trainer``, ``data`` and ``export``; is changed.
        command: whose configuration it is.
        run: into whose folder callbacks may write.

    Raises:
        UserError: a callback, a logger or an option of the Trainer cannot do what it says.
    """
    trainer = config.trainer
    callbacks = [(one, class_of(one)) for one in _listed(trainer.callbacks)]
    loggers = [(one, class_of(one)) for one in _listed(trainer.logger) if not isinstance(one, bool)]
    for key, found in (("callbacks", callbacks), ("logger", loggers)):
        for _, kind in found:
            _check_package(f"trainer.{key}", kind)
    for given, kind in callbacks:
        if _is(kind, "Timer"):
            # Lightning's default is an enum, which no YAML holds.
            given.init_args.interval = str(getattr(given.init_args.interval, "value", given.init_args.interval))
    if command not in TRAINING:
        return
    if command == "fit" and config.export.checkpoint == "best" and (reason := unvalidated(config)):
        raise UserError(f"export.checkpoint is best, but {reason}, or export.checkpoint: last.")
    _check_options(trainer)
    for given, kind in callbacks:
        for name, reason in REFUSED.items():
            if _is(kind, name):
                raise UserError(f"trainer.callbacks: {kind.__name__} does not work here: {reason}.")
        if trainer.logger is False and kind.__name__ in NEED_A_LOGGER:
            raise UserError(f"trainer.callbacks: {kind.__name__} needs a logger, and trainer.logger is false.")
        if _is(kind, "ModelCheckpoint"):
            _check_model_checkpoint(given.init_args, run)
    own = all(kind.__module__.startswith("lightning.") for _, kind in callbacks)
    for given, kind in callbacks:
        monitor = (given.get("init_args") or {}).get("monitor")
        if monitor is not None:
            _check_monitor(config, kind.__name__, given.init_args, own)


def class_of(given: Any) -> type:
    """The class that a section of the configuration names.

    Raises:
        UserError: it is no class.
    """
    module, _, name = given.class_path.rpartition(".")
    found = getattr(import_module(module), name)
    if not isinstance(found, type):
        raise UserError(f"{given.class_path} is no class.")
    return found


def _listed(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def _is(kind: type, name: str) -> bool:
    """Whether a class is Lightning's of that name, or one made from it."""
    return any(one.__name__ == name and one.__module__.startswith("lightning.") for one in kind.__mro__)


def _check_package(key: str, kind: type) -> None:
    for name, (module, install) in PACKAGES.items():
        if _is(kind, name) and find_spec(module) is None:
            raise UserError(f"{key}: {name} needs the package {install}; pip install {install}")


def _check_options(trainer: Any) -> None:
    if not trainer.enable_checkpointing:
        raise UserError(
            "trainer.enable_checkpointing is false, but a run always saves what it goes on from; to save seldom, "
            "raise checkpoint.every_n_train_steps."
        )
    if trainer.barebones:
        raise UserError("trainer.barebones turns off what saves and reports a run; leave it out.")
    if trainer.use_distributed_sampler:
        raise UserError("trainer.use_distributed_sampler must be false: the rows are shared out by the data itself.")
    bars = [class_of(one).__name__ for one in _listed(trainer.callbacks) if _is(class_of(one), "ProgressBar")]
    if len(bars) > 1 or (bars and trainer.enable_progress_bar is False):
        other = bars[1] if len(bars) > 1 else "trainer.enable_progress_bar: false"
        raise UserError(f"trainer.callbacks: {bars[0]} and {other} cannot both hold; leave one out.")
    strategy = trainer.strategy
    if isinstance(strategy, str) and strategy not in STRATEGIES:
        raise UserError(
            f"trainer.strategy is {strategy}; this trainer runs {', '.join(STRATEGIES)}. A base in 4 bits that "
            "does not fit a card needs no other strategy: the layers that do not fit wait in host memory."
        )
    for plugin in _listed(trainer.plugins):
        if not isinstance(plugin, str) and issubclass(class_of(plugin), CheckpointIO):
            raise UserError(
                f"trainer.plugins: {class_of(plugin).__name__} would take the place of the checkpoints that are whole "
                "or absent; leave it out."
            )


def _check_model_checkpoint(given: Any, run: Run) -> None:
    if given.get("save_on_exception"):
        raise UserError(
            "trainer.callbacks: ModelCheckpoint with save_on_exception saves in the middle of an optimizer step, from "
            "which no run goes on exactly; use every_n_train_steps, every_n_epochs or train_time_interval."
        )
    given.dirpath = given.dirpath or str(run.model_checkpoints)
    if Path(expanded(given.dirpath)).resolve() == run.checkpoints.resolve():
        raise UserError(
            f"trainer.callbacks: ModelCheckpoint's dirpath {given.dirpath} is where the run keeps its own "
            "checkpoints; give another folder."
        )


def _check_monitor(config: Any, name: str, given: Any, own: bool) -> None:
    """Refuse a monitor that will never be logged.

    Args:
        config: of the command.
        name: the callback.
        given: its arguments.
        own: no callback of the user's own could log it.
    """
    key = f"trainer.callbacks: {name} monitors {given.monitor}"
    if own and given.monitor not in (*EVERY_STEP, *VALIDATED):
        raise UserError(f"{key}, which is never logged; it can be one of {', '.join((*VALIDATED, *EVERY_STEP))}.")
    if given.monitor not in VALIDATED or (name == "EarlyStopping" and not given.strict):
        return
    if reason := unvalidated(config):
        raise UserError(f"{key}, but {reason}.")
    every = config.trainer.check_val_every_n_epoch
    if given.get("check_on_train_epoch_end") and every != 1:
        raise UserError(
            f"{key} at the end of every epoch, but validation does not come in each; leave check_on_train_epoch_end "
            "out."
        )


def unvalidated(config: Any) -> str | None:
    """Why no validation will come, with the remedy; None where one will.

    Args:
        config: of a command, with the sections ``trainer`` and ``data``.
    """
    trainer, data = config.trainer, config.data
    if not data.val_size and not data.val_dataset_path:
        return "no rows are held out; set data.val_size or data.val_dataset_path"
    if trainer.limit_val_batches == 0:
        return "trainer.limit_val_batches is 0; leave it out"
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if isinstance(every, int) and epochs and 0 < epochs < every:
        return (
            f"trainer.check_val_every_n_epoch is {every} and trainer.max_epochs {epochs}: nothing is validated; lower "
            "the first"
        )
    return None


def check_held_out(callbacks: Iterable[Any], rows: int) -> None:
    """Refuse a monitor of the validation where no row is held out.

    Raises:
        UserError: a callback waits for a loss that will not come.
    """
    for one in callbacks:
        monitor = getattr(one, "monitor", None)
        if not rows and monitor in VALIDATED and getattr(one, "strict", True):
            raise UserError(
                f"trainer.callbacks: {type(one).__name__} monitors {monitor}, but data.val_size holds out no row; "
                "give a larger share, or a count such as data.val_size: 8."
            )


def explained(error: BaseException) -> str:
    """What has really gone wrong, of a chain of exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())
