"""What is held out, when it is measured, and what follows from it: early stopping and the best checkpoint."""

from typing import Any

from qwen_lit.convert.draft import Draft
from qwen_lit.convert.values import is_off, number, whole

LOSSES = ("loss", "eval_loss", "val_loss", "val/loss")
OUR_METRIC = "val/loss"


def validation(draft: Draft) -> None:
    """Validation rows, how often they are measured, and what depends on it."""
    if (size := draft.use("val_size")) is not None and (found := number(draft.name("val_size"), size)) > 0:
        draft.write("data.val_size", found, draft.origin("val_size"))
    if (share := draft.use("val_percent")) is not None and (found := number(draft.name("val_percent"), share)) > 0:
        draft.write("data.val_size", found / 100, draft.origin("val_percent"))
    held = "data.val_size" in draft.ours or "data.val_dataset_path" in draft.ours
    strategy, steps, times = draft.use("eval_strategy"), draft.use("eval_steps"), draft.use("evals_per_epoch")
    patience, best = draft.use("early_stopping_patience"), draft.use("load_best_model_at_end")
    metric = draft.use("metric_for_best_model")
    wanted = None if is_off(best) else draft.origin("load_best_model_at_end")
    patience_origin = draft.origin("early_stopping_patience") if patience is not None else None
    if not held:
        every = [draft.origin("eval_steps")] if steps is not None else []
        for origin in filter(None, [*every, wanted, patience_origin]):
            draft.note(f"{origin}: left out, as no rows are held out; hold some out with data.val_size, such as 0.05")
        return
    measured = when(draft, strategy, steps, times, bool(wanted or patience_origin))
    if metric is not None and str(metric) not in LOSSES:
        origin = draft.origin("metric_for_best_model")
        draft.note(f"{origin}: the best checkpoint is the one of the lowest validation loss")
    if wanted and measured:
        draft.write("export.checkpoint", "best", wanted)
    if patience is not None and measured:
        count = whole(draft.name("early_stopping_patience"), patience)
        stop = {"class_path": "EarlyStopping", "init_args": {"monitor": OUR_METRIC, "patience": count}}
        draft.write("trainer.callbacks", [stop], patience_origin or "")


def when(draft: Draft, strategy: Any, steps: Any, times: Any, needed: bool) -> bool:
    """Write how often is validated, which all count in optimizer steps.

    Returns:
        Whether it is validated at all.
    """
    origin = draft.origin("eval_strategy")
    if times is not None:
        count = whole(draft.name("evals_per_epoch"), times)
        if count < 1:
            return off(draft, draft.origin("evals_per_epoch"), needed)
        draft.write("trainer.val_check_interval", round(1 / count, 6), draft.origin("evals_per_epoch"))
        return True
    if strategy is not None and is_off(strategy):
        return off(draft, origin, needed)
    if strategy is not None and str(strategy).lower() == "epoch":
        draft.write("trainer.check_val_every_n_epoch", 1, origin)
        return True
    if steps is None or number(draft.name("eval_steps"), steps) <= 0:
        draft.note("rows are held out, and validated at the end of each epoch")
        return True
    every, origin = number(draft.name("eval_steps"), steps), draft.origin("eval_steps")
    total, epochs = draft.ours.get("trainer.max_steps", 0), draft.ours.get("trainer.max_epochs")
    if every < 1 and not total:
        share = every * (epochs or 1)
        if share > 1:
            draft.write("trainer.check_val_every_n_epoch", round(share), origin)
        else:
            origin = f"a share of an epoch, for {origin} of the run"
            draft.write("trainer.val_check_interval", round(float(share), 6), origin)
        return True
    count = int(every if every >= 1 else max(1, every * total))
    draft.write("trainer.val_check_interval", count, origin)
    draft.write("trainer.check_val_every_n_epoch", None, "count over epochs")
    return True


def off(draft: Draft, origin: str, needed: bool) -> bool:
    """No validation, unless something waits for its loss."""
    if needed:
        draft.note(f"{origin}: validated at the end of each epoch all the same, for the best checkpoint needs it")
        return True
    draft.write("trainer.limit_val_batches", 0, origin)
    return False
