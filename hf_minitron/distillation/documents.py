"""Whether a model masks attention between the documents of a packed sequence when `position_ids` start again at each."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.probe import base_model

# Layers whose state, or convolution, Transformers does not reset where positions start again.
RECURRENT = ("mamba_layers", "linear_layers", "conv_layers")


def check_layer_kinds(config: PreTrainedConfig) -> None:
    """Refuse as `check_documents_apart` does, by the kinds of a model's layers."""
    if any(kind in Architecture.of(config).shape.layer_kinds for kind in RECURRENT):
        raise _crossing(config)


@torch.no_grad()
def check_documents_apart(model: PreTrainedModel) -> None:
    """Refuse a model that reads across documents in spite of `position_ids` that start again.

    Three tokens say it: the last, a document of its own, must come out the same whatever the two before it are. OPT's and
    gpt-oss's attention sees them, and so do recurrent layers.

    Args:
        model (`PreTrainedModel`): A causal language model, on one device.

    Raises:
        ValueError: when it comes out differently.
    """
    positions = torch.tensor([[0, 1, 0]], device=model.device)
    training = model.training
    model.eval()  # without dropout
    states = []
    for before in ((1, 2), (4, 5)):
        ids = torch.tensor([[*before, 3]], device=model.device)
        states.append(base_model(model)(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0, -1])
    model.train(training)
    rounding = 1e-5 if torch.finfo(states[0].dtype).bits > 16 else 1e-2  # of experts, which compute tokens together
    if (states[0] - states[1]).norm() > rounding * states[0].norm():
        raise _crossing(model.config)


def _crossing(config: PreTrainedConfig) -> ValueError:
    return ValueError(f"{config.model_type} takes no notice of where a document starts: set cross_documents to true")
