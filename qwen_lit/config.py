"""The sections of the configuration that come from other libraries, under the names users know."""

from dataclasses import dataclass
from typing import final

from peft import LoraConfig
from transformers import BitsAndBytesConfig


@final
class Quantization(BitsAndBytesConfig):
    """transformers' BitsAndBytesConfig: how the frozen base is held in memory."""


@final
@dataclass
class Lora(LoraConfig):
    """PEFT's LoraConfig: which linears are adapted, and how."""
