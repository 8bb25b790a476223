"""The lines with which a run begins and ends, made of its figures."""

import re
import shlex
from datetime import timedelta
from typing import Any

TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n?|\Z)", re.DOTALL)


def plural(count: int, what: str) -> str:
    """``1 row``, ``2 rows``."""
    ending = "es" if what.endswith(("s", "ch", "x")) else "s"
    return f"{count:,} {what}{ending * (count != 1)}"


def start_lines(run: dict[str, Any], output_dir: Any) -> dict[str, str]:
    """What is trained, and on what, in ten lines by name, and one more for products in 8 bits.

    Args:
        run: as ``run_facts`` gives it.
        output_dir: of the run.
    """
    trained, total, tokens = run["trained_parameters"], run["parameters"], run["tokens"]
    targets = run["target_modules"]
    targets = targets if isinstance(targets, str) else ", ".join(targets)
    begun = f", begun from {run['init_adapter']}" if run["init_adapter"] else ""
    packed = ", packed" if run["packing"] else " at most"
    resumed = " (resumed)" if run["begins_at"] else ""
    return {
        "model": f"{run['model']} ({_count(total)} parameters)",
        "trained": f"{trained:,} ({trained / total:.2%}): r={run['r']}, alpha={run['lora_alpha']} on {targets}; "
        f"{run['adapted']}{begun}",
        "base": f"quantisation {run['quantization']}",
        "engine": run["engine"],
        **({"products": run["products"]} if run.get("products") else {}),
        "data": f"{plural(run['rows'], 'row')}, {plural(tokens, 'token')}, "
        f"{run['supervised_tokens'] / max(1, tokens):.0%} supervised; {plural(run['held_out_rows'], 'row')} held out",
        "step": f"{plural(run['micro_batches_per_step'], 'micro-batch')} of {run['batch_size']} x "
        f"{run['max_length']} tokens{packed}, about {plural(run['tokens_per_step'], 'token')}",
        "run": _length(run),
        "device": f"{run['devices']} x {run['device']}, precision {run['precision']}"
        + " (this CPU has no instructions for bf16)" * (run["product_dtype"] == "float32"),
        "output": str(output_dir),
        "begins at": f"step {run['begins_at']}{resumed}",
    }


def _length(run: dict[str, Any]) -> str:
    """How long the run is, and what the learning rate does in that time."""
    steps, of_epoch, limit = run["steps"], run["steps_per_epoch"], run["max_seconds"]
    time = "" if limit is None else f"at most {timedelta(seconds=round(limit))}"
    if steps is None:
        how_long = f"no known end, {time}; {plural(of_epoch, 'optimizer step')} an epoch"
    else:
        # A share of epochs where steps end the run, their number otherwise.
        epochs = f"{run['epochs']:.3g}" if isinstance(run["epochs"], float) else str(run["epochs"])
        how_long = f"{plural(steps, 'optimizer step')}, {epochs} epoch{'s' * (epochs != '1')} of {of_epoch:,}"
        how_long += f", {time} (the schedule is that of all steps)" if time else ""
    schedule = f"{run['lr_scheduler']}, {run['warmup_steps']:,} of warmup"
    return f"{how_long}, learning rate {run['learning_rate']:g} ({schedule}), {run['optimizer']}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number / 1e6:.1f} million"


def loss_lines(history: dict[str, list[list[float]]], best: dict[str, Any] | None) -> list[str]:
    """The last losses that are known, with their steps, and the best."""
    names = {"loss": "training", "val_loss": "validation"}
    losses = [
        f"{text} {history[name][-1][1]:.4f} at step {history[name][-1][0]:,}"
        for name, text in names.items()
        if history.get(name)
    ]
    lines = [f"loss         {', '.join(losses)}"] if losses else []
    if best:
        lines.append(f"best         validation {best['val_loss']:.4f} at step {best['step']:,}")
    return lines


def panel_lines(panel: dict[str, float], skipped: int) -> list[str]:
    """The panel of a run, in lines of at most 80 columns."""
    each = panel.get("tokens_per_second_per_card")
    peak, each_card = ("card's", "") if each is None else ("cards'", f" ({each:,.0f} a card)")
    use = f", {panel['flop_use']:.0%} of the {peak} peak" if "flop_use" in panel else ""
    lines = [
        f"throughput   {panel['tokens_per_second']:,.0f} tokens/s{each_card}, "
        f"{panel['supervised_tokens_per_second']:,.0f} supervised, {panel['fill']:.1%} full",
        f"work         {panel['model_tflops']:.2f} TFLOP/s{use}, {panel['recompute_tflops']:.2f} recomputed",
        f"time         {panel['share_waiting_for_data']:.1%} waiting for data, {panel['share_saving']:.1%} saving, "
        f"{panel['share_validating']:.1%} validating",
    ]
    if "peak_memory_gib" in panel:
        lines.append(f"memory       {panel['memory_gib']:.2f} GiB now, {panel['peak_memory_gib']:.2f} GiB at the peak")
    return [*lines, f"skipped      {plural(skipped, 'step')}"]


def end_lines(summary: dict[str, Any]) -> list[str]:
    """What there is at the end, and what to do with it.

    Args:
        summary: as ``RunReport.summary`` makes it.
    """
    files, out = summary["files"], shlex.quote(summary["output_dir"])
    all_of_it = f", {duration(summary['trained_seconds'])} of training over {plural(summary['attempts'], 'attempt')}"
    lines = [f"done in      {duration(summary['duration_seconds'])}{all_of_it * (summary['attempts'] > 1)}"]
    if made := summary["exported"]:
        loss = f", validation loss {made['val_loss']:.4f}" if "val_loss" in made else ""
        lines.append(f"exported     step {made['step']:,}, the {made['checkpoint']}{loss}")
    if "lora_adapter" in files:
        lines.append(f"talk to it   qwen-lit chat {out}")
    if "logs" in files:
        lines.append(f"curves       tensorboard --logdir {shlex.quote(files['logs'])}")
    return [*lines, f"report       {files['report']}"]


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def chat_turns(text: str) -> list[tuple[str, str]]:
    """Role and words of each turn of a text in ChatML; a text in another form is one turn without a role."""
    found = [(role, words.strip()) for role, words in TURN.findall(text)]
    # The last one is the answer's that is yet to come.
    found = found[:-1] if found and found[-1] == ("assistant", "") else found
    return found or [("", text)]


def question(text: str) -> str:
    """The last thing that a user says in a prompt; of a text in another form, all of it."""
    turns = chat_turns(text)
    return next((words for role, words in reversed(turns) if role == "user"), turns[-1][1])
