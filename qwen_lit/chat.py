"""``python -m qwen_lit chat PATH``: talk to an adapter on its 4-bit base, or to a merged model."""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from qwen_lit.errors import UserError, shortened
from qwen_lit.export.serving import end_tokens
from qwen_lit.hardware import product_dtype
from qwen_lit.hub import fetch
from qwen_lit.model.load import check_weights, computing_on, load_config
from qwen_lit.quantization import usable
from qwen_lit.run import training_config

HELP = """/system TEXT  start over under a system prompt   /reset  start over
/think        switch thinking on or off          /save FILE.jsonl  keep as a row
/help         this list                          /quit   end
Ctrl-C        stop the answer; twice, end"""
OUT_OF_MEMORY = (
    "out of memory; /reset starts over with a short conversation, and chat with --load_in_4bit takes a quarter of the "
    "memory for weights"
)


class _Until(StoppingCriteria):
    """Ends an answer when an event is set."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **options: Any) -> torch.BoolTensor:
        return torch.full(input_ids.shape[:1], self.event.is_set(), device=input_ids.device)  # type: ignore[return-value]


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
        self.can_think = "enable_thinking" in str(tokenizer.chat_template)

    def ask(self, question: str) -> Iterator[str]:
        """The answer, piece by piece; both are part of the conversation once it has ended, or was stopped.

        Raises:
            torch.OutOfMemoryError: the conversation does not fit; the question is taken back.
        """
        self.messages.append({"role": "user", "content": question})
        options = {} if self.think is None else {"enable_thinking": self.think}
        inputs = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, **options
        ).to(self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failures = Event(), list[Exception]()
        settings = {
            **inputs, "streamer": streamer, "max_new_tokens": self.max_new_tokens,
            "stopping_criteria": StoppingCriteriaList([_Until(stop)]),
            "eos_token_id": end_tokens(self.tokenizer), "pad_token_id": self.tokenizer.pad_token_id,
            **({} if self.sample else {"do_sample": False}),
        }  # fmt: skip
        worker = Thread(target=self._generate, args=(settings, streamer, failures), daemon=True)
        worker.start()
        pieces: list[str] = []
        try:
            for piece in streamer:
                pieces.append(piece)
                yield piece
        finally:
            stop.set()
            worker.join()
            if failures:
                self.messages.pop()
            else:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
        if failures:
            raise failures[0]

    def _generate(self, settings: dict[str, Any], streamer: Any, failures: list[Exception]) -> None:
        try:
            with torch.no_grad():
                self.model.generate(**settings)
        except Exception as error:
            failures.append(error)
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
        if name == "/think" and not self.can_think:
            return "this model's chat template knows no thinking"
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

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    folder = chosen(Path(path).expanduser(), device)
    adapter = folder / "adapter_config.json"
    if not adapter.is_file() and not (folder / "config.json").is_file():
        raise UserError(f"chat: {path} holds neither an adapter nor a model; give lora_adapter/ or final_model/.")
    name = base_of(adapter) if adapter.is_file() else str(folder)
    base = fetch(name, training_config(folder).get("model", {}).get("hub", "huggingface"), weights=True)
    check_weights(base)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    config = four_bits if quantize else None
    if quantize is None and adapter.is_file():
        trained = training_config(folder).get("model")
        held = trained.get("quantization_config") if trained else None
        config = usable(BitsAndBytesConfig(**held), load_config(base)) if held else None if trained else four_bits
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=product_dtype(device), device_map={"": str(device)},
            quantization_config=computing_on(device, config),
        )  # fmt: skip
        model.config._name_or_path = name
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        reason = shortened(" ".join(str(error).split()))
        raise UserError(f"chat: cannot load {base} ({reason}); give a model whose base is here.") from error
    if adapter.is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder))
    return model.eval(), tokenizer


def chosen(folder: Path, device: torch.device) -> Path:
    """Of an output folder the merged model, or, where that does not fit the device, the adapter."""
    merged, adapter = folder / "final_model", folder / "lora_adapter"
    if (folder / "config.json").is_file() or not (merged.is_dir() or adapter.is_dir()):
        return folder
    size = sum(file.stat().st_size for file in merged.glob("*.safetensors"))
    size *= 2 if product_dtype(device) == torch.float32 else 1
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return merged if merged.is_dir() and (1.1 * size < free or not adapter.is_dir()) else adapter


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
        try:
            _say(chat, given.prompt)
        except torch.OutOfMemoryError:
            print(f"error: {OUT_OF_MEMORY}.", file=sys.stderr)
            return 1
        return 0
    print(f"{introduced(chat)}\n{HELP}")
    # Ctrl-C is for the answer here, and not for the command.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with line_editing():
        return converse(chat)


def converse(chat: Chat) -> int:
    """Questions and answers until the end; returns the exit code."""
    stopped = False
    while True:
        try:
            print()
            line = input("> ").strip()
            stopped = False
            if line.startswith("/"):
                said = chat.command(line)
                if said is None:
                    return 0
                print(said)
            elif line:
                _say(chat, line)
        except EOFError:
            return 0
        except KeyboardInterrupt:
            if stopped:
                print()
                return 130
            print("\n(stopped; Ctrl-C again ends)")
            stopped = True
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            print(OUT_OF_MEMORY)


def introduced(chat: Chat) -> str:
    """The model, how it is held, and whether it thinks."""
    config = chat.model.config
    name = getattr(config, "_name_or_path", "") or "a model"
    bits = "4 bits" if getattr(chat.model, "is_loaded_in_4bit", False) else str(chat.model.dtype).split(".")[-1]
    adapter = " with its adapter" if hasattr(chat.model, "peft_config") else ""
    thinking = {None: "as its template says", True: "on", False: "off"}[chat.think] if chat.can_think else "none"
    return f"{name}{adapter}, {bits}, on {chat.model.device}, thinking: {thinking}"


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
    """Editing and a history of questions in a terminal, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    history = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "qwen_lit" / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(history)


def _say(chat: Chat, question: str) -> None:
    answer = chat.ask(question)
    try:
        for piece in answer:
            print(piece, end="", flush=True)
        print()
    finally:
        answer.close()  # type: ignore[attr-defined]
