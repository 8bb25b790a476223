"""The shape of each tensor that a model's files hold, by the table."""

from collections.abc import Container

from qwen_lit.families.layer import Config, Family, text_config, value_of


def stored_shapes(family: Family, config: Config, there: Container[str] = ()) -> dict[str, tuple[int, ...]]:
    """Of each name in the files; vectors, and what a product of matrices does not take, as one dimension.

    Args:
        family: of the files.
        config: of their config.json.
        there: names in the files, as of ``Family.weights``.
    """
    names, text = family.weights(config, there), text_config(config)
    vocabulary, hidden = value_of(text, "vocab_size"), value_of(text, "hidden_size")
    shapes: dict[str, tuple[int, ...]] = {
        family.embedding_on_disk: (vocabulary, hidden),
        family.head_on_disk: (vocabulary, hidden),
        family.on_disk(f"{family.norm}.weight"): (hidden,),
    }
    for number, layer in enumerate(family.layers(config)):
        block = family.block(number) + "."
        for linear in layer.linears:
            held = names[block + linear.weight]
            whole = (linear.count, linear.outputs, linear.inputs)[linear.count == 1 :]
            part = (linear.count * linear.outputs // len(held), linear.inputs)
            shapes |= dict.fromkeys(held, whole if len(held) == 1 else part)
            if linear.bias:
                shapes[family.on_disk(f"{block}{linear.path}.bias")] = (linear.outputs,)
        shapes |= {family.on_disk(block + vector.name): (vector.size,) for vector in layer.vectors}
    return shapes
