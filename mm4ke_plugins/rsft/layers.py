"""Which parameters are "the FFN of layer n", found by the model's structure instead of a table of architectures."""

import torch

from ..errors import MM4KEError

# What the transformers library calls the feed-forward network inside a decoder layer.
FFN_NAMES = ("mlp", "feed_forward", "ffn")

# Children that make an FFN a mixture of experts: a fact would reach only the experts its tokens are routed to.
EXPERT_NAMES = ("experts", "router", "shared_expert", "shared_experts")


def decoder_layers(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """The name and the list of the decoder's layers in a transformers model.

    Raises MM4KEError when no module list, or more than one, has as many entries as the config says.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise MM4KEError(
            f"{type(model).__name__}: expected one list of {count} decoder layers, found: {names}; "
            "R-SFT supports decoder-only language models"
        )
    return found[0]


def ffn_parameter_names(
    model: torch.nn.Module, layers: list[int], modules: list[str], gradient_at: str = "all"
) -> list[str]:
    """The names of the parameters to train, in the model's order.

    layers:  indices from 0, as in the checkpoint's tensor names ("model.layers.5.mlp...")
    modules: ["ffn"] for the whole FFN, or names of its children such as "down_proj"
    gradient_at: at "all" tokens, or "from_subject" on (see `subject.py`)

    Raises MM4KEError for a layer out of range, an unknown module name, a layer without a known FFN, a mixture of
    experts, and for the last layer where only the question's tokens learn.
    """
    prefix, stack = decoder_layers(model)
    names = []
    if gradient_at == "from_subject" and len(stack) - 1 in layers:
        raise MM4KEError(
            f"rsft_layers: {len(stack) - 1} is the last layer, after which no token sees another one: nothing would be "
            "learned at the question's tokens; choose a lower layer, or rsft_gradient_at: all"
        )
    for index in layers:
        if not 0 <= index < len(stack):
            raise MM4KEError(
                f"rsft_layers: {index} is out of range; {type(model).__name__} has layers 0 to {len(stack) - 1}"
            )
        name, ffn = _ffn_of(stack[index], f"{prefix}.{index}")
        children = dict(ffn.named_children())
        if experts := [child for child in EXPERT_NAMES if child in children]:
            raise MM4KEError(
                f"rsft_layers: {index}: {name} is a mixture of experts ({', '.join(experts)}); "
                "choose a dense layer, R-SFT trains the one FFN that every token passes"
            )
        for module in modules:
            if module == "ffn":
                names += [f"{name}.{parameter}" for parameter, _ in ffn.named_parameters()]
            elif module in children:
                names += [f"{name}.{module}.{parameter}" for parameter, _ in children[module].named_parameters()]
            else:
                known = ", ".join(child for child, part in children.items() if any(True for _ in part.parameters()))
                raise MM4KEError(f"rsft_modules: {module} is not in {name}; choose ffn (all of it) or from: {known}")
    return names


def ffns_of(model: torch.nn.Module, layers: list[int]) -> list[torch.nn.Module]:
    """The FFNs of these layers, whose indices count from 0; raises what `ffn_parameter_names` raises."""
    prefix, stack = decoder_layers(model)
    return [_ffn_of(stack[index], f"{prefix}.{index}")[1] for index in layers]


def _ffn_of(layer: torch.nn.Module, layer_name: str) -> tuple[str, torch.nn.Module]:
    children = dict(layer.named_children())
    for name in FFN_NAMES:
        if name in children:
            return f"{layer_name}.{name}", children[name]
    raise MM4KEError(
        f"rsft_layers: {layer_name} has no FFN called {', '.join(FFN_NAMES)}; its parts are: {', '.join(children)}"
    )
