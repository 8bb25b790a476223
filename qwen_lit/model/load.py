"""Finding, checking and loading the base model, and putting the adapter on it."""

import copy
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from jinja2 import TemplateSyntaxError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils.chat_template_utils import _compile_jinja_template

from qwen_lit.errors import UserError, shortened
from qwen_lit.experts import loading as loading  # puts experts in 4 bits into transformers' loader
from qwen_lit.experts.lora import adapting
from qwen_lit.experts.targets import resolve_all
from qwen_lit.families.table import family_of
from qwen_lit.families.wrappers import TO_LANGUAGE_MODEL, for_language_model
from qwen_lit.hardware import product_dtype
from qwen_lit.hub import INDEX, SINGLE
from qwen_lit.model.delta_rule import choose_delta_rule
from qwen_lit.model.documents import keep_apart
from qwen_lit.model.stored import give_dtype, plain_linears
from qwen_lit.prequantized import own_quantization
from qwen_lit.progress import timed

log = logging.getLogger(__name__)


def check_weights(folder: Path) -> None:
    """Reject a folder whose weights cannot be read, from the heads of its files.

    Raises:
        UserError: there are no safetensors, or one of them is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        others = sorted(one.name for one in folder.iterdir() if one.suffix in (".bin", ".pt", ".pth", ".gguf"))
        has = f"only {', '.join(others[:3])}" if others else "no weights"
        raise UserError(
            f"model_name_or_path: {folder} has {has}; weights are read from model.safetensors or its shards. Fetch "
            "those, or load it with transformers and save_pretrained it again."
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except Exception as error:
            reason = shortened(" ".join(str(error).split()))
            raise UserError(f"model_name_or_path: {file} is damaged ({reason}); fetch it again.") from error


def load_config(folder: Path, name: str = "") -> Any:
    """The config of the language model in a folder, if it is of a known family and in a form that is trained on.

    Args:
        folder: that holds it.
        name: of the model in messages; empty is the folder's.

    Raises:
        UserError: the config cannot be read, or it is of no family that is known, or its weights are quantised in
            another way than bitsandbytes'.
    """
    name = name or str(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise UserError(
            f"model_name_or_path: cannot read the config of {name} ({_reason(error)}); fetch the model again and give "
            "its folder."
        ) from error
    family_of(config, name)
    own_quantization(config, name)
    return language_model(config)


def language_model(config: Any) -> Any:
    """The config of the model that is trained: of a folder that holds more, that of its language model alone.

    A language model that transformers has no class for is read as the family that computes the same on text.

    Args:
        config: as transformers reads the folder's; returned as it is where the folder holds nothing else.
    """
    family = family_of(config)
    if not family.text:
        return config
    text = config.get_text_config()
    if hasattr(text, "quantization_config") and not text.quantization_config:
        # transformers reads an empty one as that of a quantised model.
        del text.quantization_config
    if text.model_type != family.text:
        values = {key: value for key, value in text.to_dict().items() if key not in ("model_type", "architectures")}
        # The rotation of three equal positions is that of one.
        rope = {key: value for key, value in text.rope_parameters.items() if not key.startswith("mrope")}
        values |= {"rope_parameters": rope, "tie_word_embeddings": config.tie_word_embeddings, "dtype": config.dtype}
        text = CONFIG_MAPPING[family.text].from_dict(values)
    if held := getattr(config, "quantization_config", None):
        text.quantization_config = held
    return text


def count_parameters(config: Any) -> int:
    """Numbers in the weights of a model, from its config alone."""
    return sum(one.numel() for one in empty_model(config).parameters())


def empty_model(config: Any, dtype: torch.dtype | None = None) -> Any:
    """A model without weights, on the meta device, of which names and shapes are asked.

    Args:
        config: of the model.
        dtype: that its parameters are said to have; None is the config's.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_tokenizer(folder: Path, name: str = "") -> Any:
    """The tokenizer that stands beside the model.

    Args:
        folder: that holds it.
        name: of the model in messages; empty is the folder's.

    Raises:
        UserError: there is none that loads, or its chat template is no template.
    """
    name = name or str(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"model_name_or_path: {name} has no tokenizer that loads ({_reason(error)}).") from error
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates or ""]:
        try:
            _compile_jinja_template(template)
        except TemplateSyntaxError as error:
            raise UserError(
                f"model_name_or_path: the chat template of {name} is broken (line {error.lineno}: {error.message}); "
                "fetch chat_template.jinja or tokenizer_config.json again."
            ) from error
    return tokenizer


def _reason(error: Exception) -> str:
    return shortened(" ".join((str(error) or type(error).__name__).split()))


def computing_on(device: torch.device, quantization: BitsAndBytesConfig | None) -> BitsAndBytesConfig | None:
    """The quantisation with 4-bit weights multiplied in float32 where bfloat16 is emulated."""
    if quantization is None or not quantization.load_in_4bit or product_dtype(device) == torch.bfloat16:
        return quantization
    quantization = copy.deepcopy(quantization)
    quantization.bnb_4bit_compute_dtype = torch.float32
    return quantization


def read_model(
    folder: Path | str,
    device: torch.device,
    quantization: BitsAndBytesConfig | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A model for causal language modelling; nothing else in this program reads whole models.

    Weights are read from safetensors alone: other files can hold code. What the files hold quantised is taken as it
    is, and nothing else is quantised then: which linears these are say the headers, whatever names config.json leaves
    out.

    Args:
        folder: that holds its files.
        device: where it computes.
        quantization: of its linears, done while they are read; None for none. Of quantised files it gives the dtype
            of the products alone.
        dtype: of all that is not quantised; None takes ``product_dtype(device)``.

    Raises:
        UserError: the files lack weights of the model.
    """
    return _read(folder, device, quantization, dtype)[0]


def _read(
    folder: Path | str,
    device: torch.device,
    quantization: BitsAndBytesConfig | None,
    dtype: torch.dtype | None,
) -> tuple[Any, str]:
    """What ``read_model`` gives, and what computes its linear attention."""
    where = str(device) if device.index is not None or device.type == "cpu" else f"{device.type}:0"
    whole = AutoConfig.from_pretrained(folder)
    family = family_of(whole)
    # The names of a language model in files that hold more; those of its own files stay as they are.
    names = {f"^{re.escape(family.decoder_in_wrapper)}": family.decoder} if family.text else None
    config, dtype = language_model(whole), dtype or product_dtype(device)
    options: dict[str, Any] = {"quantization_config": computing_on(device, quantization)}
    own = own_quantization(config, str(folder))
    if own is not None:
        if quantization is not None:
            own.bnb_4bit_compute_dtype = quantization.bnb_4bit_compute_dtype
        own.llm_int8_skip_modules = plain_linears(Path(folder), empty_model(config))
        config.quantization_config = cast(BitsAndBytesConfig, computing_on(device, own)).to_dict()
        options = {}
    reader: Any = AutoModelForCausalLM
    with _quiet():
        model, told = reader.from_pretrained(
            folder,
            config=config,
            key_mapping=names,
            dtype=dtype,
            device_map={"": where},
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    if told["missing_keys"]:
        # transformers would begin them at random.
        lost = sorted(told["missing_keys"])
        raise UserError(
            f"model_name_or_path: {folder} lacks {lost[0]} and {len(lost) - 1} more weights; fetch its files again."
        )
    if own is not None:
        give_dtype(model, dtype)
    keep_apart(model)
    return model, choose_delta_rule(model, device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of weights that a model does not take, such as those of a vision tower."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def load_base(
    folder: Path | str,
    quantization: BitsAndBytesConfig | None,
    device: torch.device,
) -> nn.Module:
    """The frozen base that an adapter is trained on; the arguments are those of ``read_model``."""
    with timed("loading the base"):
        model, computed = _read(folder, device, quantization, None)
    if computed:
        log.info(computed)
    freeze(model)
    return model  # type: ignore[no-any-return]


def freeze(model: Any) -> None:
    """Make of a loaded model the base of an adapter, of which nothing is trained."""
    model.requires_grad_(False)
    model.config.use_cache = False
    for module in model.modules():
        # In eval mode bitsandbytes would repack CPU weights in place; training after a validation then fails.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def put_adapter(base: Any, lora: LoraConfig) -> PeftModel:
    """A base with a new adapter on it.

    Args:
        base: loaded, or without weights.
        lora: of the adapter; ``all-linear`` in it becomes the names of linears.
    """
    resolve_all(base.config, lora)
    with adapting(base, lora):
        return get_peft_model(base, lora)  # type: ignore[return-value]


def read_adapted(base: Any, adapter: Path) -> Any:
    """A base with a saved adapter on it, to be asked.

    Args:
        base: as ``read_model`` or ``load_base`` gives it.
        adapter: PEFT's folder.

    Raises:
        UserError: the adapter lacks weights for this base, of which PEFT only warns: the base alone would answer.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            config = LoraConfig.from_pretrained(str(adapter))
            vars(config).update(for_language_model(vars(config)), inference_mode=True)
            names = TO_LANGUAGE_MODEL
            with adapting(base, config):
                return PeftModel.from_pretrained(base, str(adapter), config=config, key_mapping=names).eval()
        except UserWarning as error:
            raise UserError(f"{adapter} is not an adapter of this base ({_reason(error)}); give its own.") from error


def add_adapter(base: nn.Module, lora: LoraConfig, checkpointing: bool) -> PeftModel:
    """The base with fp32 LoRA weights, in training mode, recomputing activations in backward when asked.

    The base's norms and embeddings stay bf16: Qwen's RMSNorm computes in fp32 by itself.
    """
    lora.task_type = "CAUSAL_LM"
    model = put_adapter(base, lora)
    if checkpointing:
        enable = getattr(base, "activation_checkpointing_enable", None)
        if enable is not None:
            enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            base.enable_input_require_grads()  # type: ignore[operator]
    model.train()
    return model
