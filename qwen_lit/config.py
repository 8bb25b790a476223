"""The sections of the configuration that come from other libraries, under the names users know."""

from dataclasses import dataclass
from typing import final

from peft import LoftQConfig, LoraConfig
from transformers import BitsAndBytesConfig


@final
class QuantizationSection(BitsAndBytesConfig):
    """transformers' BitsAndBytesConfig: how the frozen base is held in memory."""


@final
@dataclass
class LoraSection(LoraConfig):
    """PEFT's LoraConfig: which linears are adapted, and how."""

    def __post_init__(self) -> None:
        """PEFT warns of a ``loftq_config`` that is not used; the parser makes one where none is given."""
        if self.init_lora_weights != "loftq" and self.loftq_config == LoftQConfig():
            self.loftq_config = {}
        super().__post_init__()
