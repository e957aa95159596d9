"""What each kind of adapter adds to a layer whose base product is made for all members at once.

Plain LoRA (lora, rslora, lora_plus, pissa and olora with their frozen start) is `product.LoraRows`. The others are
asked for their own arithmetic, on their own rows: DoRA and the mixtures of experts beside the base's output, IA3 on its
input or output, LoRA on an embedding.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from lora_lab.adapters.cohort.product import LoraRows
from lora_lab.adapters.cohort.spans import Span
from lora_lab.adapters.dropout import SeededDropout
from lora_lab.adapters.expert_layer import LoraExpertsLayer


def is_plain_lora(layer: BaseTunerLayer | None) -> bool:
    """Whether all that is active in the layer is LoRA beside a linear layer, without a variant of it."""
    return (
        isinstance(layer, LoraLayer)
        and not any(name in layer.lora_variant for name in layer.active_adapters)
        and all(name in layer.lora_A for name in layer.active_adapters)
    )


def lora_rows(layer: Any, span: Span) -> list[LoraRows]:
    """The layer's active LoRAs on the tokens of `span`."""
    found = []
    for name in layer.active_adapters:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        dropout = layer.lora_dropout[name]
        dropped, keep_scale = None, 1.0
        if isinstance(dropout, SeededDropout) and dropout.p > 0:
            dropped = span.flat(dropout.dropped(span.shape(a.shape[1]), a.device))
            keep_scale = dropout.keep_scale
        found.append(LoraRows(span.start, span.stop, a, b, layer.scaling[name], dropped, keep_scale))
    return found


def scales_input(layer: Any) -> bool:
    """Whether it is IA3 in front of the MLP's last layer."""
    return isinstance(layer, IA3Layer) and bool(layer.is_feedforward)


def scaled_input(layer: Any, x: Tensor) -> Tensor:
    """A member's input of the base layer, [its tokens, in]."""
    return _scaled(layer, x) if scales_input(layer) else x


def changed_output(layer: Any, span: Span, x: Tensor, y: Tensor) -> Tensor:
    """A member's output of a layer, [its tokens, out], as its adapter makes it of the base's; None is no adapter.

    x [its tokens, in], y [its tokens, out]: input and output of the base layer, plain LoRA in it already.

    Raises:
        TypeError: a kind that is not meant to be trained together.
    """
    if layer is None or is_plain_lora(layer) or scales_input(layer):
        return y
    if isinstance(layer, IA3Layer):
        return _scaled(layer, y)
    own, result = span.by_rows(x), span.by_rows(y)
    for name in layer.active_adapters:
        if isinstance(layer, LoraExpertsLayer):
            result = result + layer.mixture(own, name)
        elif isinstance(layer, LoraLayer):
            variant = layer.lora_variant[name]
            cast = layer._cast_input_dtype(own, layer.lora_A[name].weight.dtype)
            result = variant.forward(layer, active_adapter=name, x=cast, result=result)
        else:
            raise TypeError(f"{type(layer).__name__} is not trained together with others")
    return span.flat(result).to(y.dtype)


def embedded(layer: Any, ids: Tensor, y: Tensor) -> Tensor:
    """LoRA on an embedding: ids [its tokens], y [its tokens, width]; in the precision of y."""
    result, scale = y, layer._get_embed_scale()
    for name in layer.active_adapters:
        if name in layer.lora_variant:
            result = layer.lora_variant[name].forward(layer, active_adapter=name, x=ids, result=result)
            continue
        update = layer._embed(ids, layer.lora_embedding_A[name].T) @ layer.lora_embedding_B[name].T
        update = update * layer.scaling[name]
        result = result + (update if scale is None else update * scale.to(update.dtype))
    return result.to(y.dtype)


def _scaled(layer: Any, values: Tensor) -> Tensor:
    result = values
    for name in layer.active_adapters:
        vector = layer.ia3_l[name].flatten()
        result = result.to(vector.dtype) * vector
    return result.to(values.dtype)
