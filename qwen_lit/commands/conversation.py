"""A conversation with a loaded model: questions, answers piece by piece, and the commands that change it."""

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from qwen_lit.commands.chat import HELP
from qwen_lit.generate import generate
from qwen_lit.names import expanded
from qwen_lit.thinking import Asking, asked


class _Until(StoppingCriteria):
    """Ends an answer when an event is set."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **options: Any) -> torch.BoolTensor:
        return torch.full(input_ids.shape[:1], self.event.is_set(), device=input_ids.device)  # type: ignore[return-value]


class Chat:
    """A conversation with a model."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_new_tokens: int = 1024,
        sample: bool = True,
        think: bool | None = None,
    ) -> None:
        """Begins with no message.

        Args:
            model: a transformers or PEFT model for generation.
            tokenizer: its tokenizer.
            max_new_tokens: most tokens of an answer.
            sample: draw by the generation config's settings; False takes the likeliest token.
            think: whether it is asked to think first, where its template has a switch; None as the template does.
        """
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.sample = max_new_tokens, sample
        self.messages: list[dict[str, str]] = []
        self.cut = False
        """Whether the last answer ended at ``max_new_tokens``."""
        self.worker: Thread | None = None
        asking = Asking.of(tokenizer)
        self.can_think = asking.switch
        self.think = self.can_think and bool(asking.by_itself if think is None else think)
        """Whether the model is asked to think first."""

    @property
    def answering(self) -> bool:
        """Whether a token is still being computed."""
        return self.worker is not None and self.worker.is_alive()

    def ask(self, question: str) -> Iterator[str]:
        """The answer, piece by piece; both are part of the conversation once it has ended, or was stopped.

        A question whose answer fails, or is stopped before its first word, is taken back.

        Raises:
            torch.OutOfMemoryError: the conversation does not fit.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = asked(self.tokenizer, messages, self.think if self.can_think else None)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failures = Event(), list[Exception]()
        self.worker = Thread(target=self._answer, args=(prompt, streamer, stop, failures), daemon=True)
        self.worker.start()
        pieces: list[str] = []
        try:
            for piece in streamer:
                pieces.append(piece)
                yield piece
        finally:
            stop.set()
            self.worker.join()
            if not failures and any(pieces):
                self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        if failures:
            raise failures[0]

    def _answer(self, prompt: list[int], streamer: Any, stop: Event, failures: list[Exception]) -> None:
        try:
            (answer,) = generate(
                self.model,
                self.tokenizer,
                [prompt],
                self.max_new_tokens,
                sample=self.sample,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_Until(stop)]),
            )
            self.cut = not answer.ended and len(answer.ids) == self.max_new_tokens
        except Exception as error:
            failures.append(error)
        finally:
            streamer.end()

    def command(self, line: str) -> str | None:
        """Obey a line that begins with a slash; returns what to say, None to end."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name == "/quit":
            return None
        if name == "/help":
            return HELP
        if name == "/reset":
            self.messages = [one for one in self.messages[:1] if one["role"] == "system"]
            return "a new conversation"
        if name == "/system":
            self.messages = [{"role": "system", "content": rest}] if rest else []
            return "a new conversation under this system prompt" if rest else "a new conversation without one"
        if name == "/think" and not self.can_think:
            return "this model's chat template has no thinking mode"
        if name == "/think":
            self.think = not self.think
            return f"thinking is {'on' if self.think else 'off'}"
        if name == "/save":
            return self._save(rest)
        return f"there is no command {name}; /help lists them. Put a space before a question that begins with /"

    def _save(self, file: str) -> str:
        if not file:
            return "give a file: /save FILE.jsonl"
        if not any(one["role"] == "assistant" for one in self.messages):
            return "there is no answer to save yet"
        try:
            with Path(expanded(file)).open("a", encoding="utf-8") as opened:
                opened.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except (OSError, RuntimeError) as error:
            return f"cannot write to {file} ({getattr(error, 'strerror', None) or error}); give another file"
        return f"saved to {file}"
