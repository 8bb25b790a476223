"""What of the log is shown, and where."""

import logging
import os
import sys
import warnings

from qwen_lit.screen import Handler, on_screen


def set_up_logging() -> None:
    """Our own lines at INFO, other libraries' at WARNING; ``QWEN_LIT_LOG=DEBUG`` shows all."""
    from transformers.utils import logging as transformers_logging

    level = os.environ.get("QWEN_LIT_LOG", "INFO").upper()
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", handlers=[Handler(sys.stderr)]
    )
    # Lines of these libraries go where ours go.
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    if on_screen():
        logging.captureWarnings(True)
        warnings.formatwarning = lambda message, *_: str(message)
        # Bars of transformers are gone when they are full, as ours are.
        transformers_logging.set_tqdm_hook(lambda make, args, options: make(*args, **{"leave": False, **options}))
    else:
        transformers_logging.disable_progress_bar()
    logging.getLogger("qwen_lit").setLevel(level)
    if level == "DEBUG":
        logging.getLogger().setLevel(level)
    else:
        # Of torch, on drivers; check_gpu says it in a line.
        warnings.filterwarnings("ignore", message="CUDA initialization")
        # Of Lightning, which wraps the model for several ranks on a stream of its own, of PEFT's own use of names, and
        # of bitsandbytes, which pages on GPUs alone.
        for message in (
            "The AccumulateGrad node.s stream does not match",
            ".is_gradient_checkpointing. is deprecated",
            "Paged optimizers are not supported on CPU",
        ):
            warnings.filterwarnings("ignore", message=message)
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*(instantiate_classes|add_instantiator).*")
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
