"""TensorBoard that never ends a run: one curve across resumes, and a full disk is a warning.

Its steps are those of the log and of the checkpoints: 1 is the first optimizer step. Lightning counts from 0.
TensorBoard sorts its cards by name: training, validation, verdict. Its library is imported where something is written:
commands that write nothing do without its 150 modules.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import TensorBoardLogger

from qwen_lit.callbacks.facts import COMPARED
from qwen_lit.run import Run

log = logging.getLogger(__name__)
MEASURED = ("val/best_loss", "val/loss", "train/loss", "train/tokens_per_second")
"""What the table of runs shows that came of each."""
FIRST = ("learning_rate", "lora_alpha", "lora_dropout", "max_epochs", "r")
"""What that table shows before anything is chosen: first comes what is said to differ, then the rest by name."""
LOST = "TensorBoard cannot write to %s (%s); training goes on without it"


class RunLogger(TensorBoardLogger):
    """Lightning's logger into ``output_dir/logs``, which goes on without a disk."""

    def __init__(self, run: Run, resumed_step: int | None = None) -> None:
        """Keeps the folder; the files are made with the first line.

        Args:
            run: names the folder.
            resumed_step: what an earlier run wrote after this step is hidden, as it is trained again.
        """
        after = None if resumed_step is None else resumed_step + 1
        folder = run.logs
        super().__init__(folder.parent, name=folder.name, version="", default_hp_metric=False, purge_step=after)
        self.first_step, self.silent = resumed_step or 0, False

    @classmethod
    def at(cls, run: Run, resumed_step: int | None = None) -> "RunLogger | bool":
        """The logger, or False where nothing can be written."""
        logger = cls(run, resumed_step)
        try:
            Path(logger.log_dir).mkdir(parents=True, exist_ok=True)
            _ = logger.experiment
        except OSError as error:
            log.warning(LOST, logger.log_dir, error)
            return False
        return logger

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if not self.silent:
                log.warning(LOST, self.log_dir, error)
            self.silent = True

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write scalars at Lightning's step, which is one less, unless writing has failed before."""
        # Lightning adds the epoch to all that it logs; as a curve it would be the first card.
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        if values and not self.silent:
            with self._guarded():
                super().log_metrics(values, None if step is None else step + 1)

    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        """Begin this run's line in the table of the tab HPARAMS.

        Args:
            params: the configuration, flat, with the facts of the run; the columns of the table are among them.
            metrics: not used; the columns that are measured are scalars of the run.
            step: not used.
        """
        columns = {name: params[key] for name, key in COMPARED.items() if key in params}
        columns = {name: str(one).lower() if isinstance(one, bool) else one for name, one in columns.items()}
        self.hparams.update(params)
        if columns and not self.silent:
            from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
            from torch.utils.tensorboard.summary import hparams

            with self._guarded():
                table, begun, _ = hparams(columns, dict.fromkeys(MEASURED, 0.0))
                held = table.value[0].metadata.plugin_data
                found = HParamsPluginData.FromString(held.content)
                for info in found.experiment.hparam_infos:
                    info.differs = info.name in FIRST
                held.content = found.SerializeToString()
                self._write(table, begun)
                # Lightning has written the file before there was anything to write.
                save_hparams_to_yaml(Path(self.log_dir) / self.NAME_HPARAMS_FILE, self.hparams)

    def end_hyperparams(self) -> None:
        """Say in that table that the run is done."""
        if not self.silent:
            from torch.utils.tensorboard.summary import hparams

            with self._guarded():
                self._write(hparams({}, {})[2])

    def _write(self, *summaries: Any) -> None:
        for one in summaries:
            self.experiment._get_file_writer().add_summary(one)

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Write a text, unless writing has failed before."""
        if not self.silent:
            with self._guarded():
                self.experiment.add_text(tag, text, step)

    def save(self) -> None:
        """Flush, unless writing has failed before."""
        if not self.silent:
            with self._guarded():
                super().save()

    def finalize(self, status: str) -> None:
        """Close; what cannot be written any more is given up."""
        with self._guarded():
            super().finalize(status)
