"""The section ``model`` of the configuration."""

from dataclasses import dataclass
from typing import Literal

from qwen_lit.checks import check_ranges
from qwen_lit.config import LoraSection, QuantizationSection
from qwen_lit.engine.policy import KeptName
from qwen_lit.engine.products import ProductsName
from qwen_lit.errors import UserError
from qwen_lit.hub_libraries import Hub
from qwen_lit.model.optim import OptimizerClass, OptimizerName
from qwen_lit.model.schedules import ScheduleName, schedule

EngineName = Literal["auto", "fast", "reference"]
GraphsName = Literal["auto", "off"]


@dataclass
class ModelSettings:
    """What is trained, from which weights, and how."""

    model_name_or_path: str
    """the base model: a local folder with its files, or a name on the hub."""
    lora_config: LoraSection
    """PEFT's LoraConfig."""
    quantization_config: QuantizationSection | None = None
    """transformers' BitsAndBytesConfig; null, or one with neither load_in_4bit nor load_in_8bit, trains LoRA on a bf16
    base."""
    learning_rate: float = 2e-4
    """peak learning rate."""
    optimizer: OptimizerName | OptimizerClass = "paged_adamw_8bit"
    """one of these names, or any torch optimizer as {class_path: torch.optim.Muon, init_args: {momentum: 0.95}}; its
    learning rate and weight decay are the keys of this section."""
    lr_scheduler: ScheduleName = "cosine"
    """schedule of the learning rate, by transformers' name; all but constant begin with the warmup."""
    lr_scheduler_kwargs: dict[str, float | str | bool] | None = None
    """arguments of the schedule, as transformers takes them, such as {min_lr_rate: 0.1} for cosine_with_min_lr, or
    {num_decay_steps: 100} for warmup_stable_decay."""
    warmup_ratio: float = 0.03
    """share of all optimizer steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """decoupled weight decay, as of AdamW, of trained matrices; vectors such as biases are not decayed."""
    adam_beta1: float = 0.9
    """decay of Adam's first moment, for optimizers given by name."""
    adam_beta2: float = 0.999
    """decay of Adam's second moment, for optimizers given by name."""
    lora_plus_ratio: float = 1.0
    """LoRA+: the learning rate of the LoRA B matrices divided by that of the A matrices; 1 is plain LoRA."""
    neftune_noise_alpha: float = 0.0
    """NEFTune: alpha of the uniform noise that is added to the embeddings in training, 5 to 15 in its paper; 0 is
    off."""
    gradient_checkpointing: bool = True
    """recompute activations in the backward pass: less memory, about a third slower. The fast engine does so only for
    as many layers as the memory asks for."""
    engine: EngineName = "auto"
    """fast runs fused Triton kernels and plans GPU memory; reference runs transformers' and PEFT's own modules; auto
    is fast on CUDA where the model and the adapter allow it, and else reference."""
    products: ProductsName = "bf16"
    """how products with frozen 4-bit weights are computed by the fast engine: bf16; fp8_backward, in 8 bits for the
    gradient alone; mixed8, fp8 for the gradient and int8 forward, but for the products that a probe of the run's rows
    finds worst at the start, whose forward stays in bf16; int8 in both passes, for cards without fp8 too; fp8 in
    both. 8 bits are faster and less exact; docs/products.md has both in figures."""
    products_check_every: int = 200
    """optimizer steps between two checks of products in 8 bits, each by the gradient of one micro-batch, which is also
    computed in bf16; the first step is checked too, and 0 checks none."""
    products_floor: float | None = None
    """cosine of that gradient with the one in bf16 below which the run says so and goes on in bf16; null is a value
    for each choice: fp8_backward 0.98, mixed8 and int8 0.95, fp8 0.8."""
    memory_budget: str | None = None
    """GPU memory that the fast engine may use on each card, such as 8GiB; null is all that is free."""
    kept: KeptName = "bf16"
    """how the fast engine keeps the MLP's gate and up for backward: int8 takes half of bf16's memory, a third of all
    that a layer keeps, so that fewer layers are computed again; their gradient is off by about 0.7 %, the forward pass
    is exact. Recomputed layers keep bf16."""
    graphs: GraphsName = "auto"
    """auto launches micro-batches of few tokens, for which a GPU waits longer than it computes, as CUDA graphs, where
    the plan leaves everything on the card and has memory for them. Each is filled up to one of few sizes. off launches
    every kernel by itself."""
    base_cache: str | None = "auto"
    """folder that keeps the base quantised, so that later runs start from there: 3.4 GB for a 7B; layers that a card
    has no room for are streamed from that file. auto is ~/.cache/qwen_lit/bases for runs on a GPU, null keeps none."""
    max_skipped_steps: int = 10
    """number of optimizer steps in a row with a loss or a gradient that is not finite, after which the run stops; each
    such step is skipped, and the log names its rows."""
    init_adapter: str | None = None
    """an adapter folder or a checkpoint from whose weights the new run starts, with a fresh optimizer and schedule;
    its LoRA settings are taken over."""
    hub: Hub = "huggingface"
    """where a model that is not on this machine is downloaded from: huggingface, or modelscope, which needs the extra
    of that name. A mirror is the environment's HF_ENDPOINT or MODELSCOPE_ENDPOINT."""

    def __post_init__(self) -> None:
        """Check what can be known without the model.

        Raises:
            UserError: a number is out of range, the schedule is none with these arguments, or two keys exclude each
            other.
        """
        check_ranges("model", vars(self))
        check_ranges("model.lora_config", vars(self.lora_config))
        if self.base_cache == "":
            raise UserError("model.base_cache is empty; give a folder, auto, or null for none.")
        if self.kept == "int8" and self.engine == "reference":
            raise UserError(
                "model.kept is int8, which the reference engine cannot do; leave it out, or set engine to auto."
            )
        schedule(self.lr_scheduler, 1, 100, self.learning_rate, self.lr_scheduler_kwargs)

    @property
    def betas(self) -> tuple[float, float]:
        """Decays of Adam's moments."""
        return self.adam_beta1, self.adam_beta2
