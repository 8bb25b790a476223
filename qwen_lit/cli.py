"""The command line: LightningCLI's sections and links, and its exit codes."""

import itertools
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from qwen_lit.callbacks.accepted import check_trainer, explained
from qwen_lit.callbacks.checkpoint import RunCheckpoint
from qwen_lit.callbacks.checkpoint_io import AtomicCheckpointIO, last_checkpoint, step_of
from qwen_lit.callbacks.export import Export
from qwen_lit.callbacks.logger import RunLogger
from qwen_lit.callbacks.metrics import Throughput
from qwen_lit.callbacks.progress import RunProgress
from qwen_lit.callbacks.report import RunReport
from qwen_lit.callbacks.resumed import Resumed
from qwen_lit.callbacks.samples import Samples
from qwen_lit.callbacks.trackers import guard
from qwen_lit.checks import check_paths, check_values
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.distributed import watch_parent
from qwen_lit.errors import RunError, UserError, shortened
from qwen_lit.export import ExportError
from qwen_lit.front import main as main
from qwen_lit.gpu import check_device, check_gpu, check_size
from qwen_lit.hardware import product_dtype
from qwen_lit.hub import fetch
from qwen_lit.keys import wrong_keys
from qwen_lit.logs import set_up_logging
from qwen_lit.model.base import fingerprint
from qwen_lit.model.duration import check_duration
from qwen_lit.model.load import check_weights, count_parameters, load_tokenizer
from qwen_lit.model.module import QwenModule
from qwen_lit.model.resume import compare, stored
from qwen_lit.model.trained import Trained, begin_from, check_shapes, find_adapter, read, take_over
from qwen_lit.parsing import Parser, expand_paths, expanded
from qwen_lit.planner.plan import parse_bytes
from qwen_lit.run import exported_from, find_checkpoint, lock_output_dir, refuse_foreign, refuse_mixing, set_aside
from qwen_lit.signals import Interrupted, handle_signals
from qwen_lit.trainer import QwenTrainer

log = logging.getLogger("qwen_lit")
ALIASES = {"verify-resume": "verify_resume"}
SKIPPED = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule", "weights_only"}
LOADING = ("fit", "validate", "verify_resume", "export", "predict")
"""Commands that read the base's weights."""
FROM_CHECKPOINT = ("fit", "validate", "export", "predict")
"""Commands that take a checkpoint; the others find its key in the configuration of a run."""
OUT_OF_MEMORY = """out of GPU memory. The levers, in order:
  data.batch_size {batch_size} (lower it, raise trainer.accumulate_grad_batches {accumulate} by as much)
  model.gradient_checkpointing {checkpointing} (true keeps only layer inputs)
  model.memory_budget {budget} (for the fast engine: a size below what the card has free, such as 7GiB)
  data.max_length {max_length} (rows that are longer are shortened, or dropped where their answer does not fit)
  model.lora_config.r {r} (fewer trained parameters)
  model.quantization_config (nf4 with bnb_4bit_use_double_quant: true is the smallest)"""


class SaveConfig(SaveConfigCallback):
    """Writes the whole configuration to ``output_dir/config.yaml``, and as text to TensorBoard, when training begins.

    By then every check has passed. What a resumed run was trained with until here is kept as ``config-STEP.yaml``, or
    as ``config-STEP-2.yaml`` and so on where several attempts have gone on from that step.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Nothing yet: Lightning would write before the checkpoint is compared."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Write it."""
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Called on rank zero."""
        text = self.parser.dump(self.config, skip_unset=False)
        folder = Path(self.config["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        path, step = folder / "config.yaml", trainer.global_step
        if step and path.is_file():
            names = (f"config-{step}{'' if number == 1 else f'-{number}'}.yaml" for number in itertools.count(1))
            path.rename(next(folder / name for name in names if not (folder / name).exists()))
        path.write_text(text, encoding="utf-8")
        if isinstance(trainer.logger, RunLogger):
            trainer.logger.add_text("config", "```yaml\n" + text + "\n```", trainer.logger.first_step)


class QwenCLI(LightningCLI):
    """``fit`` and the other subcommands from one YAML."""

    checkpoint: Path | None = None
    """What the run goes on from."""
    trained: Trained | None = None
    """What is exported, asked or measured."""
    wanted: str | None = None
    """The subcommand, where it is known before parsing."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The top-level keys, the sections of our own callbacks, and the links between them."""
        parser.add_argument(
            "--output_dir",
            type=str,
            default="output",
            help="Folder for checkpoints/, lora_adapter/, final_model/, logs/ and config.yaml.",
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Export, "export")
        parser.add_lightning_class_args(Samples, "samples")
        for section in ("checkpoint", "export", "samples"):
            parser.link_arguments("output_dir", f"{section}.output_dir", compute_fn=expanded)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that make sense for this job."""
        return dict.fromkeys(("fit", "validate", "inspect", "plan", "verify_resume", "export", "predict"), SKIPPED)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Only the subcommand that is asked for needs its keys: reading all their docstrings takes a while."""
        parser = self.init_parser(**kwargs)
        if self.wanted in (None, subcommand):
            self._add_arguments(parser)
            # Not as a group: ``export`` is also the name of a section.
            added = parser.add_method_arguments(klass, subcommand, skip=set(SKIPPED), as_group=False)
            self._subcommand_method_arguments[subcommand] = added
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As Lightning's, but wrong keys of the libraries that are installed are told all at once."""
        if self.wanted is not None:
            actions = self._subcommand_parsers[self.wanted]._actions
            known = {action.dest for action in actions if not action.dest.endswith(".help")}
            if lines := wrong_keys(args[1:], known, known):
                raise UserError("\nerror: ".join(lines))
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint into the configuration: what the user wrote is what runs."""

    def before_instantiate_classes(self) -> None:
        """What can be known to be wrong before any class is built."""
        config = self.config[self.subcommand]
        expand_paths(config)
        check_values(config)
        check_paths(str(self.subcommand), config)
        if config.get("memory_budget"):
            parse_bytes(config.memory_budget)
        check_duration(config, str(self.subcommand))
        check_trainer(config, str(self.subcommand))
        first = getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"
        check_gpu(config.trainer.accelerator, tell=first and self.subcommand != "inspect")
        given = config.get("ckpt_path") if self.subcommand in FROM_CHECKPOINT else None
        folder = Path(config.output_dir)
        writes = self.subcommand in ("fit", "export") and not config.trainer.fast_dev_run
        if writes and first:
            self.lock = lock_output_dir(folder)
        self.checkpoint = find_checkpoint(given, folder, fresh=self.subcommand == "fit")
        if self.subcommand == "fit":
            self._begin(config, folder, first)
        elif self.subcommand in ("export", "predict", "validate"):
            self._use_trained(config, folder)

    def _begin(self, config: Any, folder: Path, first: bool) -> None:
        """Whether the run may begin, or go on, in its folder and with its adapter."""
        if self.checkpoint is not None and self.checkpoint.is_dir():
            raise UserError(
                f"ckpt_path: {self.checkpoint} is an adapter, which holds no optimizer and no position to go on from; "
                f"to start a new run from it, set model.init_adapter: {self.checkpoint}."
            )
        if config.model.init_adapter:
            begin_from(config.model, read(self.checkpoint or find_adapter(config.model.init_adapter)))
        if config.trainer.fast_dev_run:
            return
        refuse_mixing(folder, self.checkpoint)
        if config.export.merge:
            refuse_foreign(folder)
        if first and self.checkpoint is None:
            set_aside(folder)

    def _use_trained(self, config: Any, folder: Path) -> None:
        """An adapter is used with what it was trained with, whatever the configuration says."""
        source = self.checkpoint
        if source is None and self.subcommand != "validate":
            wanted = config.export.checkpoint if self.subcommand == "export" else "last"
            source = exported_from(folder, wanted)
            self.checkpoint = source if source.is_file() else None
        if source is None and config.model.init_adapter:
            source = find_adapter(config.model.init_adapter)
        config.model.init_adapter = None
        if source is None:
            return
        if self.subcommand == "export" and source.is_file():
            refuse_mixing(folder, source)
        self.trained = read(source)
        take_over(config.model, self.trained)
        if self.subcommand == "validate" and source.is_dir():
            config.model.init_adapter, self.checkpoint = str(source), None

    def instantiate_classes(self) -> None:
        """Build the sections; what a library refuses of its own keys is the user's to change."""
        try:
            super().instantiate_classes()
        except (AttributeError, MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as error:
            raise UserError(f"configuration: {explained(error)}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with TensorBoard in ``output_dir/logs`` and checkpoints that are whole or absent."""
        config = self.config[self.subcommand]
        if config.trainer.logger in (None, True) and (
            self.subcommand not in ("fit", "export") or config.trainer.fast_dev_run
        ):
            kwargs["logger"] = False
        elif config.trainer.logger in (None, True):
            step = step_of(self.checkpoint) if self.subcommand == "fit" and self.checkpoint else None
            kwargs["logger"] = RunLogger.at(config.output_dir, step)
        if config.trainer.enable_progress_bar is not False:
            given = config.trainer.callbacks
            ours = [] if given and any("ProgressBar" in one.class_path for one in given) else [RunProgress()]
            self.trainer_defaults["callbacks"] += ours
        plugins = config.trainer.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as error:
            raise UserError(f"trainer: {explained(error)}") from error
        for logger in trainer.loggers:
            if not isinstance(logger, RunLogger):
                guard(logger)
        return trainer

    def after_instantiate_classes(self) -> None:
        """Hand the tokenizer to the data, and the written configuration to the export."""
        device = self.trainer.strategy.root_device
        if self.subcommand != "inspect":
            check_device(device)
        if self.subcommand in ("fit", "verify_resume"):
            accelerator = self.config[self.subcommand].trainer.accelerator
            check_size(count_parameters(self.model.config), device, accelerator)
        if self.subcommand in LOADING or (self.subcommand == "plan" and device.type == "cuda"):
            self.model.folder = fetch(self.model.name, self.model.hub, weights=True)
            check_weights(self.model.folder)
        compute_in_float32(self.trainer)
        self.datamodule.tokenizer = load_tokenizer(self.model.folder, self.model.name)
        name = str(self.subcommand)
        self.trainer.resumed_from = self.checkpoint  # type: ignore[attr-defined]
        self.trainer.validated_from = self.checkpoint  # type: ignore[attr-defined]
        keys = {"ckpt_path", *self._subcommand_method_arguments.get(name, [])}
        config = Namespace({key: value for key, value in self.config[name].items() if key not in keys})
        parser = self._subcommand_parsers[name]
        self.trainer.fit_config = parser.dump(config, skip_unset=False, skip_validation=True)  # type: ignore[attr-defined]
        self._dump_config()
        self.model.run_config = self.config_dump
        if name == "fit" and (then := stored(self.checkpoint)):
            compare(then, self.config_dump, fingerprint(self.model.name, self.model.hub))
            # The run has its own weights by now.
            self.model.init_adapter = None
        if self.model.init_adapter is not None:
            check_shapes(self.model.config, self.model.lora_config, self.model.init_adapter)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Export):
                trained = self.trained.config if self.trained else {}
                callback.training_config = trained or self.config_dump

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if "ckpt_path" in kwargs:
            kwargs["ckpt_path"] = str(self.checkpoint) if self.checkpoint else None
        return kwargs


def compute_in_float32(trainer: Any) -> None:
    """On a CPU that would emulate bfloat16; the configuration keeps its precision for other machines."""
    device = trainer.strategy.root_device
    if product_dtype(device) == torch.float32 and trainer.precision in ("bf16-mixed", "bf16-true"):
        trainer.strategy.precision_plugin = Precision()


def run(given: list[str]) -> int:
    """Run one command whose keys are known; returns the exit code."""
    set_up_logging()
    watch_parent()
    cli = QwenCLI.__new__(QwenCLI)
    # The comments of a configuration are help too. Reading what stands below attributes takes half a second.
    shown = any("help" in one or "print_config" in one for one in given)
    set_parsing_settings(docstring_parse_attribute_docstrings=shown)
    args = [ALIASES.get(one, one) for one in given]
    cli.wanted = args[0] if args[0] in QwenCLI.subcommands() else None
    with handle_signals():
        return _run(cli, args)


def begin(cli: QwenCLI, args: list[str]) -> None:
    """Parse a command and run it."""
    cli.__init__(  # type: ignore[misc]
        QwenModule,
        QwenDataModule,
        trainer_class=QwenTrainer,
        parser_class=Parser,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
        trainer_defaults={
            "callbacks": [Resumed(), Throughput(), RunReport()],
            "enable_model_summary": False,
            "enable_checkpointing": True,
            "use_distributed_sampler": False,
        },
        seed_everything_default=42,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=args,
    )


def _run(cli: QwenCLI, args: list[str]) -> int:
    try:
        begin(cli, args)
    except UserError as error:
        log.debug("where it was found", exc_info=error)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ExportError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        return stop.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except Exception as error:
        return failed(error, cli)
    return cli.trainer.exit_code  # type: ignore[attr-defined]


def failed(error: Exception, cli: QwenCLI) -> int:
    """Say what an unexpected error means for the run; returns the exit code."""
    if isinstance(error, torch.OutOfMemoryError):
        config = cli.config[cli.subcommand]
        text = OUT_OF_MEMORY.format(
            batch_size=config.data.batch_size,
            accumulate=config.trainer.accumulate_grad_batches,
            checkpointing=config.model.gradient_checkpointing,
            budget=config.model.memory_budget,
            max_length=config.data.max_length,
            r=config.model.lora_config.r,
        )
        print(f"error: {text}", file=sys.stderr)
        return 1
    traceback.print_exception(error)
    trainer = getattr(cli, "trainer", None)
    reason = f"{type(error).__name__}: {shortened(' '.join(str(error).split()))}"
    if trainer is not None and trainer.state.fn == "fit" and _saved(cli):
        text = f"the run failed ({reason}); its checkpoints are whole, resume it with --ckpt_path last"
    else:
        text = f"{getattr(cli, 'subcommand', None) or 'the command line'} failed: {reason}"
    print(f"error: {text}", file=sys.stderr)
    return 1


def _saved(cli: QwenCLI) -> bool:
    """Whether there is a checkpoint to go on from."""
    return last_checkpoint(Path(cli.config[cli.subcommand].output_dir) / "checkpoints") is not None
