"""Whether products in 8 bits still train what bf16 would: looked at every so many steps."""

import logging
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback

from qwen_lit.callbacks.report import log_to_all
from qwen_lit.data.batches import Batch
from qwen_lit.distributed import gathered
from qwen_lit.model.fidelity import Fidelity, compared, measure, worst
from qwen_lit.model.module import QwenModule
from qwen_lit.model.products import floor_of, in_words

log = logging.getLogger(__name__)


class ProductsGuard(Callback):
    """Compares the gradient of a micro-batch with the one in bf16 before the first optimizer step and each multiple of
    ``model.products_check_every``; below ``model.products_floor`` the run goes on in bf16."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: list[Batch], batch_idx: int
    ) -> None:
        """Look at one micro-batch of the step where a check is due. All ranks do at the same steps."""
        module, step = cast(QwenModule, pl_module), trainer.global_step + 1
        every = module.settings.products_check_every
        if module.products.used == "bf16" or not every or (step > 1 and step % every):
            return
        one = compared(batch, every)
        mine = measure(module, trainer.precision_plugin, one) if one is not None else None
        found: list[Fidelity] = [theirs for theirs in gathered(trainer, mine) if theirs is not None]
        if found:
            self._judge(trainer, module, step, worst(found))

    def _judge(self, trainer: L.Trainer, module: QwenModule, step: int, found: Fidelity) -> None:
        """Log what was found, and leave the products where it is below the floor.

        Args:
            trainer: of the run.
            module: with the products in use.
            step: that is about to be made, counted from 1.
            found: the worst of all ranks.
        """
        asked, floor = module.products.asked, floor_of(module.settings)
        metrics: dict[str, Any] = {"train/products_cosine": found.cosine, "train/products_error": found.error}
        log_to_all(trainer, metrics, step)
        said = in_words(found.cosine, found.error)
        if trainer.is_global_zero:
            log.info("products   %s: the gradient of step %d has %s", asked, step, said)
        module.note_products(step, found.cosine, found.error)
        if not found.below(floor):
            return
        module.leave_products(f"the gradient had {said}, and the floor of the cosine is {floor:g}", step)
        if trainer.is_global_zero:
            log.warning(
                "model.products: the gradient in %s has cosine %.4f with that in bf16, below model.products_floor %g; "
                "from step %d on products are in bf16",
                asked,
                found.cosine,
                floor,
                step,
            )
