"""When fit ends: the adapter, and the merged model that other tools load."""

import logging
import shlex
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from qwen_lit.callbacks.as_trained import as_trained, can_be_asked, holding
from qwen_lit.callbacks.checkpoint import RunCheckpoint
from qwen_lit.callbacks.checkpoint_io import is_whole, step_of
from qwen_lit.callbacks.trackers import log_verdict
from qwen_lit.checkpoints import trained_at
from qwen_lit.data.datamodule import QwenDataModule, data_of
from qwen_lit.data.rows import Rows
from qwen_lit.errors import UserError
from qwen_lit.export.adapter import RESIDUAL_INITS, write_for_whole
from qwen_lit.export.card import ModelCardFacts, finish_adapter
from qwen_lit.export.folder import ExportError, commit_folder, read_json
from qwen_lit.export.gguf import GgufType, check_form
from qwen_lit.export.kquants import missing_quantizer
from qwen_lit.export.mergeable import check_mergeable
from qwen_lit.export.original import check_original, original_at
from qwen_lit.export.pipeline import Example, Job, MergeBase, adapter_from_checkpoint, part
from qwen_lit.export.pipeline import run as run_job
from qwen_lit.export.space import check_space
from qwen_lit.hub import find, has_weights, missing_bytes
from qwen_lit.model.module import QwenModule
from qwen_lit.prequantized import own_quantization
from qwen_lit.run import PARTIAL, Run
from qwen_lit.seams import options_of

log = logging.getLogger(__name__)
NO_BEST = "the best checkpoint"


class Export(Callback):
    """Writes ``lora_adapter/`` and ``final_model/`` into the output folder when training is done."""

    def __init__(
        self,
        run: Run,
        saver: RunCheckpoint,
        merge: bool = True,
        checkpoint: Literal["last", "best"] = "last",
        merge_base: MergeBase | None = None,
        original: str | None = None,
        gguf: GgufType | None = None,
        verdict_rows: int = 32,
        smoke_rows: int = 3,
    ) -> None:
        """Keeps the settings; the export is made in ``on_fit_end``.

        Args:
            run: names the folders, and has the configuration that is written beside the weights.
            saver: knows the best checkpoint.
            merge: write the merged bf16 model as well as the adapter.
            checkpoint: what is exported: last, the end of the run; or best, the lowest validation loss.
            merge_base: add the adapter to the original bf16 weights, or to the 4-bit weights as trained; auto
                measures both on held-out rows and keeps the one with the lower loss, or else the nearer one. null is
                original, or dequantized where the base's own files are quantised and export.original is not set.
            original: the unquantised model, as a folder or a name on the hub, for a base whose own files are
                quantised, so that the adapter can be added to it; null for none.
            gguf: also write the merged model as GGUF, with its matrices in q8_0, f16 or bf16, or, by llama.cpp's own
                quantiser, in k-quants such as q4_k_m; null writes none.
            verdict_rows: number of held-out rows, or trained ones where none are held out, on which the merged weights
                are compared with the adapter on its base; 0 compares nothing.
            smoke_rows: number of trained prompts that the merged model answers, to check that its answers end by
                themselves; 0 tries none.
        """
        self.run, self.saver = run, saver
        self.merge, self.checkpoint, self.merge_base, self.gguf = merge, checkpoint, merge_base, gguf
        self.original = original
        self.original_dir: Path | None = None
        """The original's folder, once ``check_base`` has found it."""
        self.verdict_rows, self.smoke_rows = verdict_rows, smoke_rows
        self.facts: ModelCardFacts | None = None
        self.missing: dict[str, str] = {}
        self.made: dict[str, Any] = {}
        """The checkpoint that the adapter is from, as of ``trained_at``."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse, before anything is trained, what could not be exported.

        Raises:
            UserError: the adapter cannot be merged, GGUF cannot be written, or there will be no best checkpoint.
        """
        data = data_of(trainer)
        assert data.val_rows is not None
        if stage == "fit" and self.checkpoint == "best" and not len(data.val_rows):
            raise UserError(
                "export.checkpoint is best, but data.val_size holds out no row; give a larger share, or a count such "
                "as data.val_size: 8, or export.checkpoint: last."
            )
        if stage != "fit" or not self.merge or options_of(trainer).fast_dev_run:
            return
        module = cast(QwenModule, pl_module)
        if self.merge_base == "dequantized" and module.quantization_config is None:
            raise UserError(
                "export.merge_base is dequantized, but the base is held in bf16; set it to original, or give "
                "model.quantization_config."
            )
        check_mergeable(module.lora_config, module.config)
        check_space(self.run.merged, module.folder, module.config, self.gguf)
        self.check_gguf()
        check_form(self.gguf, read_json(module.folder / "config.json"))

    def check_base(self, module: QwenModule, fetches: bool) -> None:
        """Refuse, before rows are read, a merge that the base's files do not allow, and find the original.

        Args:
            module: names the base.
            fetches: get the original where it is not on this machine; the base's weights are here then.

        Raises:
            UserError: the original is missing, not needed, or another model.
        """
        if not self.merge:
            return
        quantized = own_quantization(module.config) is not None
        if self.original is None:
            if quantized and self.merge_base == "original":
                raise UserError(
                    f"export.merge_base is original, but the files of {module.name} hold quantised weights; name the "
                    "unquantised model as export.original, or set export.merge_base to null, which adds the adapter "
                    "to the weights as they are trained on."
                )
            return
        if not quantized:
            raise UserError(
                f"export.original is {self.original}, but {module.name} is not quantised in its files and so the "
                "original itself; set it to null."
            )
        self.original_dir = original_at(self.original, module.settings.hub, fetches)
        if self.original_dir is not None and has_weights(module.folder):
            check_original(module.folder, self.original_dir)

    def original_bytes(self, size: int, module: QwenModule) -> int:
        """Bytes of the original that are yet to be fetched.

        Args:
            size: of the merged model, for an original of which nothing is on this machine.
            module: names the base.
        """
        if not self.merge or self.original is None or self.original_dir is not None:
            return 0
        there = find(self.original, module.settings.hub)
        return size if there is None else missing_bytes(there, size)

    def check_gguf(self) -> None:
        """Refuse, before hours of work, a GGUF file for which a package or the quantiser is missing.

        Raises:
            UserError: a package is missing.
        """
        if self.gguf is not None and find_spec("gguf") is None:
            raise UserError("export.gguf needs the gguf package: pip install 'qwen_lit[gguf]', or set it to null.")
        if reason := missing_quantizer(self.gguf):
            raise UserError(reason)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export once training is complete; an interrupted run leaves its checkpoints alone."""
        if options_of(trainer).fast_dev_run or options_of(trainer).interrupted or not trainer.is_global_zero:
            return
        module = cast(QwenModule, pl_module)
        assert module.model is not None
        data = data_of(trainer)
        adapter, saver = self.run.adapter, self.saver
        partial = adapter.with_name(adapter.name + PARTIAL)
        self.made = {"checkpoint": "last", "step": trainer.global_step}
        weights = None
        if self.checkpoint == "best":
            with part(NO_BEST, self.missing):
                weights = best_weights(saver)
                self.made = {"checkpoint": "best", "step": saver.best_step, "val_loss": saver.best}
        elif saver.best_step == trainer.global_step:
            self.made["val_loss"] = saver.best
        if module.products.told:
            self.made["products"] = module.products.told
        # PEFT asks each module what it would save, and a base that is away has nothing.
        with part(adapter.name, self.missing), holding(module, weights), module.left_out():
            shutil.rmtree(partial, ignore_errors=True)
            initial = module.initial_adapter.name if module.initial_adapter else None
            module.model.save_pretrained(
                str(partial), save_embedding_layers=False, path_initial_model_for_weight_conversion=initial
            )
            write_for_whole(partial, module.family)
            finish_adapter(partial, module.name, self.run.config, self.made, data.form())
            commit_folder(partial, adapter)
            log.info("adapter of step %d written to %s", self.made["step"], adapter)
        names = {"train/loss": "train, last step", "val/loss": "validation, last", "val/perplexity": "perplexity"}
        metrics = {
            text: float(trainer.callback_metrics[key])
            for key, text in names.items()
            if key in trainer.callback_metrics
        }
        if saver.best_step is not None:
            metrics[f"validation, best (step {saver.best_step})"] = saver.best
        if adapter.name in self.missing:
            # A half-written adapter takes disk space that the report needs.
            shutil.rmtree(partial, ignore_errors=True)
        elif NO_BEST not in self.missing:
            with part(self.run.merged.name, self.missing):
                self.export(adapter, module, data, trainer.strategy.root_device, trainer.loggers, metrics, weights)
        if self.missing:
            print(f"error: {self.said()}", file=sys.stderr)

    def from_checkpoint(
        self,
        path: Path,
        module: QwenModule,
        data: QwenDataModule,
        device: torch.device,
        loggers: Sequence[Logger],
    ) -> None:
        """Export without training: from a checkpoint of ``fit``, or from an adapter folder.

        Args:
            path: of the checkpoint or the folder.
            module: names the base and the adapter's settings; its model is not loaded.
            data: its rows are prepared.
            device: where the merged model is measured and tried.
            loggers: get the verdict.

        Raises:
            ExportError: something could not be exported.
            UserError: a GGUF file cannot be written.
        """
        if self.merge:
            self.check_gguf()
            check_form(self.gguf, read_json(module.folder / "config.json"))
        adapter, self.made = path, trained_at(path)
        if path.is_file():
            adapter = self.run.adapter
            run, form = self.run.config, data.form()
            adapter_from_checkpoint(
                path, module.lora_config, module.name, module.family, adapter, run, self.made, form
            )
            log.info("adapter of step %d written to %s", self.made["step"], adapter)
        self.export(adapter, module, data, device, loggers, {})
        if self.missing:
            raise ExportError(self.said())

    def export(
        self,
        adapter: Path,
        module: QwenModule,
        data: QwenDataModule,
        device: torch.device,
        loggers: Sequence[Logger],
        losses: dict[str, float],
        weights: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Merge an adapter folder and write what belongs to it; what fails is in ``missing``.

        Args:
            adapter: PEFT's folder.
            module: as of ``from_checkpoint``; its model may be loaded.
            data: as of ``from_checkpoint``.
            device: as of ``from_checkpoint``.
            loggers: get the verdict.
            losses: of the run, for the card.
            weights: of the adapter, by their names in ``QwenModule``, where the loaded model has others.
        """
        if not self.merge:
            return
        assert data.train_rows is not None and data.val_rows is not None
        held_out = data.val_rows if len(data.val_rows) else data.train_rows
        # The merged model, which answers a few prompts, may need that memory.
        module.release_memory()
        job = Job(
            adapter_dir=adapter,
            base_dir=module.folder,
            out_dir=self.run.merged,
            tokenizer=data.tokenizer,
            facts=ModelCardFacts(
                config=self.run.config,
                data=data.facts(),
                losses=losses,
                missing=self.missing,
                made=self.made,
                form=data.form(),
            ),
            held=module.held_weights(device),
            merge_base=self.merge_base,
            original_dir=self.original_dir,
            is_prequantized=own_quantization(module.config) is not None,
            gguf=self.gguf,
            held_out=spread(held_out, self.verdict_rows),
            kind="held-out" if len(data.val_rows) else "training",
            taught=prompts(data.train_rows.that_end(), self.smoke_rows),
            device=device,
            trained=partial(as_trained, module, adapter, device, weights) if can_be_asked(module, device) else None,
        )
        self.facts = job.facts
        step = self.made.get("step") or 0
        run_job(job, lambda verdict: log_verdict(list(loggers), verdict.as_dict(), step))

    def again(self) -> str:
        """The command that exports once more what is missing."""
        changed = str(self.run.config["model"]["lora_config"]["init_lora_weights"]).lower()
        config = shlex.quote(str(self.run.config_file))
        if NO_BEST in self.missing:
            return f"python -m qwen_lit export --config {config} --export.checkpoint last"
        if self.run.adapter.name not in self.missing:
            return f"python -m qwen_lit export --config {config}"
        if changed.startswith(RESIDUAL_INITS):
            return f"python -m qwen_lit fit --config {config} --ckpt_path last"
        return f"python -m qwen_lit export --config {config} --ckpt_path {self.checkpoint}"

    def said(self) -> str:
        """One line on what is missing."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.missing.items():
            by_reason.setdefault(reason, []).append(name)
        reasons = "; ".join(f"{' and '.join(names)} ({reason})" for reason, names in by_reason.items())
        then = "once that is fixed"
        adapter = self.run.adapter.name
        if NO_BEST in self.missing and adapter not in self.missing:
            then = f"{adapter}/ is of the last step, {self.made['step']}, and to export that"
        return f"not exported: {reasons}. What was trained is safe; {then}: {self.again()}"


def best_weights(saver: RunCheckpoint) -> dict[str, torch.Tensor]:
    """The trained weights of the best checkpoint, by their names in ``QwenModule``.

    Raises:
        ExportError: there is none, or it is damaged or of another step.
    """
    path = saver.run.best
    if saver.best_step is None:
        raise ExportError("no validation has come, so none is the best")
    if not path.is_file():
        raise ExportError(f"{path} is not there")
    if not is_whole(path):
        raise ExportError(f"{path} is damaged")
    if (step := step_of(path)) != saver.best_step:
        raise ExportError(f"{path} is of step {step}; that of step {saver.best_step} could not be written")
    found: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return found


def prompts(rows: Rows, count: int) -> list[Example]:
    """The prompts of at most ``count`` examples over the rows, each with what is taught to follow it."""
    return [rows.prompt(number, 0) for number in _numbers(rows, count)]


def spread(rows: Rows, count: int) -> list[Example]:
    """At most ``count`` examples at equal distances over the rows, none of them twice."""
    return [rows[number] for number in _numbers(rows, count)]


def _numbers(rows: Rows, count: int) -> list[int]:
    if not len(rows) or not count:
        return []
    return [int(number) for number in np.unique(np.linspace(0, len(rows) - 1, count).astype(int))]
