"""Whether a model masks attention between the documents of a packed sequence when `position_ids` start again at each."""

import torch
from transformers import PreTrainedModel

from hf_minitron.probe import base_model


@torch.no_grad()
def check_documents_apart(model: PreTrainedModel) -> None:
    """Refuse a model whose attention crosses documents in spite of `position_ids` that start again (OPT's and gpt-oss's does).

    Three tokens say it: the last, a document of its own, must come out as it does alone.

    Args:
        model (`PreTrainedModel`): A causal language model, on one device.

    Raises:
        ValueError: when it comes out differently.
    """
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    positions = torch.tensor([[0, 1, 0]], device=model.device)
    training = model.training
    model.eval()  # without dropout
    packed = base_model(model)(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0, -1]
    alone = base_model(model)(input_ids=ids[:, -1:], use_cache=False).last_hidden_state[0, -1]
    model.train(training)
    if (packed - alone).norm() > 0.01 * alone.norm():
        raise ValueError(f"{model.config.model_type} takes no notice of where a document starts: set cross_documents to true")
