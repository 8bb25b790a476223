"""``qwen-lit export``: the adapter and the merged model once more, without training."""

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch.loggers import Logger

from qwen_lit.callbacks.export import Export
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.errors import UserError
from qwen_lit.export.push import check_repository, push
from qwen_lit.model.module import QwenModule


def export(
    exporter: Export,
    module: QwenModule,
    data: QwenDataModule,
    device: torch.device,
    loggers: Sequence[Logger],
    source: Path,
    repository: str | None,
) -> None:
    """Export what ``source`` holds.

    Args:
        exporter: what is exported, and whereto.
        module: names the base and the adapter's settings; its model is not loaded.
        data: rows for the verdict; nothing of them is prepared yet.
        device: where the merged model is measured and tried.
        loggers: get the verdict.
        source: a checkpoint of ``fit``, or an adapter folder.
        repository: on the hub, to which the merged model is uploaded, as NAME/MODEL.

    Raises:
        ExportError: something could not be exported.
        UserError: a package is missing, or the repository cannot be used.
    """
    if repository:
        check_repository(repository)
        if not exporter.merge:
            raise UserError("push_to_hub uploads final_model/, which needs export.merge: true.")
    data.prepare_data()
    data.setup()
    exporter.from_checkpoint(source, module, data, device, loggers)
    if repository:
        push(exporter.run.merged, repository)
