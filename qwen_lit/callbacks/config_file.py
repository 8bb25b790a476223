"""The configuration of a run, written once it is clear that it trains."""

import lightning as L
from lightning.pytorch.callbacks import Callback

from qwen_lit.callbacks.logger import RunLogger
from qwen_lit.run import Run
from qwen_lit.seams import options_of


class ConfigFile(Callback):
    """Writes the whole configuration to ``config.yaml``, and as text to TensorBoard, when training begins.

    By then every check has passed. What a resumed run was trained with until here is kept as ``config-STEP.yaml``, or
    as ``config-STEP-2.yaml`` and so on where several attempts have gone on from that step.
    """

    def __init__(self, run: Run) -> None:
        """Keeps the run whose configuration is written.

        Args:
            run: has the configuration, and names the file.
        """
        self.run = run

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it."""
        if not trainer.is_global_zero or options_of(trainer).fast_dev_run:
            return
        path, step = self.run.config_file, trainer.global_step
        path.parent.mkdir(parents=True, exist_ok=True)
        if step and path.is_file():
            path.rename(self.run.config_until(step))
        path.write_text(self.run.yaml, encoding="utf-8")
        if isinstance(trainer.logger, RunLogger):
            trainer.logger.add_text("config", "```yaml\n" + self.run.yaml + "\n```", trainer.logger.first_step)
