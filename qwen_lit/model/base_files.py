"""Whether a base's files hold the model that its config.json describes, from their headers alone."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_lit.errors import UserError
from qwen_lit.export.folder import TORCH, BaseModel, ExportError, read_json
from qwen_lit.families.layer import Family, is_tied, text_config, value_of
from qwen_lit.families.shapes import stored_shapes
from qwen_lit.families.table import family_of
from qwen_lit.model.load import check_weights, empty_model
from qwen_lit.model.stored import check_stored

log = logging.getLogger(__name__)
SCALES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.", ".SCB", ".weight_format")
"""In the names of what bitsandbytes stores beside a weight; ``prequantized`` judges those."""
BUFFERS = ("rotary_emb.inv_freq",)
"""At the end of names that earlier versions of transformers stored, and none reads."""
Stored = Mapping[str, tuple[Path, str, list[int]]]


def check_base(folder: Path, config: Any) -> None:
    """Reject a base that cannot be read, loaded as config.json says, or merged.

    Args:
        folder: of the base, with its weights.
        config: of the language model.

    Raises:
        UserError: with what is wrong.
    """
    check_weights(folder)
    check_stored(folder, empty_model(config))
    check_stored_model(folder)


def check_stored_model(folder: Path) -> None:
    """Reject files that transformers would fill up with random numbers, pass over, or that no merge can write.

    Args:
        folder: of the base, with its weights.

    Raises:
        UserError: a weight is missing, of another shape or of a dtype that is not merged, or the config knows none
            such in the language model.
    """
    try:
        config, there = read_json(folder / "config.json"), BaseModel(folder).where
    except ExportError as error:
        raise UserError(f"model_name_or_path: {error}; fetch the model again.") from error
    family = family_of(config)
    wanted = stored_shapes(family, config, there)
    scales = {name for name in there if any(part in name for part in SCALES)}
    plain = {name: one for name, one in there.items() if name not in scales}
    if is_tied(config, family.head_on_disk not in there):
        wanted.pop(family.head_on_disk)
    if missing := [name for name in wanted if name not in there]:
        raise UserError(
            f"model_name_or_path: {folder} lacks {_several(missing)}, which its config.json speaks of; fetch its "
            "files again."
        )
    if strange := [name for name in plain if _of_language_model(family, name) and name not in wanted]:
        raise UserError(
            f"model_name_or_path: {folder} holds {_several(strange)}, which its config.json knows nothing of, so that "
            "another model would be trained; fetch its files again."
        )
    _check_form(folder, plain, wanted, {name.rpartition(".")[0] for name in scales})
    _tell_of_mtp(config, there)


def _several(names: list[str]) -> str:
    return names[0] + f" and {len(names) - 1} more" * (len(names) > 1)


def _of_language_model(family: Family, name: str) -> bool:
    """Whether a name is one of what is trained; the head's is known where it is tied, too."""
    inside = name.startswith(family.decoder_on_disk + ".") and not name.endswith(BUFFERS)
    parts = ("visual.", "vision_tower.", "language_model.")
    return inside and not name.removeprefix(family.decoder_on_disk + ".").startswith(parts)


def _check_form(folder: Path, plain: Stored, wanted: Mapping[str, tuple[int, ...]], scaled: set[str]) -> None:
    for name, (_, dtype, shape) in plain.items():
        if any(one == name or one.startswith(name + ".") or one + ".weight" == name for one in scaled):
            continue
        if dtype not in TORCH:
            raise UserError(
                f"model_name_or_path: {name} of {folder} is {dtype}, which is neither trained on nor merged; give the "
                "original bf16 model."
            )
        expected = wanted.get(name)
        if expected is None:
            continue
        if dtype in ("U8", "I32", "I64", "BOOL"):
            raise UserError(
                f"model_name_or_path: {name} of {folder} is {dtype}, quantised in a way that is not known here; give "
                "the original bf16 model."
            )
        # A convolution's weight is told as the numbers in it.
        if math.prod(shape) != math.prod(expected) or (len(expected) > 1 and tuple(shape) != expected):
            made = f"it {list(expected)}" if len(shape) == len(expected) else f"{math.prod(expected)} numbers of it"
            raise UserError(
                f"model_name_or_path: {name} of {folder} is {shape}, and its config.json makes {made}; fetch the "
                "model again."
            )


def _tell_of_mtp(config: Any, there: Stored) -> None:
    """Converters take config.json at its word."""
    layers = value_of(text_config(config), "mtp_num_hidden_layers", 0)
    if layers and not any("mtp." in name for name in there):
        log.warning(
            "config.json of the base announces multi-token prediction (mtp_num_hidden_layers: %s) that its files do "
            "not hold; llama.cpp's converter fails on that, so set it to 0 in the merged model for other tools",
            layers,
        )
