"""Vision-language models: where the text model stands in them, and what outside of it gives or reads its hidden channels.

A table only. The text model is bound by its own family; whatever else the model has is passed through as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

LANGUAGE_MODEL, TEXT_MODEL = "model.language_model", "model.text_model"
WIDTH_INSIDE = "with images: the projector's inner width is that of hidden in its class, so that it loses channels as well"
FIRST_LAYERS = "with images: their features are added after the first layers, which are others once one of them is cut"


@dataclass(frozen=True, eq=False)
class Tower:
    """Where the text model stands in a vision-language model.

    Args:
        prefix (`str`): The module of the text model, whose layers are in `<prefix>.layers`.
        rows (`Mapping[str, str]`): The parameters outside of it that have hidden channels, or those of the inner width of a
            projector (`projector`), which follows hidden; `_` is a dimension that stays as it is.
        follows (`Mapping[str, str]`): Keys of `config.json` outside of its `text_config`, to the axis whose size they repeat.
        inexact (`Mapping[str, str]`): Axis to the reason why cutting it changes what the model makes of images more than
            masking it would.
        fixed (`Mapping[str, str]`): Axis to the reason why it cannot be cut.
        text (`Mapping[str, object]`): Changes to the text model's config that give a causal language model which computes the
            same of text, where its own type has none.
    """

    prefix: str
    rows: Mapping[str, str]
    follows: Mapping[str, str] = field(default_factory=dict)
    inexact: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)
    text: Mapping[str, object] = field(default_factory=dict)


TWO_LAYERS = Tower(
    LANGUAGE_MODEL,
    {
        "model.multi_modal_projector.linear_1.weight": "projector _",
        "model.multi_modal_projector.linear_1.bias": "projector",
        "model.multi_modal_projector.linear_2.weight": "hidden projector",
        "model.multi_modal_projector.linear_2.bias": "hidden",
    },
    inexact={"hidden": WIDTH_INSIDE},
)
ONE_MATRIX = Tower(TEXT_MODEL, {"model.connector.modality_projection.proj.weight": "hidden _"})
MERGER = {"model.visual.merger.mlp.2.weight": "hidden _", "model.visual.merger.mlp.2.bias": "hidden"}
QWEN2 = {"model_type": "qwen2"}

GLM = Tower(
    LANGUAGE_MODEL,
    {},
    fixed={
        "hidden": "the merger of its vision model is as wide inside as hidden, and its norm sees the whole width",
        "heads": "its class takes the size of a head to be hidden / heads, and hidden stays",
    },
    text={"model_type": "glm4", "attention_bias": True},
)
NEWLINE = replace(TWO_LAYERS, rows=TWO_LAYERS.rows | {"model.image_newline": "hidden"})
FC2 = {"model.visual.merger.linear_fc2.weight": "hidden _", "model.visual.merger.linear_fc2.bias": "hidden"}
DEEPSTACK = Tower(
    LANGUAGE_MODEL,
    {
        **FC2,
        "model.visual.deepstack_merger_list.{mergers}.linear_fc2.weight": "hidden _",
        "model.visual.deepstack_merger_list.{mergers}.linear_fc2.bias": "hidden",
    },
    follows={"vision_config.out_hidden_size": "hidden"},
    inexact={"layers": FIRST_LAYERS},
    text={"model_type": "qwen3"},
)
FC2_ALONE = Tower(LANGUAGE_MODEL, FC2, follows={"vision_config.out_hidden_size": "hidden"})
TOWERS: dict[str, Tower] = {
    "gemma3": Tower(LANGUAGE_MODEL, {"model.multi_modal_projector.mm_input_projection_weight": "_ hidden"}),
    "gemma4": Tower(
        LANGUAGE_MODEL,
        {f"model.embed_{part}.embedding_projection.weight": "hidden _" for part in ("vision", "audio")},
    ),
    "glm4v": GLM,
    "glm46v": GLM,
    "idefics3": ONE_MATRIX,
    "internvl": TWO_LAYERS,
    "llava": TWO_LAYERS,
    "llava_next": NEWLINE,
    "llava_onevision": NEWLINE,
    "mistral3": TWO_LAYERS,
    "qwen2_vl": Tower(LANGUAGE_MODEL, MERGER, follows={"vision_config.hidden_size": "hidden"}, text=QWEN2),
    "qwen2_5_vl": Tower(LANGUAGE_MODEL, MERGER, follows={"vision_config.out_hidden_size": "hidden"}, text=QWEN2),
    "qwen3_5": FC2_ALONE,
    "qwen3_5_moe": FC2_ALONE,
    "qwen3_vl": DEEPSTACK,
    "qwen3_vl_moe": replace(DEEPSTACK, text={"model_type": "qwen3_moe"}),
    "smolvlm": ONE_MATRIX,
    "vipllava": TWO_LAYERS,
}
