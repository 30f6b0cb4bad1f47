"""A live teacher: frozen, in eval mode and in its own dtype, never part of the student or of its checkpoints."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig
from transformers.utils.quantization_config import QuantizationMethod

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.config import PRUNED_VOCAB, NewIds, pruned_vocab, text_config
from hf_minitron.architecture.vision import TOWERS
from hf_minitron.axes import dim_names
from hf_minitron.checkpoint.checkpoint import best_dtype, load_model
from hf_minitron.checkpoint.model_files import is_hub_id, pinned, resolve, split_kwargs
from hf_minitron.checkpoint.model_kinds import adapter_base
from hf_minitron.data.vocabulary import difference, teacher_ids
from hf_minitron.distillation.batch import at_positions, model_inputs, positions_of
from hf_minitron.distillation.signals import DenseSignal
from hf_minitron.head import head_of
from hf_minitron.probe import last_hidden_states


class LiveTeacher:
    """A model that is run on every batch.

    Args:
        model (`PreTrainedModel`, `PeftModel`, `str` or `Path`): The teacher, or where to load it from (in bf16 where the
            device has it); a folder with a PEFT adapter means its base model with the adapter.
        device (`torch.device`): Where it runs.
        init_kwargs (`dict`, *optional*): Arguments of `from_pretrained` for a path or Hub id, such as `revision` or `dtype`.
        top_k (`int`, *optional*): Compare only its most likely tokens, and all others as one.
        sharding (`Callable`, *optional*): How processes share a model that is loaded, by its config.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str | Path,
        device: torch.device,
        init_kwargs: dict | None = None,
        top_k: int | None = None,
        sharding: Callable[[PreTrainedConfig], DistributedConfig | None] = lambda config: None,
    ):
        self._named = (model, init_kwargs) if isinstance(model, str | Path) else None
        if isinstance(model, str | Path):
            model = _load(model, device, init_kwargs, sharding)
        self.model = base_of(model)
        quantized = getattr(self.model, "quantization_method", None) == QuantizationMethod.BITS_AND_BYTES
        placed = hasattr(self.model, "hf_device_map") or isinstance(self.model, FSDPModule)
        if not quantized and not placed:  # these stay where they are
            self.model.to(device)
        self.model.eval().requires_grad_(False)
        self.config = self.model.config
        self._top_k = top_k

    def share_vocabulary(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Leave the teacher only the tokens of its student, under the student's ids, where that has some of them.

        What the teacher says of these is renormalised, and a text is read in the student's tokens.

        Args:
            config (`PreTrainedConfig`): The student's.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): The student's.

        Raises:
            ValueError: for a student whose tokens are no part of the teacher's, or a teacher whose tokenizer is not known.
        """
        mark, size = pruned_vocab(config), text_config(self.config).vocab_size
        if mark == pruned_vocab(self.config):
            return
        if self._named is None or tokenizer is None:
            raise ValueError(f"The student has some tokens of the model that it was cut out of, the teacher all {size:,}: "
                             "give teacher_model by its name and the student's tokenizer as processing_class, or a teacher "
                             "that is cut alike (prune_model with a plan of vocab alone)")  # fmt: skip
        theirs = AutoTokenizer.from_pretrained(teacher_folder(*self._named))
        keep_tokens(self.model, teacher_ids(theirs, tokenizer, size, text_config(config).vocab_size))
        setattr(text_config(self.model.config), PRUNED_VOCAB, mark)

    def shard(self, accelerator: Accelerator) -> None:
        """Shard the teacher as accelerate shards the student, where it does (FSDP2, ZeRO-3)."""
        if accelerator.is_fsdp2:
            plugin = accelerator.state.fsdp_plugin
            # its own dtype, whatever the student's; and accelerate writes down its class of layers, which may be another
            teachers = copy.copy(plugin)
            teachers.mixed_precision_policy = None
            accelerator.state.fsdp_plugin = teachers
            self.model = fsdp2_prepare_model(accelerator, self.model)
            accelerator.state.fsdp_plugin = plugin
        elif (plugin := accelerator.state.deepspeed_plugin) is not None and plugin.zero_stage == 3:
            import deepspeed  # an optional dependency

            settings = {key: v for key, v in plugin.deepspeed_config.items() if key not in ("optimizer", "scheduler")}
            self.model = deepspeed.initialize(model=self.model, config=settings)[0].module

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> DenseSignal:
        """Return the teacher's signal where a batch has targets; its head must be `unsharded_head` to be used.

        Args:
            inputs (`Mapping[str, Tensor]`): The batch.
        """
        with torch.autocast(self.model.device.type, enabled=False):
            positions = positions_of(inputs)
            with last_hidden_states(self.model) as hidden:
                self.model(**model_inputs(inputs), use_cache=False, logits_to_keep=no_tokens(positions))
            return DenseSignal(at_positions(hidden.pop(), positions), head_of(self.model), self._top_k)


@torch.no_grad()
def keep_tokens(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Leave a model only the rows of some tokens in its embeddings and its head, in a new order.

    Args:
        model (`PreTrainedModel`): It is changed.
        ids (`Sequence[int]`): The tokens' ids, by their new ones.

    Raises:
        ValueError: for a model whose embedding or head is not on a device.
    """
    parameters = Architecture.of(model.config).parameters.values()
    tables = [model.get_parameter(p.name) for p in parameters if p.dims and "vocab" in dim_names(p.dims[0])]
    if any(table.is_meta or not table.is_floating_point() for table in tables):
        raise ValueError("The teacher's embedding or head is offloaded or quantized, so that it cannot leave out the tokens "
                         "that the student lacks: leave device_map out, or these two out of the quantization")  # fmt: skip
    new = NewIds(ids, text_config(model.config).vocab_size)
    for table in tables:
        table[: len(ids)] = table[list(ids)]
    model.resize_token_embeddings(len(ids), mean_resizing=False)
    for config in (model.config, text_config(model.config)):
        for key, value in new.changes(config.to_dict()).items():
            setattr(config, key, getattr(config, key) if value is None else value)


def no_tokens(like: Tensor) -> Tensor:
    """Return a value of `logits_to_keep` that keeps the logits of no token."""
    return torch.empty(0, dtype=torch.long, device=like.device)


def base_of(model: nn.Module) -> PreTrainedModel:
    """Return the Transformers model inside of a PEFT model, its adapters in place; any other model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def freeze_vision(model: PreTrainedModel) -> None:
    """Let only the text model and the head of a vision-language model be trained: no text passes the rest."""
    tower, head = TOWERS.get(model.config.model_type), model.get_output_embeddings()
    for name, parameter in model.named_parameters() if tower else ():
        if not name.startswith(f"{tower.prefix}.") and parameter is not head.weight:
            parameter.requires_grad_(False)


@contextmanager
def unsharded_head(model: PreTrainedModel | None) -> Iterator[bool]:
    """Let the weights of a model's head be whole until the context ends; yield whether the model is sharded at all."""
    if isinstance(model, FSDPModule):
        model.unshard()
        yield True
        model.reshard()
    elif model is not None and hasattr(weight := model.get_output_embeddings().weight, "ds_id"):
        import deepspeed  # an optional dependency

        with deepspeed.zero.GatheredParameters([weight]):
            yield True
    else:
        yield False


def _load(model: str | Path, device: torch.device, init_kwargs: dict | None, sharding: Callable) -> PreTrainedModel:
    which, how = split_kwargs(init_kwargs)
    base, dtype = adapter_base(model), how.pop("dtype", best_dtype(device))
    if base is None and not how.keys() & {"device_map", "quantization_config", "tp_plan"}:
        how["distributed_config"] = sharding(AutoConfig.from_pretrained(teacher_folder(model, init_kwargs)))
    loaded = load_model(model if base is None else base, dtype, device, **which, **how)
    if is_hub_id(model):  # what a card names, rather than a folder of the cache
        loaded.config.name_or_path = pinned(model)[0]
    return loaded if base is None else PeftModel.from_pretrained(loaded, Path(model).expanduser()).merge_and_unload()


def teacher_folder(model: str | Path, init_kwargs: dict | None = None) -> Path:
    """Return the folder of a teacher given by name, with its config and tokenizer; an adapter's are its base model's."""
    which, how = split_kwargs(init_kwargs)
    return resolve(adapter_base(model) or model, variant=how.get("variant"), **which)


def check_tokenizers(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, vocab_size: int | None = None) -> None:
    """Refuse two tokenizers that make different ids of a text: logits could not be compared.

    Args:
        teacher (`PreTrainedTokenizerBase`): The teacher's.
        student (`PreTrainedTokenizerBase`): The student's.
        vocab_size (`int`, *optional*): The smaller of their models' vocabularies; tokens beyond it do not count.

    Raises:
        ValueError: naming the first token whose ids differ, or what else does.
    """
    if reason := difference(teacher, student, vocab_size, ("teacher", "student")):
        raise ValueError(f"Teacher and student have different tokenizers: {reason}. Distill from a teacher of the same family")
