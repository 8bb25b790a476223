"""A trained adapter to a folder that serves: the verdict, the merge, the files around it, and a try."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig

from qwen_lit.export.adapter import RESIDUAL_INITS, write_for_whole
from qwen_lit.export.card import AdapterFacts, ModelCardFacts, finish_adapter, model_card
from qwen_lit.export.folder import ExportError, commit_folder, read_json, rewrite
from qwen_lit.export.gguf import GgufType, write_gguf
from qwen_lit.export.merge import MergeReport, merge_adapter
from qwen_lit.export.served import difference, sent
from qwen_lit.export.serving import untrained_end, write_serving_files
from qwen_lit.export.verdict import Verdict, measure
from qwen_lit.families.layer import Family
from qwen_lit.generate import generate
from qwen_lit.model.load import load_tokenizer, read_model
from qwen_lit.model.trained import weights
from qwen_lit.planner.measure import free_memory
from qwen_lit.quantization import Held
from qwen_lit.thinking import Form

log = logging.getLogger(__name__)
Merge = Literal["original", "dequantized"]
MergeBase = Literal["auto", "original", "dequantized"]
Example = tuple[Any, Any]
"""Token ids ``[t]`` and trained ranges ``[k, 2]``; of a prompt, its ids and those that follow."""
Question = tuple[int, list[int], int]
"""Number of the prompt, token ids of a form of it, and the most tokens of its answer."""
AS_TRAINED = "the adapter on its base, as it was trained"
EXPECTED = (ExportError, OSError, MemoryError, SafetensorError, torch.OutOfMemoryError)
"""Errors that a user can fix, reported in one line; any other is logged with its traceback."""


@dataclass
class Job:
    """What is exported, from folders alone."""

    adapter_dir: Path
    base_dir: Path
    out_dir: Path
    tokenizer: Any
    facts: ModelCardFacts
    held: Mapping[str, Held] = field(default_factory=dict)
    """How the base's quantised weights were held in training; empty for a bf16 base."""
    merge_base: MergeBase | None = None
    """None is the first of ``merges``."""
    original_dir: Path | None = None
    """The original's folder, where the files of ``base_dir`` are quantised."""
    is_prequantized: bool = False
    """Whether they are."""
    gguf: GgufType | None = None
    held_out: Sequence[Example] = ()
    """Rows for the verdict."""
    kind: str = "held-out"
    """What these rows are."""
    taught: Sequence[Example] = ()
    """Token ids of the prompts that the merged model is tried on, and of what was taught to follow each."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    trained: Callable[[], AbstractContextManager[Any]] | None = None
    """Lends the adapter on its base as it was trained, on the device, to be asked where the merged model does not fit;
    None where that is not asked."""

    @property
    def merges(self) -> tuple[Merge, ...]:
        """What the adapter can be added to."""
        if not self.held:
            return ("original",)
        has_original = self.original_dir is not None or not self.is_prequantized
        return ("original", "dequantized") if has_original else ("dequantized",)


def run(job: Job, on_verdict: Callable[[Verdict], None] = lambda verdict: None) -> ModelCardFacts:
    """Measure, merge, write, try; what of it fails is named in ``missing``, and the rest is done.

    Args:
        job: what to export.
        on_verdict: called with the verdict, where there is one.

    Returns:
        What the model card tells.
    """
    facts = job.facts
    chosen = [one for one in job.merges if one == job.merge_base]
    facts.merge_base = (chosen or job.merges)[0]
    facts.held_in = " and ".join(sorted({str(one) for one in job.held.values()}))
    facts.adapter_path = _seen_from(job.out_dir, job.adapter_dir)
    if job.held_out:
        with part("the verdict", facts.missing):
            _measure(job, on_verdict)
    with part(job.out_dir.name, facts.missing):
        report = _merge(job)
    if job.out_dir.name in facts.missing or not job.taught:
        return facts
    merged = fits(report.bytes, job.device)
    if merged or job.trained is not None:
        with part("the answers to trained prompts", facts.missing):
            if not merged:
                facts.asked = AS_TRAINED
                log.info("the merged model does not fit %s: %s is asked instead", job.device, AS_TRAINED)
            facts.stopped = try_prompts(job, merged)
            said = "%d of %d trained prompts ended by themselves"
            (log.info if facts.stopped[0] == facts.stopped[1] else log.warning)(said, *facts.stopped)
            for name, what in facts.unlike.items():
                log.warning("asked otherwise than trained through %s: %s", name, what)
            if facts.served:
                log.info("asked as trained, token by token, through %s", " and ".join(facts.served))
            rewrite(job.out_dir, "README.md", model_card(facts))
    return facts


@contextmanager
def part(name: str, missing: dict[str, str]) -> Iterator[None]:
    """A part of the export: one that fails is noted, with the reason, and does not take the rest with it."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, EXPECTED):
            log.exception("%s could not be made", name)
        missing[name] = (str(error) or type(error).__name__).splitlines()[0]


def _measure(job: Job, on_verdict: Callable[[Verdict], None]) -> None:
    """Compare the merges with the adapter, and choose one where that is asked for."""
    facts = job.facts
    verdict = measure(job.adapter_dir, job.base_dir, job.held_out, job.held, job.device, job.original_dir)
    if job.merge_base == "auto":
        facts.merge_base = verdict.best
    facts.verdict = verdict.as_dict() | {"kind": job.kind}
    log.info("does the merged model answer as trained? %d %s rows:", verdict.rows, job.kind)
    for line in verdict.lines():
        log.info("  %s", line)
    hint = "" if facts.merge_base == verdict.best else f"; export.merge_base: {verdict.best} would answer nearer"
    log.info("  merged into the %s weights%s", facts.merge_base, hint)
    if warning := verdict.warning(facts.merge_base):
        log.warning(warning)
    on_verdict(verdict)


def _merge(job: Job) -> MergeReport:
    """The merged model with all that stands beside it; a GGUF file that fails is left out."""
    facts = job.facts
    facts.adapter = AdapterFacts.read(job.adapter_dir)
    facts.architecture = next(iter(read_json(job.base_dir / "config.json").get("architectures") or []), "")
    if warning := untrained_end(job.base_dir, job.tokenizer):
        log.warning(warning)
    gguf = f"model-{job.gguf}.gguf"

    def finish(folder: Path) -> None:
        if job.gguf is not None:
            with part(gguf, facts.missing):
                write_gguf(folder, folder / gguf, job.gguf, job.tokenizer)
        facts.gguf = gguf if (folder / gguf).is_file() else None
        write_serving_files(folder, job.base_dir, job.tokenizer, facts)

    base: Merge = "dequantized" if facts.merge_base == "dequantized" else "original"
    report = merge_adapter(
        job.adapter_dir,
        job.base_dir,
        job.out_dir,
        merge_base=base,
        held=job.held,
        original_dir=job.original_dir,
        finish=finish,
        device=job.device,
    )
    speed = report.bytes / 1e9 / report.seconds
    log.info("merged model written to %s (%.2f GB, %.2f GB/s)", job.out_dir, report.bytes / 1e9, speed)
    return report


def _seen_from(folder: Path, adapter: Path) -> str:
    """The adapter's path in commands that are run in the model folder."""
    beside = adapter.resolve().parent == folder.resolve().parent
    return f"../{adapter.name}" if beside else str(adapter.resolve())


def fits(size: int, device: torch.device) -> bool:
    """Whether a model of ``size`` bytes can be tried where it is: on a card with room for it, or small on the CPU."""
    if device.type == "cuda":
        return free_memory(device) - torch.cuda.memory_allocated(device) > 1.15 * size + 2**30
    return size < 2**31


def try_prompts(job: Job, merged: bool) -> tuple[int, int]:
    """Answer prompts of trained rows with plain transformers, as each served form sends them.

    Which forms send them as they were trained, and what is otherwise in those which do not, is noted in the facts.

    Args:
        job: whose merged model is written.
        merged: ask that; otherwise what was trained.

    Returns:
        How many ended by themselves, however they were asked, of how many.
    """
    tokenizer, facts = load_tokenizer(job.out_dir, str(job.out_dir)), job.facts
    names = dict[str, None]()
    # Beside one that the user has edited.
    beside = job.out_dir / "Modelfile.new"
    text = (beside if beside.is_file() else job.out_dir / "Modelfile").read_text(encoding="utf-8")
    questions: list[Question] = []
    for number, (prompt, following) in enumerate(job.taught):
        trained = prompt.tolist()
        found = sent(text, tokenizer, facts.form, trained) if facts.form else {}
        for name, ids in found.items():
            names[name] = None
            if what := difference(trained, ids, name, tokenizer):
                facts.unlike.setdefault(name, what)
        most = 2 * len(following) + 64
        questions += [(number, list(one), most) for one in dict.fromkeys(map(tuple, found.values() or [trained]))]
    went_on = _went_on(job, merged, tokenizer, questions)
    facts.served = tuple(name for name in names if name not in facts.unlike)
    return len(job.taught) - len(went_on), len(job.taught)


def _went_on(job: Job, merged: bool, tokenizer: Any, questions: list[Question]) -> set[int]:
    """The prompts of which an answer did not end by itself.

    Args:
        job: as of ``try_prompts``.
        merged: as of ``try_prompts``.
        tokenizer: of the merged model.
        questions: one or more for each prompt.
    """
    # Layers that are streamed come once for each token of a batch, however many prompts are in it.
    batches = [[one] for one in questions] if merged else [questions]
    # What was trained is asked with the merged model's own config, as a server reads that.
    own: dict[str, Any] = {"generation_config": GenerationConfig.from_pretrained(job.out_dir), "use_cache": True}
    options = {} if merged else own
    went_on = set[int]()
    with _lent(job) if merged or job.trained is None else job.trained() as model:
        for batch in batches:
            most = max(most for _, _, most in batch)
            answers = generate(model, tokenizer, [ids for _, ids, _ in batch], most, own_ends=True, **options)
            for (number, _, most), answer in zip(batch, answers, strict=True):
                if not answer.ended or len(answer.ids) > most:
                    went_on.add(number)
    return went_on


@contextmanager
def _lent(job: Job) -> Iterator[Any]:
    """The merged model, on the device."""
    yield read_model(job.out_dir, job.device)


def adapter_from_checkpoint(
    path: Path,
    lora: Any,
    base_name: str,
    family: Family,
    out_dir: Path,
    run: dict[str, Any],
    made: dict[str, Any] | None = None,
    form: Form | None = None,
) -> None:
    """Write ``lora_adapter/`` from the trained weights in a checkpoint, as PEFT would.

    Args:
        path: of ``fit``, read without executing anything.
        lora: PEFT's LoraConfig of the run.
        base_name: the base model's folder or hub name.
        family: of the base's files.
        out_dir: the adapter's folder.
        run: the configuration of the run.
        made: of which checkpoint it is, to be kept beside it.
        form: in which its prompts were trained.

    Raises:
        ExportError: the adapter counts from a base that its initialisation has changed.
    """
    if str(lora.init_lora_weights).lower().startswith(RESIDUAL_INITS):
        raise ExportError(
            f"init_lora_weights {lora.init_lora_weights} changes the base: run fit --ckpt_path last, which exports it."
        )
    partial = out_dir.with_name(out_dir.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = copy.copy(lora)
    config.task_type, config.base_model_name_or_path, config.inference_mode = "CAUSAL_LM", base_name, True
    config.save_pretrained(str(partial))
    save_file(weights(path), partial / "adapter_model.safetensors", metadata={"format": "pt"})
    write_for_whole(partial, family)
    finish_adapter(partial, base_name, run, made, form)
    commit_folder(partial, out_dir)
