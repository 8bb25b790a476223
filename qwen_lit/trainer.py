"""Lightning's Trainer with the commands of this project beside ``fit`` and ``validate``."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy

from qwen_lit.callbacks.export import Export
from qwen_lit.commands.export import export
from qwen_lit.commands.inspect import inspect
from qwen_lit.commands.plan import plan
from qwen_lit.commands.predict import answer_rows
from qwen_lit.commands.verify_resume import verify_resume
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.distributed import REDUCTION
from qwen_lit.hardware import product_dtype
from qwen_lit.lightning_internals import set_ddp_options
from qwen_lit.model.module import QwenModule
from qwen_lit.run import Run


class QwenTrainer(Trainer):
    """Trainer whose methods are the commands: their signatures are the options, their docstrings the help.

    Each returns the exit code, or None where there is nothing to say.
    """

    def __init__(
        self, *, accumulate_grad_batches: int = 1, gradient_clip_val: int | float | None = None, **options: Any
    ) -> None:
        """A batch is an optimizer step: the module sums over its micro-batches and clips their gradient by itself.

        Lightning refuses these two arguments beside an optimizer that the module steps.

        Args:
            accumulate_grad_batches: micro-batches of an optimizer step on each rank.
            gradient_clip_val: longest gradient; None does not clip.
            options: of Lightning's Trainer.
        """
        self.micro_batches_per_step, self.clip_value = accumulate_grad_batches, gradient_clip_val
        super().__init__(**options)
        if isinstance(self.strategy, DDPStrategy):
            set_ddp_options(self.strategy, REDUCTION)

    def inspect(
        self,
        model: QwenModule,
        datamodule: QwenDataModule,
        rows: int = 3,
        row: str | None = None,
        html: str | None = None,
        json: str | None = None,
    ) -> int:
        """Audit the whole dataset and show rows as they will be trained; needs no GPU and loads no weights.

        Args:
            model: named on the page.
            datamodule: the data to audit.
            rows: number of rows to show.
            row: show this one, as path:line.
            html: also write the audit and the rows to this file.
            json: also write the audit and every row, with what of it is trained, to this file, a JSON object a line.
        """
        return inspect(datamodule, model.name, self.micro_batches_per_step, rows, row, html, json)

    def plan(
        self,
        model: QwenModule,
        datamodule: QwenDataModule,
        exporter: Export,
        json: bool = False,
        explain: bool = False,
    ) -> int:
        """Run the heaviest real batch through every part of a run, and tell memory, speed, time and disk.

        Args:
            model: the module that would be trained.
            datamodule: the data it would be trained on.
            exporter: what would be exported.
            json: print JSON instead of lines.
            explain: print the table behind the plan too: what each operation saves and takes, and what adds up to the
                estimate.
        """
        return plan(self, model, datamodule, exporter, json, explain)

    def verify_resume(self, datamodule: QwenDataModule, run: Run, steps: int = 6) -> int:
        """Train a few steps, kill, resume, and compare with a run that was left alone, in output_dir/verify_resume.

        Args:
            datamodule: the data to train on.
            run: whose configuration is tried.
            steps: optimizer steps of each run.
        """
        return verify_resume(self, datamodule, run, steps)

    def export(
        self,
        model: QwenModule,
        datamodule: QwenDataModule,
        exporter: Export,
        ckpt_path: str | None = None,
        push_to_hub: str | None = None,
    ) -> None:
        """Write lora_adapter/ and final_model/ again, from a checkpoint or an adapter folder; trains nothing.

        Args:
            model: names the base and the adapter's settings.
            datamodule: rows for the verdict.
            exporter: what is exported, and whereto.
            ckpt_path: last, best, a checkpoint file, or an adapter folder; without it output_dir/lora_adapter.
            push_to_hub: repository to upload final_model/ to, as NAME/MODEL.
        """
        source = Path(ckpt_path) if ckpt_path else exporter.run.adapter
        export(exporter, model, datamodule, self.strategy.root_device, self.loggers, source, push_to_hub)

    def predict(  # type: ignore[override]
        self,
        model: QwenModule,
        datamodule: QwenDataModule,
        run: Run,
        source: str = "",
        target: str = "predictions.jsonl",
        ckpt_path: str | None = None,
        batch_size: int = 8,
        max_new_tokens: int = 512,
        think: bool | None = None,
    ) -> None:
        """Answer the rows of a file into a JSONL, in batches; run again, it goes on where it stopped.

        Args:
            model: names the base.
            datamodule: says how rows are read; its own rows are not used.
            run: has the adapter where none is given.
            source: file in any of the formats of training, with answers or without.
            target: JSONL that gets each row with its prediction.
            ckpt_path: last, best, a checkpoint file, or an adapter folder; without it output_dir/lora_adapter.
            batch_size: rows that are answered at a time.
            max_new_tokens: most tokens of an answer.
            think: let the model think first, or not; null asks as it was trained.
        """
        adapter, device = Path(ckpt_path) if ckpt_path else run.adapter, self.strategy.root_device
        answer_rows(model, datamodule, device, adapter, Path(source), Path(target), batch_size, max_new_tokens, think)


def compute_in_float32(trainer: Trainer) -> None:
    """On a CPU that would emulate bfloat16; the configuration keeps its precision for other machines."""
    device = trainer.strategy.root_device
    if product_dtype(device) == torch.float32 and trainer.precision in ("bf16-mixed", "bf16-true"):
        trainer.strategy.precision_plugin = Precision()
