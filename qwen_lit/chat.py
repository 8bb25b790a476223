"""``python -m qwen_lit chat PATH``: talk to an adapter on its 4-bit base, or to a merged model."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from qwen_lit.errors import UserError, shortened
from qwen_lit.export.serving import end_tokens
from qwen_lit.hardware import product_dtype
from qwen_lit.model.load import check_weights, computing_on, load_config
from qwen_lit.quantization import usable
from qwen_lit.run import training_config

HELP = """/system TEXT  begin anew under a system prompt        /reset  begin anew
/think        switch thinking on or off (Qwen3)       /save FILE.jsonl  keep the conversation as a row
/help         this                                    /quit   end"""


class Chat:
    """A conversation with a model."""

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int = 1024, sample: bool = True) -> None:
        """Begins with no message.

        Args:
            model: a transformers or PEFT model for generation.
            tokenizer: its tokenizer.
            max_new_tokens: most tokens of an answer.
            sample: draw by the generation config's settings; False takes the likeliest token.
        """
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.sample = max_new_tokens, sample
        self.messages: list[dict[str, str]] = []
        self.think: bool | None = None

    def ask(self, question: str) -> Iterator[str]:
        """The answer, piece by piece; both are part of the conversation once it has ended."""
        from transformers import TextIteratorStreamer

        self.messages.append({"role": "user", "content": question})
        options = {} if self.think is None else {"enable_thinking": self.think}
        inputs = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, **options
        ).to(self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        settings = {
            **inputs, "streamer": streamer, "max_new_tokens": self.max_new_tokens,
            "eos_token_id": end_tokens(self.tokenizer), "pad_token_id": self.tokenizer.pad_token_id,
            **({} if self.sample else {"do_sample": False}),
        }  # fmt: skip
        worker = Thread(target=self._generate, args=(settings, streamer), daemon=True)
        worker.start()
        pieces = []
        for piece in streamer:
            pieces.append(piece)
            yield piece
        worker.join()
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _generate(self, settings: dict[str, Any], streamer: Any) -> None:
        try:
            with torch.no_grad():
                self.model.generate(**settings)
        finally:
            streamer.end()

    def command(self, line: str) -> str | None:
        """Obey a line that begins with a slash; returns what to say, None to end."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/quit":
            return None
        if name == "/reset":
            self.messages = [one for one in self.messages[:1] if one["role"] == "system"]
            return "a new conversation"
        if name == "/system":
            self.messages = [{"role": "system", "content": rest}] if rest else []
            return "a new conversation under this system prompt" if rest else "a new conversation without one"
        if name == "/think":
            self.think = not self.think
            return f"thinking is {'on' if self.think else 'off'}"
        if name == "/save" and rest:
            if not any(one["role"] == "assistant" for one in self.messages):
                return "there is no answer to save yet"
            try:
                with Path(rest).expanduser().open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
            except OSError as error:
                return f"cannot write to {rest} ({error.strerror or error}); give another file"
            return f"saved to {rest}"
        return HELP


def load(path: str, quantize: bool | None) -> tuple[Any, Any]:
    """The model and the tokenizer of an adapter folder or a model folder.

    Args:
        path: ``lora_adapter/``, ``final_model/``, or the output folder that holds them.
        quantize: hold an adapter's base in 4 bits, or not; None holds it as it was trained.

    Raises:
        UserError: it is none of these, or its base is not there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    folder = Path(path).expanduser()
    for name in ("final_model", "lora_adapter"):
        if not (folder / "config.json").is_file() and (folder / name).is_dir():
            folder = folder / name
    adapter = folder / "adapter_config.json"
    if not adapter.is_file() and not (folder / "config.json").is_file():
        raise UserError(f"chat: {path} holds neither an adapter nor a model; give lora_adapter/ or final_model/.")
    base = str(Path(base_of(adapter)).expanduser() if adapter.is_file() else folder)
    check_weights(base)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    config = four_bits if quantize else None
    if quantize is None and adapter.is_file():
        trained = training_config(folder).get("model")
        held = trained.get("quantization_config") if trained else None
        config = usable(BitsAndBytesConfig(**held), load_config(str(base))) if held else None if trained else four_bits
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=product_dtype(device), device_map={"": str(device)},
            quantization_config=computing_on(device, config),
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        reason = shortened(" ".join(str(error).split()))
        raise UserError(f"chat: cannot load {base} ({reason}); give a model whose base is here.") from error
    if adapter.is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder))
    return model.eval(), tokenizer


def base_of(adapter: Path) -> str:
    """The base that an ``adapter_config.json`` names.

    Raises:
        UserError: it names none.
    """
    try:
        return str(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"chat: {adapter} names no base ({error}); export the adapter again.") from error


def main(args: list[str]) -> int:
    """One answer with ``--prompt``, a conversation without."""
    parser = argparse.ArgumentParser(prog="python -m qwen_lit chat", description=__doc__, epilog=HELP,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("path", help="lora_adapter/, final_model/, or the output folder that holds them")
    parser.add_argument("--prompt", help="answer this and end")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--think", action=argparse.BooleanOptionalAction, help="let a Qwen3 think first, or not")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of drawing")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="most tokens of an answer")
    parser.add_argument("--load_in_4bit", action=argparse.BooleanOptionalAction, default=None,
                        help="hold the base in 4 bits, or not; default: as the adapter was trained")  # fmt: skip
    given = parser.parse_args(args)
    if given.max_new_tokens < 1:
        print(f"error: --max_new_tokens is {given.max_new_tokens}; it must be at least 1.", file=sys.stderr)
        return 2
    quantize = given.load_in_4bit
    try:
        model, tokenizer = load(given.path, quantize)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chat = Chat(model, tokenizer, given.max_new_tokens, not given.greedy)
    chat.think = given.think
    if given.system:
        chat.command("/system " + given.system)
    if given.prompt is not None:
        _say(chat, given.prompt)
        return 0
    print(HELP)
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            return 0
        if line.startswith("/"):
            said = chat.command(line)
            if said is None:
                return 0
            print(said)
        elif line:
            _say(chat, line)


def _say(chat: Chat, question: str) -> None:
    for piece in chat.ask(question):
        print(piece, end="", flush=True)
    print()
