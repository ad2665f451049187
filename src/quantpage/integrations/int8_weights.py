"""Weight-only int8 linears for decoding on a CPU, an option of `quantpage generate`.

A decode step reads every weight once, so that half the bytes are half the time. torch's own product
``_weight_int8pack_mm`` reads int8 rows with one scale a row and bf16 activations; float32
activations would take its scalar path, eight times slower, so they are rounded to bf16.

Prompts are multiplied by weights dequantized a layer at a time: many tokens are bound by
arithmetic, where the int8 product is the slower one.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

PROMPT_TOKENS = 32
"""From this many rows on, weights are dequantized and multiplied as bf16."""


class Int8Linear(nn.Module):
    """``nn.Linear`` with weights rounded to int8, symmetric, a scale an output channel."""

    weight: Int[Tensor, "out in"]
    scale: Float[Tensor, " out"]

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        given = linear.weight.detach().float()
        scale = (given.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        scale = scale.to(torch.bfloat16)
        codes = (given / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", linear.bias)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """``x @ weight.T + bias`` in the input's dtype, computed from bf16."""
        rows, scale = x.reshape(-1, self.in_features), self.scale
        # Asked, not converted in any case: a decode step comes here some two hundred times.
        if rows.dtype != torch.bfloat16:
            rows = rows.to(torch.bfloat16)
        if scale.dtype != torch.bfloat16:
            scale = scale.to(torch.bfloat16)
        if rows.shape[0] < PROMPT_TOKENS:
            out = torch.ops.aten._weight_int8pack_mm.default(rows.contiguous(), self.weight, scale)
        else:
            out = nn.functional.linear(rows, self.weight.to(torch.bfloat16)) * scale
        out = out.view(*x.shape[:-1], self.out_features)
        if out.dtype != x.dtype:
            out = out.to(x.dtype)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        """As nn.Linear's."""
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"


def quantize_weights(model: nn.Module) -> nn.Module:
    """Replace every ``nn.Linear`` of ``model`` by an ``Int8Linear``, in place; return the model.

    Embeddings stay as they are; an output head that shares their weights becomes a copy of its
    own. Raises ValueError off the CPU, where torch has no such product.
    """
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices - {"cpu"}:
        raise ValueError(f"model: expected its weights on the CPU, got {', '.join(devices)}")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child))
    return model
