"""Chat templates run in a sandbox; most of its time goes into asking, for each row again, what is safe to read."""

from types import BuiltinMethodType
from typing import Any

from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

DICT_NAMES = frozenset(dir(dict))
TEXT_METHODS = frozenset(
    {
        "endswith",
        "find",
        "isdigit",
        "lower",
        "lstrip",
        "replace",
        "rstrip",
        "split",
        "startswith",
        "strip",
        "title",
        "upper",
    }
)

LOOPS = frozenset({"_block_vars", "_loop_vars"})
"""What jinja passes of a loop to functions that ask for it."""


def answer_at_once(tokenizer: Any) -> None:
    """Let the tokenizer's compiled template read fields and call plain text methods without that question.

    The sandbox allows these for every dict, namespace, loop and text, so nothing else is rendered, and nothing else is
    allowed. Where transformers compiles templates in another way, all stays as it is.

    Args:
        tokenizer: transformers', with a chat template of one text.
    """
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        environment = _compile_jinja_template(tokenizer.chat_template).environment
        asked, called, undefined = type(environment).getattr, type(environment).call, environment.undefined
    except (ImportError, AttributeError, TypeError):
        return

    def read(value: Any, name: str) -> Any:
        kind = type(value)
        if kind is dict:
            if name not in DICT_NAMES:
                return value[name] if name in value else undefined(obj=value, name=name)
        elif kind is str:
            if name in TEXT_METHODS:
                return getattr(value, name)
        elif isinstance(value, (Namespace, LoopContext)) and not name.startswith("_"):
            found = getattr(value, name, asked)
            if not callable(found):
                return found
        return asked(environment, value, name)

    def call(context: Any, function: Any, *arguments: Any, **options: Any) -> Any:
        if type(function) is BuiltinMethodType and type(function.__self__) is str:
            if function.__name__ in TEXT_METHODS and options.keys() <= LOOPS:
                return function(*arguments)
        return called(environment, context, function, *arguments, **options)

    environment.getattr, environment.call = read, call
