"""The table behind a plan: what each operation saves and takes, what each layer keeps, and what adds up to the
estimate."""

from itertools import groupby
from typing import Any

from qwen_lit.planner.memory import ModelMemory
from qwen_lit.planner.plan import GIB, Plan


def explain(memory: ModelMemory, plan: Plan, static: int, tokens: int, processes: int = 1) -> dict[str, Any]:
    """The table of a plan, in plain numbers; its parts add up to ``estimate_bytes``.

    Args:
        memory: of the model.
        plan: made for it.
        static: bytes allocated before the first step, as the plan was made with.
        tokens: of the largest micro-batches that are computed as one.
        processes: on the machine.
    """
    policies = plan.policies
    piece = policies.mlp_piece if policies.mlp_piece < tokens else 0
    layers = [
        (one.unpacked or one) if policy.recomputes else one
        for one, policy in zip(memory.table(piece), policies.layers, strict=True)
    ]
    kinds = []
    for (layer, policy), group in groupby(enumerate(layers), lambda one: (one[1], policies.layers[one[0]])):
        numbers = [number for number, _ in group]
        kept = layer.input if policy.recomputes else layer.saved
        kinds.append(
            {
                "layers": [numbers[0], numbers[-1]],
                "policy": policy.value,
                "keeps_bytes_per_token": kept,
                "keeps_gib": kept * tokens * len(numbers) / GIB,
            }
        )
    distinct: dict[Any, list[int]] = {}
    for number, layer in enumerate(layers):
        distinct.setdefault(layer.ops, []).append(number)
    peak = max(memory.moments(tokens, policies), key=lambda moment: moment.bytes(tokens))
    held = sum(memory.resident[number] for number in policies.resident)
    slots = memory.streaming.slots(policies.streamed)
    parts = {
        "weights": memory.weights(static, policies) - held - slots,
        "slots of streamed layers": slots,
        "weights held dequantised": held,
        **memory.constants,
        "kept by the layers at the peak": peak.kept * tokens,
        f"at the peak: {peak.name}": (peak.per_token - peak.kept) * tokens + peak.fixed,
    }
    return {
        "tokens": tokens,
        "layers": [
            {
                "numbers": numbers,
                "saved_bytes_per_token": sum(op.saved_bytes for op in ops),
                "ops": [
                    {
                        "name": op.name,
                        "saved": {saved.name: saved.bytes for saved in op.saved},
                        "saved_bytes_per_token": op.saved_bytes,
                        "backward_bytes_per_token": op.grad + op.scratch,
                        "backward_bytes": op.fixed,
                    }
                    for op in ops
                ],
            }
            for ops, numbers in distinct.items()
        ],
        "policies": kinds,
        "parts_bytes": {name: size for name, size in parts.items() if size},
        "estimate_bytes": sum(parts.values()),
        "host_bytes": memory.on_host(tokens, policies, processes),
    }


def table_lines(table: dict[str, Any]) -> list[str]:
    """The table of ``explain`` in lines of at most 80 columns."""
    tokens = table["tokens"]
    out = [f"table       of a micro-batch of {tokens:,} tokens; bytes a token, and GiB of all"]
    for layer in table["layers"]:
        out += ["", f"{_ranges(layer['numbers']):<42}{'saved':>9}{'GiB':>8}{'backward':>11}{'GiB':>8}"]
        for op in layer["ops"]:
            back = op["backward_bytes_per_token"] * tokens + op["backward_bytes"]
            saved = op["saved_bytes_per_token"]
            out.append(
                f"  {op['name']:<40}{saved:>9,}{saved * tokens / GIB:>8.3f}"
                f"{op['backward_bytes_per_token']:>11,}{back / GIB:>8.3f}"
            )
            out += [f"    {name:<38}{size:>9,}" for name, size in op["saved"].items()]
        saved = layer["saved_bytes_per_token"]
        out.append(f"  {'a layer':<40}{saved:>9,}{saved * tokens / GIB:>8.3f}")
    out += ["", f"{'what each layer keeps until its backward':<42}{'a token':>9}{'GiB':>8}"]
    for kind in table["policies"]:
        first, last = kind["layers"]
        name = f"{_ranges(list(range(first, last + 1)))}: {kind['policy']}"
        out.append(f"  {name:<40}{kind['keeps_bytes_per_token']:>9,}{kind['keeps_gib']:>8.3f}")
    out += ["", f"{'the estimate':<51}{'GiB':>8}"]
    out += [f"  {name:<49}{size / GIB:>8.3f}" for name, size in table["parts_bytes"].items()]
    out.append(f"  {'sum':<49}{table['estimate_bytes'] / GIB:>8.3f}")
    if host := table["host_bytes"]:
        out += ["", f"{'what waits in host memory':<51}{'GiB':>8}"]
        out += [f"  {name:<49}{size / GIB:>8.3f}" for name, size in host.items()]
    return out


def _ranges(numbers: list[int]) -> str:
    """``layer 0``, ``layers 1-26``, ``layers 1, 3-4``."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda one: one[1] - one[0])]
    joined = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"layer{'s' * (len(numbers) > 1)} {joined}"
