"""The command line: LightningCLI's sections, what is checked before a class is built, and how a command is run."""

import dataclasses
import inspect
import json
from collections.abc import Collection
from typing import Any

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from yaml import YAMLError

from qwen_lit import waiting
from qwen_lit.callbacks.accepted import explained
from qwen_lit.callbacks.checkpoint import RunCheckpoint
from qwen_lit.callbacks.checkpoint_io import AtomicCheckpointIO, last_checkpoint, step_of
from qwen_lit.callbacks.config_file import ConfigFile
from qwen_lit.callbacks.export import Export
from qwen_lit.callbacks.link import LinkGuard
from qwen_lit.callbacks.logger import RunLogger
from qwen_lit.callbacks.metrics import Throughput
from qwen_lit.callbacks.products import ProductsGuard
from qwen_lit.callbacks.progress import RunProgress
from qwen_lit.callbacks.report import RunReport
from qwen_lit.callbacks.resumed import Resumed
from qwen_lit.callbacks.samples import Samples
from qwen_lit.callbacks.trackers import guard
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.settings import DataSettings
from qwen_lit.distributed import watch_parent
from qwen_lit.errors import UserError
from qwen_lit.failures import exit_code
from qwen_lit.front import main as main
from qwen_lit.gpu import check_device, check_size
from qwen_lit.keys import wrong_keys
from qwen_lit.lightning_internals import launch
from qwen_lit.logs import set_up_logging
from qwen_lit.model.base import fingerprint
from qwen_lit.model.load import count_parameters, load_tokenizer
from qwen_lit.model.module import QwenModule
from qwen_lit.model.precision import check_precision
from qwen_lit.model.products import check_products
from qwen_lit.model.resume import compare, stored
from qwen_lit.model.settings import ModelSettings
from qwen_lit.model.trained import check_shapes
from qwen_lit.parsing import Parser, split_command
from qwen_lit.signals import handle_signals
from qwen_lit.starting import FROM_CHECKPOINT, start
from qwen_lit.trainer import QwenTrainer, compute_in_float32

COMMANDS = ("fit", "validate", "inspect", "plan", "verify_resume", "export", "predict")
"""The Trainer's methods that make sense for this job."""
ALIASES = {"verify-resume": "verify_resume"}
GIVEN = {"model", "datamodule", "run", "exporter"}
"""Arguments of these methods that the command line makes itself."""
SKIPPED = {*GIVEN, "train_dataloaders", "val_dataloaders", "dataloaders", "weights_only"}
LOADING = ("fit", "validate", "verify_resume", "export", "predict")
"""Commands that read the base's weights."""
TRAINER_DEFAULTS = {"enable_model_summary": False, "enable_checkpointing": True, "use_distributed_sampler": False}
EXPLAINED = (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError)
"""What a library raises on a key that it does not take."""


class QwenCLI(LightningCLI):
    """Parses one command and builds its classes from one YAML; ``call`` runs it.

    LightningCLI parses for no command of its own (``run=False``): each command here has a parser for itself, so that
    only the keys of the one that is asked for are read, and what fails while it is parsed or built has not run.
    """

    def __init__(self, command: str, args: list[str]) -> None:
        """Parse, check and build.

        Args:
            command: one of ``COMMANDS``.
            args: its options.

        Raises:
            UserError: an option is wrong.
        """
        self.command, self.given = command, tuple(args)
        super().__init__(
            QwenModule,
            QwenDataModule,
            trainer_class=QwenTrainer,
            parser_class=Parser,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            run=False,
            args=args,
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The sections of Lightning's own three classes, without what ``instantiate_classes`` gives them."""
        parser.add_lightning_class_args(QwenTrainer, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})
        add_section(parser, ModelSettings, "model")
        add_section(parser, DataSettings, "data")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The top-level keys, the sections of our own callbacks, and the options of the command."""
        parser.add_argument(
            "--output_dir",
            type=str,
            default="output",
            help="Folder for checkpoints/, lora_adapter/, final_model/, logs/ and config.yaml.",
        )
        add_section(parser, RunCheckpoint, "checkpoint", {"run"})
        add_section(parser, Export, "export", {"run", "saver"})
        add_section(parser, Samples, "samples", {"run"})
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        self.options: list[str] = []
        if self.command == "plan":
            text = "answer for a card of this size, such as 8GiB."
            self.options.append(add_option(parser, "memory_budget", text))
        # Not as a group: ``export`` is also the name of a section.
        self.options += parser.add_method_arguments(QwenTrainer, self.command, skip=SKIPPED, as_group=False)
        if self.command not in FROM_CHECKPOINT:
            self.options.append(add_option(parser, "ckpt_path", "not used; the config.yaml of a run has it."))

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As Lightning's, but wrong keys of the libraries that are installed are reported all at once."""
        known = {action.dest for action in parser._actions if not action.dest.endswith(".help")}
        if lines := wrong_keys(args, known, known):
            raise UserError("\nerror: ".join(lines))
        super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """What can be known to be wrong before any class is built; and the run."""
        self.start = start(self.command, self.config)
        try:
            config, yaml = self._plain(), self._yaml()
        except (TypeError, ValueError, YAMLError) as error:
            raise UserError(
                f"configuration: config.yaml cannot hold it ({explained(error)}); give such an argument of a class "
                "as a number, a text or a list."
            ) from error
        self.run = dataclasses.replace(self.start.run, config=config, given=self.given, yaml=yaml)

    def _name_targets(self) -> None:
        """Write the targets of LoRA into the run's configuration where it left them to the model's family."""
        lora = self.config.model.lora_config
        if lora.target_modules is None and self.model.lora_config.target_modules:
            lora.target_modules = list(self.model.lora_config.target_modules)
            self.run = self.model.run = dataclasses.replace(self.run, config=self._plain(), yaml=self._yaml())

    def _plain(self) -> dict[str, Any]:
        """The configuration as plain values; of an adapter that is used, the one it was trained with."""
        if self.start.trained is not None and self.start.trained.config:
            return self.start.trained.config
        return dict(
            json.loads(self.parser.dump(self.config, format="json", skip_link_targets=False, skip_unset=False))
        )

    def _yaml(self) -> str:
        """The configuration of ``fit``."""
        options = set(self.options) if self.command != "fit" else set()
        config = Namespace({key: value for key, value in self.config.items() if key not in options})
        return str(self.parser.dump(config, skip_unset=False, skip_validation=True))

    def instantiate_classes(self) -> None:
        """Build the sections; what a library refuses of its own keys is the user's to change."""
        try:
            sections = self.config_init = self.parser.instantiate(self.config)
            model, data = ModelSettings(**vars(sections.model)), DataSettings(**vars(sections.data))
            self.before = stored(self.run.checkpoint) if self.command == "fit" else {}
            if self.before:
                # The run has its own weights by now.
                model.init_adapter = None
            self.model = QwenModule(model, self.run)
            self._name_targets()
            self.datamodule = QwenDataModule(data, load_tokenizer(self.model.folder, self.model.name))
            self.saver = RunCheckpoint(self.run, **vars(sections.checkpoint))
            self.exporter = Export(self.run, self.saver, **vars(sections.export))
            self.samples = Samples(self.run, **vars(sections.samples))
        except (AttributeError, *EXPLAINED) as error:
            raise UserError(f"configuration: {explained(error)}") from error
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> QwenTrainer:
        """The Trainer with TensorBoard in ``output_dir/logs`` and checkpoints that are whole or absent."""
        given = self.config.trainer
        options = {**vars(self.config_init.trainer), **kwargs}
        if given.logger in (None, True):
            writes = self.command in ("fit", "export") and not given.fast_dev_run
            step = step_of(self.run.checkpoint) if self.command == "fit" and self.run.checkpoint else None
            options["logger"] = RunLogger.at(self.run, step) if writes else False
        options["callbacks"] = [*listed(options["callbacks"]), *self.callbacks()]
        options["plugins"] = [*listed(options["plugins"]), AtomicCheckpointIO()]
        try:
            trainer = QwenTrainer(**options)
        except EXPLAINED as error:
            raise UserError(f"trainer: {explained(error)}") from error
        for logger in trainer.loggers:
            if not isinstance(logger, RunLogger):
                guard(logger)
        for ranks in [waiting.started.pop()] if waiting.started else []:
            if isinstance(trainer.strategy, DDPStrategy):
                launch(trainer.strategy, ranks)
            else:
                ranks.dismiss()
        return trainer

    def callbacks(self) -> list[Any]:
        """Our own, in the order in which Lightning calls them: what reads the metrics of a step goes after what logs
        them."""
        run, throughput = self.run, Throughput(self.saver)
        report = RunReport(run, self.saver, self.exporter, throughput)
        ours = [
            self.saver,
            self.exporter,
            self.samples,
            Resumed(run),
            throughput,
            report,
            ProductsGuard(),
            LinkGuard(),
        ]
        self.report, given = report, self.config.trainer
        bars = any("ProgressBar" in one.class_path for one in listed(given.callbacks))
        if given.enable_progress_bar is not False and not bars:
            ours.append(RunProgress())
        return ours if given.fast_dev_run else [*ours, ConfigFile(run)]

    def after_instantiate_classes(self) -> None:
        """What can be known to be wrong before rows are read."""
        device, model, command = self.trainer.strategy.root_device, self.model, self.command
        if command != "inspect":
            check_device(device)
        if command in ("fit", "verify_resume"):
            check_size(count_parameters(model.config), device, self.config.trainer.accelerator)
        if command in ("fit", "plan", "verify_resume"):
            check_products(model, device, command)
        if command in LOADING or (command == "plan" and device.type == "cuda"):
            model.fetch_weights()
        if command in ("fit", "plan", "verify_resume"):
            check_precision(model.family, str(self.trainer.precision), model.quantization_config)
        if command in ("fit", "plan", "export"):
            self.exporter.check_base(model, fetches=command != "plan")
        compute_in_float32(self.trainer)
        if self.before:
            compare(self.before, self.run.config, fingerprint(model.name, model.settings.hub))
        if model.init_adapter is not None:
            check_shapes(model.config, model.lora_config, model.init_adapter)

    def call(self) -> int:
        """Run the command; returns its exit code."""
        method = getattr(self.trainer, self.command)
        made = {"model": self.model, "datamodule": self.datamodule, "run": self.run, "exporter": self.exporter}
        options = {name: self.config_init[name] for name in self.options}
        options["ckpt_path"] = str(self.run.checkpoint) if self.run.checkpoint else None
        taken = inspect.signature(method).parameters
        code = method(**{name: value for name, value in (made | options).items() if name in taken})
        if self.command == "fit":
            return 1 if self.exporter.missing or self.report.unwritten else 0
        return code if isinstance(code, int) else 0

    def saved(self) -> bool:
        """Whether ``fit`` is under way, and there is a checkpoint to go on from."""
        return self.trainer.state.fn == "fit" and last_checkpoint(self.run.checkpoints) is not None


def add_section(parser: LightningArgumentParser, kind: type, name: str, skip: Collection[str] = ()) -> None:
    """A section whose keys are the arguments of a class; its values stay values, and the class is built from them.

    Args:
        parser: of a command.
        kind: the class.
        name: of the section.
        skip: arguments that are no keys.
    """
    parser.add_class_arguments(kind, name, skip=set(skip), fail_untyped=False, instantiate=False)


def add_option(parser: LightningArgumentParser, name: str, text: str) -> str:
    """A text, or none, that no method takes; returns its name."""
    parser.add_argument(f"--{name}", type=str | None, default=None, help=text)
    return name


def listed(given: Any) -> list[Any]:
    """What may stand in a list, alone, or not at all."""
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


def run(given: list[str]) -> int:
    """Run one command whose keys are known; returns the exit code."""
    set_up_logging()
    watch_parent()
    # The comments of a configuration are help too. Reading what stands below attributes takes half a second.
    shown = any("help" in one or "print_config" in one for one in given)
    set_parsing_settings(docstring_parse_attribute_docstrings=shown)
    command = "the command line"
    with handle_signals():
        try:
            command, args = split_command([ALIASES.get(one, one) for one in given], COMMANDS)
            cli = QwenCLI(command, args)
        except BaseException as error:
            return exit_code(error, command)
        try:
            return cli.call()
        except BaseException as error:
            return exit_code(error, command, cli.saved, cli.config)
