"""How much of a model has an adapter: its layers and its linears, of the shapes or of the model that is trained."""

from dataclasses import dataclass

from peft import LoraConfig, PeftModel

from qwen_lit.families.layer import Linear
from qwen_lit.families.table import family_of
from qwen_lit.quantization import base_name


@dataclass(frozen=True)
class Coverage:
    """What an adapter reaches. Experts count where they are adapted, each of their two parameters as a linear."""

    layers: int
    of_layers: int
    linears: int
    of_linears: int
    untouched: tuple[str, ...] = ()
    """Mixers that no adapted layer has."""
    without: int = 0
    """Layers with these mixers."""

    def __str__(self) -> str:
        return f"{self.layers} of {self.of_layers} layers, {self.linears} of {self.of_linears} linears adapted"


def coverage(model: PeftModel) -> Coverage:
    """What the adapter of a model reaches.

    Args:
        model: with its adapter; its weights may stand on the meta device.
    """
    config = model.base_model.model.config  # type: ignore[union-attr]
    family = family_of(config)
    adapted = {base_name(name).partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}

    def reached(block: str, linear: Linear) -> bool:
        place = f"{block}.{linear.path}"
        return place in adapted or (linear.count > 1 and place.rpartition(".")[0] in adapted)

    layers = linears = of_linears = 0
    mixers: dict[str, list[bool]] = {}
    described = family.layers(config)
    for number, layer in enumerate(described):
        found = [(one, reached(family.block(number), one)) for one in layer.linears]
        count = sum(hit for _, hit in found)
        layers, linears = layers + (count > 0), linears + count
        of_linears += sum(one.linear or hit for one, hit in found)
        mixers.setdefault(layer.mixer, []).append(count > 0)
    untouched = {mixer: len(hits) for mixer, hits in mixers.items() if not any(hits)}
    return Coverage(layers, len(described), linears, of_linears, tuple(untouched), sum(untouched.values()))


def left_out(model: PeftModel, lora: LoraConfig) -> str | None:
    """A warning where the targets pass over a whole kind of layer; None where they do not, or where layers are chosen.

    Args:
        model: as for ``coverage``.
        lora: of its adapter.
    """
    found = coverage(model)
    if not found.untouched or not found.layers or lora.layers_to_transform is not None:
        return None
    family = family_of(model.base_model.model.config)  # type: ignore[union-attr]
    return (
        f"lora_config.target_modules adapts nothing in {found.without} of {found.of_layers} layers, those with "
        f"{' and '.join(found.untouched)}; usual in a {family.model_type} is [{', '.join(family.targets)}]"
    )
