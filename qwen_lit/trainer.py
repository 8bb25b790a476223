"""Lightning's Trainer with the commands of this project beside ``fit`` and ``validate``."""

import logging
import sys
import tempfile
from json import dumps
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from peft import PeftModel

from qwen_lit.callbacks.export import Export
from qwen_lit.commands.plan import arithmetic, measure
from qwen_lit.commands.plan_text import lines
from qwen_lit.commands.predict import predict
from qwen_lit.commands.verify_resume import verify
from qwen_lit.data.audit import audit, find_rows, report_lines, row_outcome, spread_rows, text_report, text_row
from qwen_lit.data.audit_page import html_report
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.rows import Rows
from qwen_lit.errors import UserError
from qwen_lit.export.pipeline import adapter_from_checkpoint
from qwen_lit.export.push import check_repository, push
from qwen_lit.model.duration import check_limits, total_steps
from qwen_lit.model.load import load_base
from qwen_lit.planner.plan import parse_bytes
from qwen_lit.run import ADAPTER, MERGED

log = logging.getLogger(__name__)


class QwenTrainer(Trainer):
    """Trainer whose methods are the subcommands; ``exit_code`` is what the command ends with."""

    exit_code = 0
    fit_config = ""
    """The configuration of ``fit`` as YAML."""
    resumed_from: Path | None = None
    """The checkpoint with which ``fit`` goes on."""
    validated_from: Path | None = None
    """The checkpoint that ``validate`` measures."""

    def inspect(
        self,
        model: Any,
        datamodule: QwenDataModule,
        rows: int = 3,
        row: str | None = None,
        html: str | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Audit the whole dataset and show rows as they will be trained; needs no GPU and loads no weights.

        Args:
            model: not used.
            datamodule: the data to audit.
            rows: number of rows to show.
            row: show this one, as path:line.
            html: also write the audit and the rows to this file.
            ckpt_path: not used; the config.yaml of a run has it.
        """
        datamodule.on_bad_row, datamodule.max_bad_share = "skip", 1.0
        datamodule.prepare_data()
        datamodule.prove()
        try:
            datamodule.setup()
        except UserError as error:
            # Nothing is left to train on; why, is what the audit is for.
            print("\n".join([*report_lines(datamodule.report), f"verdict         {error}"]))
            self.exit_code = 1
            return
        assert datamodule.train_rows is not None and datamodule.val_rows is not None
        result = audit(datamodule, self.accumulate_grad_batches)
        for line in text_report(result):
            print(line)
        folders = list(dict.fromkeys([datamodule.train_rows.folder, datamodule.val_rows.folder]))
        everything, numbers = Rows(folders[0]), []
        if row is not None:
            told = [line for folder in folders for line in row_outcome(folder, row)]
            holding = [folder for folder in folders if find_rows(Rows(folder), row)]
            if not told and not holding:
                raise UserError(f"--row: there is no row {row}; give path:line as the audit names it.")
            print("\n" + "\n".join(told) if told else "", end="")
            everything = Rows(holding[0]) if holding else everything
            numbers = find_rows(everything, row)
        for number in numbers if row is not None else spread_rows(everything, rows):
            print("\n" + text_row(everything, number, datamodule.tokenizer, sys.stdout.isatty()))
        if html is not None:
            shown = numbers if row is not None else spread_rows(everything, max(rows, 100))
            try:
                Path(html).parent.mkdir(parents=True, exist_ok=True)
                page = html_report(result, everything, shown, datamodule.tokenizer, model.name, datamodule)
                Path(html).write_text(page, encoding="utf-8")
            except OSError as error:
                raise UserError(f"--html: cannot write {html} ({error.strerror or error}).") from error
        self.exit_code = 1 if result.problems else 0

    def plan(
        self,
        model: Any,
        datamodule: QwenDataModule,
        memory_budget: str | None = None,
        json: bool = False,
        explain: bool = False,
        ckpt_path: str | None = None,
    ) -> None:
        """Run the heaviest real batch through every part of a run, and tell memory, speed, time and disk.

        Args:
            model: the module that would be trained.
            datamodule: the data it would be trained on.
            memory_budget: answer for a card of this size, such as 8GiB.
            json: print JSON instead of lines.
            explain: print the table behind the plan too: what each operation saves and takes, and what adds up to the
                estimate.
            ckpt_path: not used; the config.yaml of a run has it.
        """
        datamodule.prepare_data()
        datamodule.setup()
        check_limits(self, datamodule)
        self._data_connector.attach_datamodule(model, datamodule)
        if memory_budget:
            model.plan_for(parse_bytes(memory_budget))
        if self.strategy.root_device.type == "cuda":
            result = measure(self, model, datamodule, explain)
        else:
            result = arithmetic(self, model, datamodule, model.memory_budget, explain)
        for line in [dumps(result, indent=1)] if json else lines(result):
            print(line)
        unfit = result["measured"] is False and not result["fits"]
        self.exit_code = 1 if unfit else 0

    def verify_resume(
        self, model: Any, datamodule: QwenDataModule, steps: int = 6, ckpt_path: str | None = None
    ) -> None:
        """Train a few steps, kill, resume, and compare with a run that was left alone, in output_dir/verify_resume.

        Args:
            model: not used.
            datamodule: the data to train on.
            steps: optimizer steps of each run.
            ckpt_path: not used; the config.yaml of a run has it.
        """
        datamodule.prepare_data()
        # Its runs are short, and each would wait for this at its end.
        datamodule.prove()
        datamodule.setup()
        check_limits(self, datamodule)
        steps = min(steps, total_steps(self, datamodule) or steps)
        if steps < 2:
            raise UserError("verify-resume: the run has a single optimizer step; give more rows or epochs.")
        output_dir = Path(yaml.safe_load(self.fit_config)["output_dir"])
        verdict = verify(self.fit_config, output_dir / "verify_resume", steps)
        print(verdict)
        self.exit_code = 0 if verdict.good else 1

    def export(
        self,
        model: Any,
        datamodule: QwenDataModule,
        ckpt_path: str | None = None,
        push_to_hub: str | None = None,
    ) -> None:
        """Write lora_adapter/ and final_model/ again, from a checkpoint or an adapter folder; trains nothing.

        Args:
            model: names the base and the adapter's settings.
            datamodule: rows for the verdict.
            ckpt_path: last, best, a checkpoint file, or an adapter folder; without it output_dir/lora_adapter.
            push_to_hub: repository to upload final_model/ to, as NAME/MODEL.
        """
        callback = next(one for one in self.callbacks if isinstance(one, Export))  # type: ignore[attr-defined]
        if push_to_hub:
            check_repository(push_to_hub)
            if not callback.merge:
                raise UserError("push_to_hub uploads final_model/, which needs export.merge: true.")
        source = Path(ckpt_path) if ckpt_path else callback.folder / ADAPTER
        datamodule.prepare_data()
        datamodule.setup()
        self._data_connector.attach_datamodule(model, datamodule)
        callback.from_checkpoint(self, source, model)
        if push_to_hub:
            push(callback.folder / MERGED, push_to_hub)

    def predict(  # type: ignore[override]
        self,
        model: Any,
        datamodule: QwenDataModule,
        source: str = "",
        target: str = "predictions.jsonl",
        ckpt_path: str | None = None,
        batch_size: int = 8,
        max_new_tokens: int = 512,
    ) -> None:
        """Answer the rows of a JSONL into another, in batches; run again, it goes on where it stopped.

        Args:
            model: names the base.
            datamodule: not used but for its tokenizer.
            source: JSONL in any of the formats of training.
            target: JSONL that gets each row with its prediction.
            ckpt_path: last, best, a checkpoint file, or an adapter folder; without it output_dir/lora_adapter.
            batch_size: rows that are answered at a time.
            max_new_tokens: most tokens of an answer.
        """
        if not Path(source).is_file():
            raise UserError(f"source: no such file: {source}; give a JSONL of questions.")
        callback = next(one for one in self.callbacks if isinstance(one, Export))  # type: ignore[attr-defined]
        adapter = Path(ckpt_path) if ckpt_path else callback.folder / ADAPTER
        with tempfile.TemporaryDirectory(prefix="qwen_lit_") as folder:
            if adapter.is_file():
                path, adapter = adapter, Path(folder) / "lora_adapter"
                adapter_from_checkpoint(path, model.lora_config, model.name, adapter, {})
            base: Any = load_base(model.folder, model.quantization_config, self.strategy.root_device)
            base.config.use_cache = True
            adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
        now, before = predict(adapted, datamodule.tokenizer, Path(source), Path(target), batch_size, max_new_tokens)
        log.info("%d rows answered into %s, %d were there already", now, target, before)
