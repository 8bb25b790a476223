"""While fit trains: every row's token ids beside the chat template's own, so that no other is exported."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from qwen_lit.data.encoding import Task
from qwen_lit.data.faults import DataError
from qwen_lit.data.prove import Prover
from qwen_lit.distributed import gathered, least
from qwen_lit.errors import RunError, UserError

log = logging.getLogger(__name__)
EVERY = 64
"""Micro-batches after which several ranks ask each other; a single one looks at each."""
PATIENCE = 10.0
"""Seconds after which waiting ranks ask each other: far less than a collective waits."""
PROVEN, OPEN, FAILED = 0, 1, 2


class Proof(Callback):
    """Compares the rows that preparation has not, in one background process on each machine.

    A difference stops all ranks at once. A process that is lost proves nothing: it begins again when training is done,
    where memory is free again, and when it is lost twice the run fails before anything is exported; its checkpoints
    stay.
    """

    def __init__(self) -> None:
        self.rows: dict[Path, Task] = {}
        """What this rank has still to prove."""
        self.prover: Prover | None = None
        self.tries = 0
        self.settled = True
        """Whether the rows of all ranks are proven."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin once the rows are prepared, by the rank of each machine that has prepared them."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.settled = stage != "fit" or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if not self.settled and trainer.local_rank == 0:
            self.rows, self.tries = data.unproven(), 2
        if self.rows:
            log.info("every row is compared with the chat template's own token ids, beside the training")
            self._start(data.tokenizer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look whether it has ended; nothing waits.

        Raises:
            UserError: a row differs, on every rank.
        """
        if not self.settled and (trainer.world_size == 1 or batch_idx % EVERY == 0):
            self._look(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Runs before the export, and waits.

        Raises:
            UserError: a row differs.
            RunError: the rows could not be compared.
        """
        if self.rows:
            log.info("waiting until every row is compared with the chat template's own token ids")
        while not self.settled:
            if self.rows and self.prover is None:
                self._start(trainer.datamodule.tokenizer)  # type: ignore[attr-defined]
            if self.prover is not None:
                self.prover.wait(PATIENCE)
            self._look(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """End the process with the run."""
        self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Likewise."""
        self._stop()

    def _stop(self) -> None:
        if self.prover is not None:
            self.prover.stop()
        self.prover, self.rows = None, {}

    def _start(self, tokenizer: Any) -> None:
        self.tries -= 1
        self.prover = Prover(self.rows, tokenizer)

    def _look(self, trainer: L.Trainer) -> None:
        error = self._ended()
        state = -least(trainer, -(FAILED if error else OPEN if self.rows else PROVEN))
        if state == FAILED:
            raise next(one for one in gathered(trainer, error) if one is not None)
        self.settled = state == PROVEN

    def _ended(self) -> Exception | None:
        """What ends the run, if anything does."""
        try:
            if self.prover is not None and self.prover.done():
                log.info("every row's token ids are the chat template's own")
                self.prover, self.rows = None, {}
        except DataError as error:
            return UserError(str(error))
        except RunError as error:
            self.prover = None
            if not self.tries:
                return RunError(
                    f"{error}, so nothing is exported; the checkpoints are whole. Free memory and go on with "
                    "--ckpt_path last, or compare with: python -m qwen_lit inspect."
                )
            log.warning("%s; it begins again when training is done", error)
        return None
