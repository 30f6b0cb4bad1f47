"""GGUF files of a model folder: its weights under llama.cpp's names, its config and its tokenizer as metadata.

Written tensor by tensor with the `gguf` package, which is optional and imported where it is used.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_minitron.checkpoint.checkpoint import Checkpoint, check_finite, require_space
from hf_minitron.export.gguf_tokenizer import tokenizer_metadata
from hf_minitron.export.layouts import KEYS, LAYER_KEYS, LAYOUTS, NONUNIFORM, NONUNIFORM_TYPES, Layout
from hf_minitron.modeling.configuration_pruned import PrunedConfig
from hf_minitron.sizes import not_quantized

BLOCK = 32  # numbers that share a scale in Q8_0, and at least in every other quantized type
OTHERWISE = "llama.cpp's own convert_hf_to_gguf.py may take it"
EXPERT = re.compile(r"\.experts\.(\d+)\.")


def layout_of(config: PreTrainedConfig) -> Layout:
    """Return how llama.cpp holds a model.

    Args:
        config (`PreTrainedConfig`): Its config.

    Raises:
        ValueError: for a model type, or a setting of one, that it computes otherwise than Transformers.
    """
    nonuniform = isinstance(config, PrunedConfig)
    kind = config.stock_model_type if nonuniform else config.model_type
    layout = NONUNIFORM if nonuniform and kind in NONUNIFORM_TYPES else LAYOUTS.get(kind)
    if layout and layout.square and (width := config.num_attention_heads * head_dim_of(config)) != config.hidden_size:
        if kind not in NONUNIFORM_TYPES:
            raise ValueError(f"heads are {width} wide together and hidden is {config.hidden_size}; llama.cpp's "
                             f"{layout.architecture!r} takes them to be equal: cut both alike, or neither")  # fmt: skip
        layout = NONUNIFORM
    if layout is None:
        raise ValueError(
            f"no GGUF file can be written of a model of type {kind!r}; of {', '.join(LAYOUTS)} they can; {OTHERWISE}"
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != layout.activation:
        raise ValueError(
            f"hidden_act is {activation!r}, and llama.cpp's {layout.architecture!r} has {layout.activation!r} only"
        )
    if (heads := getattr(config, "query_pre_attn_scalar", None)) is not None:
        own = head_dim_of(config)
        if config.num_hidden_layers == layout.head_scale_at:
            own = config.hidden_size // config.num_attention_heads
        if heads != own:
            raise ValueError(f"query_pre_attn_scalar is {heads}, and llama.cpp's {layout.architecture!r} takes it to be {own}")
    if layout.rope_every:
        wanted = [int((layer + 1) % layout.rope_every != 0) for layer in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != wanted:
            raise ValueError(f"no_rope_layers is {config.no_rope_layers}; llama.cpp's {layout.architecture!r} has no rotary "
                             f"embedding in every {layout.rope_every}th layer, so drop no layers")  # fmt: skip
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise ValueError("layers with and without experts alternate, which llama.cpp has no place for")
    rope_metadata(config, layout)
    return layout


def head_dim_of(config: PreTrainedConfig) -> int:
    """Return how many channels a head has."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def quantizable(config: PreTrainedConfig) -> str | None:
    """Say why a model cannot be quantized to GGUF types: its hidden size fits no block; `None` when it can be."""
    if config.hidden_size % BLOCK == 0:
        return None
    return f"hidden: {not_quantized(config.hidden_size, BLOCK)}"


def write_gguf(folder: Path, path: Path, name: str, kind: str = "F16") -> None:
    """Write a model folder as one GGUF file.

    Args:
        folder (`Path`): A folder that `save_pretrained` wrote: safetensors, config and tokenizer.
        path (`Path`): The new file; it has its name only once it is complete.
        name (`str`): What the file calls the model.
        kind (`str`, *optional*, defaults to `"F16"`): The type of its matrices, `F16` or `Q8_0`. Rows that are no multiple of
            32 stay in F16, vectors are in F32.

    Raises:
        ValueError: as `layout_of`; for a tokenizer or a tensor that llama.cpp has no place for; for a weight beyond F16.
    """
    import gguf

    config, checkpoint = AutoConfig.from_pretrained(folder), Checkpoint(folder)
    layout = layout_of(config)
    tensors = list(_tensors(checkpoint, config, layout))
    unfinished = path.with_name(path.name + ".tmp")
    writer = gguf.GGUFWriter(unfinished, layout.architecture)
    facts = {"general.type": "model", "general.name": name, "general.file_type": gguf.LlamaFileType[f"MOSTLY_{kind}"].value}
    if kind != "F16":
        facts["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    facts |= {f"{layout.architecture}.{key}": value for key, value in metadata(config, layout).items()}
    for key, value in (facts | tokenizer_metadata(AutoTokenizer.from_pretrained(folder), config.vocab_size)).items():
        _add(writer, key, value)
    types = {tensor.name: gguf.GGMLQuantizationType[tensor.type_in(kind)] for tensor in tensors}
    for tensor in tensors:
        stored = gguf.quant_shape_to_byte_shape(tensor.shape, types[tensor.name])
        writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), int(np.prod(stored)), types[tensor.name])
    require_space(unfinished, sum(info.nbytes for info in writer.tensors[0].values()), f"the export {path.name}")
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(gguf.quants.quantize(tensor.read(), types[tensor.name]).view(np.uint8))
        writer.close()
        unfinished.rename(path)
    finally:
        writer.close()
        unfinished.unlink(missing_ok=True)


def metadata(config: PreTrainedConfig, layout: Layout) -> dict[str, Any]:
    """Return what llama.cpp reads of a config, by its keys without the architecture's name."""
    found = {new: getattr(config, key, None) for key, new in KEYS.items()}
    head_dim = head_dim_of(config)
    found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    found["attention.head_count_kv"] = found["attention.head_count_kv"] or config.num_attention_heads
    if isinstance(config, PrunedConfig):
        found |= {new: [max(size, _least(config, key, layer)) for layer, size in enumerate(getattr(config, key))]
                  for key, new in LAYER_KEYS.items()}  # fmt: skip
    if window := getattr(config, "sliding_window", None):
        types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        if layout.window:
            sliding = [kind == "sliding_attention" for kind in types]
            found |= {"attention.sliding_window": window, "attention.sliding_window_pattern": sliding}
        elif "sliding_attention" in types:  # as long as the window is, both are the same
            found["context_length"] = min(found["context_length"], window)
    return {key: value for key, value in found.items() if value is not None} | rope_metadata(config, layout)


def rope_metadata(config: PreTrainedConfig, layout: Layout) -> dict[str, Any]:
    """Return how llama.cpp makes a model's rotary embedding.

    Raises:
        ValueError: for a kind that it has not.
    """
    rope = config.rope_parameters
    main, local = rope.get("full_attention", rope), rope.get("sliding_attention") or {}
    head_dim = head_dim_of(config)
    share = main.get("partial_rotary_factor") or 1.0
    found = {"rope.dimension_count": int(head_dim * share), "rope.freq_base": float(main["rope_theta"])}
    if local:
        found["rope.freq_base_swa"] = float(local["rope_theta"])
    kind = main.get("rope_type", "default")
    if share != 1.0 and layout.paired:
        raise ValueError(f"partial_rotary_factor is {share}, and llama.cpp's {layout.architecture!r} turns whole heads")
    if local.get("rope_type", "default") != "default" or kind not in ("default", "linear", "yarn", "llama3"):
        raise ValueError(f"rope_type {local.get('rope_type', kind)!r} has no form in GGUF files here; {OTHERWISE}")
    if kind == "llama3" and not layout.factors:
        raise ValueError(f"rope_type 'llama3' needs factors that llama.cpp's {layout.architecture!r} does not read")
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(main["factor"])}
    if kind == "yarn":
        named = {"attention_factor": "attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        found["rope.scaling.original_context_length"] = main["original_max_position_embeddings"]
        found |= {f"rope.scaling.{new}": float(main[key]) for key, new in named.items() if main.get(key) is not None}
    return found


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: its name, its shape, and what reads it in float32."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def type_in(self, kind: str) -> str:
        """Return its type in a file of a kind: vectors and routers stay as they are, short rows too."""
        if len(self.shape) == 1 or "ffn_gate_inp" in self.name:
            return "F32"
        return kind if self.shape[-1] % BLOCK == 0 else "F16"


def _tensors(checkpoint: Checkpoint, config: PreTrainedConfig, layout: Layout) -> Iterator[_Tensor]:
    """Yield the tensors of a file, in the checkpoint's order."""
    names = gguf_names(config)
    experts: dict[str, list[str]] = {}  # where they lie apart, one tensor of the file holds them all
    for name in checkpoint.specs:
        experts.setdefault(EXPERT.sub(".experts.", name), []).append(name)
    for name, parts in experts.items():
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        new = names(name)
        if new is None:
            raise ValueError(f"llama.cpp's {layout.architecture!r} has no place for the parameter {name!r}; {OTHERWISE}")
        shape = checkpoint.specs[parts[0]].shape
        several = (len(parts),) if len(parts) > 1 or EXPERT.search(parts[0]) else ()
        yield _Tensor(new, (*several, *shape), _reader(checkpoint, sorted(parts, key=_number), bool(several), layout, config))
    yield from _added(config, layout)


def gguf_names(config: PreTrainedConfig) -> Callable[[str], str | None]:
    """Return what gives a parameter's name in a GGUF file, `None` for one that llama.cpp has no place for."""
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == layout_of(config).architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))


def _number(name: str) -> int:
    match = EXPERT.search(name)
    return int(match[1]) if match else 0


def _reader(
    checkpoint: Checkpoint, parts: list[str], stack: bool, layout: Layout, config: PreTrainedConfig
) -> Callable[[], np.ndarray]:
    """Return what reads a tensor as llama.cpp holds it."""

    def one(name: str) -> Tensor:
        tensor = check_finite(name, checkpoint.read(name)).float()
        if tensor.dim() > 1 and tensor.numel() and tensor.abs().max() > torch.finfo(torch.float16).max:
            raise ValueError(f"{name!r} holds {tensor.abs().max():.3g}, which is beyond F16")
        if name.endswith("norm.weight"):
            tensor = tensor + layout.norm_offset
        if layout.paired and re.search(r"self_attn\.[qk]_proj\.", name):
            tensor = tensor.unflatten(0, (-1, 2, head_dim_of(config) // 2)).transpose(1, 2).flatten(0, 2)
        return tensor

    return lambda: (torch.stack([one(name) for name in parts]) if stack else one(parts[0])).contiguous().numpy()


def _added(config: PreTrainedConfig, layout: Layout) -> Iterator[_Tensor]:
    """Yield what the file holds beside the checkpoint's parameters: factors of rotary frequencies, and MLPs that do nothing."""
    rope = config.rope_parameters
    if rope.get("rope_type") == "llama3":
        plain, _ = ROPE_INIT_FUNCTIONS["linear"](_with_rope(config, {**rope, "rope_type": "linear", "factor": 1.0}), None)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
        yield _Tensor("rope_freqs.weight", tuple(plain.shape), lambda: (plain / scaled).float().numpy())
    for layer in range(config.num_hidden_layers) if isinstance(config, PrunedConfig) else ():
        if width := _least(config, "layer_intermediate_size", layer):
            shapes = {
                "gate": (width, config.hidden_size),
                "up": (width, config.hidden_size),
                "down": (config.hidden_size, width),
            }
            yield _filled(f"blk.{layer}.ffn_norm.weight", (config.hidden_size,), 1)
            for part, shape in shapes.items():
                yield _filled(f"blk.{layer}.ffn_{part}.weight", shape, 0)


def _least(config: PrunedConfig, key: str, layer: int) -> int:
    """Return the least size that llama.cpp takes: of a layer with attention and no MLP it would leave out both."""
    lacks = not config.layer_intermediate_size[layer] and config.layer_num_attention_heads[layer]
    return BLOCK if key == "layer_intermediate_size" and lacks else 0


def _filled(name: str, shape: tuple[int, ...], value: float) -> _Tensor:
    return _Tensor(name, shape, lambda: np.full(shape, value, np.float32))


def _with_rope(config: PreTrainedConfig, rope: Mapping[str, Any]) -> PreTrainedConfig:
    changed = type(config).from_dict(config.to_dict())
    changed.rope_parameters = dict(rope)
    return changed


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a value of the metadata by its type."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)
