"""Models whose files hold more than the language model that is trained, such as a vision tower."""

from dataclasses import replace

from qwen_lit.families.gguf import Gguf, in_wrapper
from qwen_lit.families.layer import Family, text_config


def wrapped(
    text: Family,
    model_type: str,
    releases: tuple[str, ...],
    on_disk: str = "model.language_model",
    gguf: Gguf | None = None,
) -> Family:
    """The family of the files that hold a language model and more.

    Args:
        text: the language model's own family.
        model_type: of the files' config.json.
        releases: what people call these models.
        on_disk: the decoder's place in the files.
        gguf: the language model in GGUF, where it is another than the language model's own.
    """
    return replace(
        text,
        model_type=model_type,
        releases=releases,
        layers=lambda config: text.layers(text_config(config)),
        decoder_on_disk=on_disk,
        decoder_in_wrapper="model.language_model",
        text=text.model_type,
        gguf=gguf or in_wrapper(text.gguf, text_config),
    )
