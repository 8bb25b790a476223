"""The first thing that a command meets: what can be answered without torch is answered here, in a second."""

BESIDE = {"chat": "qwen_lit.chat", "configs": "qwen_lit.shipped"}
"""Commands that are no method of the Trainer: the module whose ``main`` takes the arguments."""
