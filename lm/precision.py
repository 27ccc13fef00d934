"""What accelerate and trl would round to bf16, and must not."""

from dataclasses import replace

from accelerate.utils import is_peft_model

from lm.models import is_quantized


class FullPrecision:
    """Before a trl trainer among a trainer's parents.

    Under FSDP2 in bf16 accelerate has the model's outputs cast to bf16: log-probs that are
    computed inside the model would lose whole nats before the loss compares them. And trl casts
    adapters on quantized weights to bf16, in which small updates vanish.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if is_peft_model(self.model) and is_quantized(self.model):
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy:
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy,
                                                    output_dtype=None)
