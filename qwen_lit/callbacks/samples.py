"""Fixed prompts, answered at each validation: what the model says while it learns."""

import json
import logging
import os
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from tqdm.utils import disp_len, disp_trim

from qwen_lit.callbacks.trackers import log_samples
from qwen_lit.data.datamodule import QwenDataModule, data_of
from qwen_lit.export.modelfile import modelfile
from qwen_lit.export.served import difference, sent
from qwen_lit.generate import generate
from qwen_lit.lines import question
from qwen_lit.model.module import QwenModule
from qwen_lit.run import Run
from qwen_lit.seams import options_of
from qwen_lit.thinking import asked

log = logging.getLogger(__name__)


class Samples(Callback):
    """Writes the model's answers to the log, to the loggers and to ``output_dir/samples.jsonl``."""

    def __init__(
        self,
        run: Run,
        prompts: list[str] | None = None,
        rows: int = 2,
        max_new_tokens: int = 64,
    ) -> None:
        """Keeps the questions' source; they are read when training begins.

        Args:
            run: names the file.
            prompts: questions that are answered before the first step and at each validation; null takes those of
                the first validation rows, or the beginning of raw text.
            rows: number of validation rows whose questions are taken where prompts is null; 0 takes none.
            max_new_tokens: most tokens of an answer.
        """
        self.prompts, self.rows, self.max_new_tokens = prompts, rows, max_new_tokens
        self.path = run.samples
        self.asked: list[tuple[list[int], str | None]] = []
        """Prompt ids and the answer of the row, where it is known."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the questions; before the first step, answer them with the weights that the run begins with."""
        self.asked = self._questions(trainer)
        if trainer.global_step == 0:
            self._answer(trainer, cast(QwenModule, pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Answer the prompts with the weights of this step."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._answer(trainer, cast(QwenModule, pl_module))

    def _questions(self, trainer: L.Trainer) -> list[tuple[list[int], str | None]]:
        data = data_of(trainer)
        assert data.val_rows is not None
        if self.prompts is not None:
            chats, form = [[{"role": "user", "content": prompt}] for prompt in self.prompts], data.form()
            think = form.enable_thinking if form else None
            return [(asked(data.tokenizer, one, think), None) for one in chats]
        found: list[tuple[list[int], str | None]] = []
        for number in range(min(self.rows, len(data.val_rows))):
            prompt, following = data.val_rows.prompt(number, self.max_new_tokens)
            # The tokens may be cut off within a character.
            wanted = data.tokenizer.decode(following, skip_special_tokens=True).rstrip("\ufffd")
            found.append((prompt.tolist(), wanted))
        self._compare(data, [prompt for prompt, _ in found])
        return found

    def _compare(self, data: QwenDataModule, prompts: list[list[int]]) -> None:
        """Say, before anything is trained, where the exported model would be asked otherwise than it is trained."""
        if (form := data.form()) is None:
            return
        text = modelfile(data.tokenizer, {}, (), form)
        for prompt in prompts:
            for name, ids in sent(text, data.tokenizer, form, prompt).items():
                if what := difference(prompt, ids, name, data.tokenizer):
                    log.warning("%s will ask otherwise than is trained: %s", name, what)
                    return

    def _answer(self, trainer: L.Trainer, module: QwenModule) -> None:
        assert module.model is not None
        if not self.asked or not trainer.is_global_zero or options_of(trainer).fast_dev_run:
            return
        tokenizer = data_of(trainer).tokenizer
        prompts = [prompt for prompt, _ in self.asked]
        # Streamed layers come once for each token of a batch, however many prompts are in it.
        batches = [prompts] if module.store is not None and module.store.streamed else [[one] for one in prompts]
        training = module.model.training
        module.model.eval()
        with trainer.precision_plugin.forward_context():
            answers = [
                answer
                for batch in batches
                for answer in generate(module.model, tokenizer, batch, self.max_new_tokens, use_cache=True)
            ]
        module.model.train(training)
        lines = [
            {
                "step": trainer.global_step,
                "prompt": tokenizer.decode(prompt),
                "answer": answer.text,
                "stopped": answer.ended,
                "wanted": wanted,
            }
            for (prompt, wanted), answer in zip(self.asked, answers, strict=True)
        ]
        self._write(trainer, lines)

    def _write(self, trainer: L.Trainer, lines: list[dict[str, Any]]) -> None:
        # A resumed run makes the steps after its checkpoint once more, and answers them once more.
        earlier = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.is_file() else []
        kept = [one for one in earlier if one.endswith("\n") and json.loads(one)["step"] < lines[0]["step"]]
        partial = self.path.with_suffix(".tmp")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            for number, line in enumerate(lines):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                log.info("sample %d at step %d: %s", number + 1, line["step"], _short(question(line["prompt"])))
                log.info("  -> %s", _short(line["answer"]))
        os.replace(partial, self.path)
        log_samples(trainer.loggers, [*map(json.loads, kept), *lines], len(lines))


def _short(text: str, most: int = 60) -> str:
    """The text on one line, cut to ``most`` columns of a terminal."""
    flat = " ".join(text.split())
    return flat if disp_len(flat) <= most else disp_trim(flat, most - 1) + "…"
