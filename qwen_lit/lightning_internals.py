"""What is read and set of Lightning's private parts, all of it here. Read in Lightning 2.6.6.

A later version may name any of it otherwise; ``tests/test_lightning_internals.py`` fails where another file asks for a
private name of Lightning.
"""

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer

# Callbacks that a configuration names


def timer_seconds(timer: Timer) -> float | None:
    """Seconds after which a Timer ends the run. Lightning tells only what is left of them, once training has begun."""
    return timer._duration


def mark_as_saved(callback: ModelCheckpoint, step: int) -> None:
    """Let a ModelCheckpoint take a step for saved: it asks this number before it writes, and has no other switch.

    Args:
        callback: of the run that goes on.
        step: optimizer steps that are made.
    """
    callback._last_global_step_saved = step


def checks_at_epoch_end(callback: EarlyStopping) -> bool:
    """Whether an EarlyStopping looks at the end of an epoch, not of a validation, as Lightning settles by itself."""
    return bool(callback._check_on_train_epoch_end)
