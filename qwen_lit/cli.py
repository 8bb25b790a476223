"""The command line: LightningCLI's sections and links, and its exit codes."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from qwen_lit.callbacks.checkpoint import AtomicCheckpointIO, RunCheckpoint, last_checkpoint
from qwen_lit.callbacks.export import Export
from qwen_lit.callbacks.metrics import Throughput
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.errors import UserError
from qwen_lit.export import ExportError
from qwen_lit.model.load import load_tokenizer
from qwen_lit.model.module import QwenModule
from qwen_lit.trainer import QwenTrainer

log = logging.getLogger("qwen_lit")
OUT_OF_MEMORY = """out of GPU memory. The levers, in order:
  data.batch_size {batch_size} (lower it, raise trainer.accumulate_grad_batches {accumulate} by as much)
  model.gradient_checkpointing {checkpointing} (true keeps only layer inputs)
  data.max_length {max_length} (rows that are longer are shortened)
  model.lora_config.r {r} (fewer trained parameters)
  model.quantization_config (nf4 with bnb_4bit_use_double_quant: true is the smallest)"""


class SaveConfig(SaveConfigCallback):
    """Writes the whole configuration to ``output_dir/config.yaml``, and as text to TensorBoard."""

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Called on rank zero before the model is loaded."""
        text = self.parser.dump(self.config, skip_none=False)
        folder = Path(self.config["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_text("config", "```yaml\n" + text + "\n```", trainer.global_step)


class QwenCLI(LightningCLI):
    """``fit`` and ``validate`` from one YAML."""

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
        parser.link_arguments("output_dir", "checkpoint.output_dir")
        parser.link_arguments("output_dir", "export.output_dir")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that make sense for this job."""
        skipped = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule", "weights_only"}
        return {"fit": skipped, "validate": skipped, "inspect": skipped}

    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint into the configuration: what the user wrote is what runs."""

    def before_instantiate_classes(self) -> None:
        """What can be known to be wrong before any class is built."""
        config = self.config[self.subcommand]
        accelerator = config.trainer.accelerator
        if accelerator in ("gpu", "cuda"):
            import torch

            if not torch.cuda.is_available():
                raise UserError(f"trainer.accelerator is {accelerator}, but no CUDA device is seen; set it to auto.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with TensorBoard in ``output_dir/logs`` and checkpoints that are whole or absent."""
        config = self.config[self.subcommand]
        if config.trainer.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(config.output_dir, name="logs", version="")
        plugins = config.trainer.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    def after_instantiate_classes(self) -> None:
        """Hand the tokenizer to the data, and the written configuration to the export."""
        self.datamodule.tokenizer = load_tokenizer(self.model.name)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Export):
                self._dump_config()
                callback.training_config = self.config_dump

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if kwargs.get("ckpt_path") == "last":
            folder = Path(self.config[subcommand].output_dir) / "checkpoints"
            found = last_checkpoint(folder)
            log.info("resuming from %s", found) if found else log.info("no checkpoint in %s: starting fresh", folder)
            kwargs["ckpt_path"] = str(found) if found else None
        elif kwargs.get("ckpt_path") and not Path(kwargs["ckpt_path"]).is_file():
            raise UserError(f"ckpt_path: no such file: {kwargs['ckpt_path']}; give a file, or last.")
        return kwargs


def set_up_logging() -> None:
    """Our own lines at INFO, other libraries' at WARNING; ``QWEN_LIT_LOG=DEBUG`` shows all."""
    level = os.environ.get("QWEN_LIT_LOG", "INFO").upper()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    log.setLevel(level)
    if level == "DEBUG":
        logging.getLogger().setLevel(level)
    else:
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*(instantiate_classes|add_instantiator|skip_none).*")
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def main(args: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    set_up_logging()
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    cli: QwenCLI | None = None
    try:
        cli = QwenCLI.__new__(QwenCLI)
        cli.__init__(  # type: ignore[misc]
            QwenModule,
            QwenDataModule,
            trainer_class=QwenTrainer,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            trainer_defaults={
                "callbacks": [Throughput()],
                "enable_model_summary": False,
                "enable_checkpointing": True,
                "use_distributed_sampler": False,
            },
            seed_everything_default=42,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except SIGTERMException:
        return 143
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        trainer = getattr(cli, "trainer", None)
        if trainer is not None and trainer.interrupted:
            return 130
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except Exception as error:
        import torch

        if isinstance(error, torch.OutOfMemoryError) and cli is not None:
            config = cli.config[cli.subcommand]
            text = OUT_OF_MEMORY.format(
                batch_size=config.data.batch_size,
                accumulate=config.trainer.accumulate_grad_batches,
                checkpointing=config.model.gradient_checkpointing,
                max_length=config.data.max_length,
                r=config.model.lora_config.r,
            )
            print(f"error: {text}", file=sys.stderr)
            return 1
        raise
    return cli.trainer.exit_code  # type: ignore[attr-defined]
