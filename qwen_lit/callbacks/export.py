"""When fit ends: the adapter, and the merged model that other tools load."""

import logging
import shutil
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
from lightning.pytorch.callbacks import Callback

from qwen_lit.export.folder import commit_folder, write_serving_files
from qwen_lit.export.merge import merge_adapter

log = logging.getLogger(__name__)


class Export(Callback):
    """Writes ``lora_adapter/`` and ``final_model/`` into the output folder when training is done."""

    def __init__(
        self,
        merge: bool = True,
        merge_base: Literal["original", "dequantized"] = "original",
        output_dir: str = "output",
    ) -> None:
        """Nothing is read or written before fit ends.

        Args:
            merge: write the merged bf16 model as well as the adapter.
            merge_base: add the adapter to the original bf16 weights, or to the 4-bit weights as trained.
            output_dir: set by the top-level output_dir.
        """
        self.merge, self.merge_base = merge, merge_base
        self.folder = Path(output_dir)
        self.training_config: dict[str, Any] = {}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export once training is complete; an interrupted run leaves its checkpoints alone."""
        if trainer.fast_dev_run or trainer.interrupted or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        from qwen_lit.model.module import QwenModule

        module = cast(QwenModule, pl_module)
        assert module.model is not None
        adapter = self.folder / "lora_adapter"
        partial = adapter.with_name(adapter.name + ".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        initial = module.initial_adapter.name if module.initial_adapter else None
        module.model.save_pretrained(
            str(partial), save_embedding_layers=False, path_initial_model_for_weight_conversion=initial
        )
        commit_folder(partial, adapter)
        log.info("adapter written to %s", adapter)
        if not self.merge:
            return
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        base = base_folder(module.name)
        quantization = module.quantization_config.to_dict() if module.quantization_config else None
        report = merge_adapter(
            adapter,
            base,
            self.folder / "final_model",
            merge_base=self.merge_base if quantization else "original",
            quantization=quantization,
            finish=lambda out: write_serving_files(out, base, tokenizer, self.training_config),
        )
        log.info("merged model written to %s (%s)", self.folder / "final_model", report)


def base_folder(name: str) -> Path:
    """The folder that holds the base's files: the given one, or the hub's local copy."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
