"""Whether a model is the original of a base whose files are quantised, told from headers and samples of both."""

from pathlib import Path

import torch
from torch import Tensor

from qwen_lit.errors import UserError
from qwen_lit.export.folder import BaseModel, ExportError, read_json
from qwen_lit.families.layer import text_config, value_of
from qwen_lit.families.table import family_of
from qwen_lit.hub import fetch, find, has_weights
from qwen_lit.hub_libraries import Hub
from qwen_lit.model.load import check_weights, load_config
from qwen_lit.prequantized import own_quantization
from qwen_lit.quantization import Held

ROWS = 16
"""Rows of a matrix that are compared."""
MATRICES = 8
"""Quantised matrices that are compared, at equal distances in the model."""
NEAR = 0.05
"""Part by which a number may differ after its scale has been quantised too; one code more or less is farther."""
ALIKE = 0.98
"""Share of the numbers that must be as near: another training moves more of them."""


def original_at(name: str, hub: Hub, fetches: bool) -> Path | None:
    """The folder of the original with its weights; None where they are not on this machine and not to be fetched.

    Args:
        name: a folder, or a name on the hub.
        hub: which hub.
        fetches: get what is missing.

    Raises:
        UserError: there is no such model, or its files are broken.
    """
    try:
        folder = fetch(name, hub, weights=True) if fetches else find(name, hub)
        if folder is None or not has_weights(folder):
            return None
        check_weights(folder)
        return folder
    except UserError as error:
        raise _named(error) from error


def check_original(folder: Path, original: Path) -> None:
    """Refuse an original that is another model.

    Args:
        folder: of the base, with its weights.
        original: folder of the original, with its weights.

    Raises:
        UserError: it is another model, or quantised as well.
    """
    config = read_json(folder / "config.json")
    family = family_of(config)
    try:
        theirs = load_config(original)
        base, whole = BaseModel(folder), BaseModel(original)
    except UserError as error:
        raise _named(error) from error
    except ExportError as error:
        raise UserError(f"export.original: {error}.") from error
    if own_quantization(theirs) is not None or whole.stored:
        raise UserError(f"export.original: {original} is quantised too; give the model in bf16.")
    kind = family_of(read_json(original / "config.json")).model_type
    if kind != family.model_type:
        raise _another(original, f"it is a {kind}, and the base a {family.model_type}")
    tied = value_of(config, "tie_word_embeddings", value_of(text_config(config), "tie_word_embeddings", False))
    names = [name for found in family.weights(config, base.where).values() for name in found]
    names = [name for name in names if name in base.where and not (tied and name == family.head_on_disk)]
    for name in names:
        shape = base.where[name][2]
        if name not in whole.where:
            raise _another(original, f"it has no {name}")
        if whole.where[name][2] != shape:
            raise _another(original, f"its {name} is {whole.where[name][2]}, and the base's {shape}")
    quantized = [name for name in names if name in base.stored]
    sampled = {*quantized[:: max(1, len(quantized) // MATRICES)]}
    for name in names:
        if name not in base.stored or name in sampled:
            _compare(name, base, whole, original)


def _compare(name: str, base: BaseModel, whole: BaseModel, original: Path) -> None:
    """Compare rows of one tensor.

    Raises:
        UserError: they differ by more than the base's quantisation.
    """
    own, theirs = base.get(name)[:ROWS], whole.get(name)[:ROWS]
    stored = base.stored.get(name)
    if stored is None:
        alike = torch.equal(own, theirs.to(own.dtype))
    else:
        alike = _share_near(own.float(), Held(stored.kind, stored.blocksize).round_trip(theirs).float()) >= ALIKE
    if not alike:
        raise _another(original, f"its {name} has other numbers")


def _share_near(own: Tensor, theirs: Tensor) -> float:
    return float(((own - theirs).abs() <= NEAR * theirs.abs()).float().mean())


def _another(original: Path, why: str) -> UserError:
    return UserError(
        f"export.original: {original} is not the model that the base was quantised from: {why}; give that one, or "
        "leave export.original out."
    )


def _named(error: UserError) -> UserError:
    return UserError("export.original: " + str(error).removeprefix("model_name_or_path: "))
