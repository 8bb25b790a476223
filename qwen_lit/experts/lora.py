"""LoRA on experts, in PEFT's names and files, beside the frozen products.

PEFT adds the adapter to the whole parameter before each product, which a weight in 4 bits does not allow.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft import LoraConfig
from peft.tuners.lora import layer
from torch import Tensor, nn

from qwen_lit.experts.forward import Factors, experts_forward
from qwen_lit.experts.stacked import held_4bit, stacks


class ParamWrapper(layer.ParamWrapper):
    """PEFT's wrapper of an experts module, for one of its parameters; PEFT asks for this class by its name.

    Wrappers of several parameters stand around each other.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int] | tuple[None, None]:
        form = held_4bit(self.get_base_layer()).get(self.parameter_name)
        if form is None:
            return super()._get_in_out_features(module)
        self.num_experts, self._param_ndim = form.count, 3
        return form.rows, form.columns

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the experts make of ``x`` and the routing, as ``experts_forward`` says."""
        self._check_forward_args(x, *args, **kwargs)
        module: Any = self
        lora: dict[str, Factors] = {}
        while isinstance(module, ParamWrapper):
            if not module.disable_adapters:
                (adapter,) = module.active_adapters
                lora[module.parameter_name] = module.factors(adapter)
            module = module.base_layer
        index, weights = args
        return experts_forward(module, x, index, weights, lora)

    def factors(self, adapter: str) -> Factors:
        """The adapter's share in each expert's matrix, out of PEFT's two matrices for all of them."""
        a, b = cast(Tensor, self.lora_A[adapter].weight), cast(Tensor, self.lora_B[adapter].weight)
        count = cast(int, self.num_experts)
        each_a = a.view(count, -1, a.shape[1])
        each_b = b.view(b.shape[0], -1, count).permute(2, 0, 1)
        return Factors(each_a, each_b, self.scaling[adapter])


@contextmanager
def adapting(model: Any, lora: LoraConfig) -> Iterator[None]:
    """Let PEFT put an adapter on a model with its targets as they are written, and on experts by ``ParamWrapper``.

    PEFT takes the names ``gate_proj``, ``up_proj`` and ``down_proj`` in a mixture of experts for those of experts, as
    the linears of earlier versions were called: it doubles their rank, and adapts no shared expert.

    Args:
        model: the base.
        lora: of the adapter.
    """
    config = model.config
    kind = config.model_type
    lora._register_custom_module({type(module): ParamWrapper for _, module in stacks(model)})
    # PEFT asks the model's type which names are others in this version.
    config.model_type = "as written"
    try:
        yield
    finally:
        config.model_type = kind
        lora._custom_modules = None
