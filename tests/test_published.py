"""Published target shapes give their papers' parameter counts, from config alone."""

import pytest
from transformers import AutoConfig

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.student import check_target

LLAMA_3_1_8B = ("llama", {  # meta-llama/Llama-3.1-8B
    "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
})  # fmt: skip
MISTRAL_NEMO_12B = ("mistral", {  # mistralai/Mistral-Nemo-Base-2407
    "num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072, "tie_word_embeddings": False,
})  # fmt: skip
NEMOTRON_4_15B = ("nemotron", {  # 2407.14679, table 10
    "num_hidden_layers": 32, "hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 48,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 256000, "tie_word_embeddings": False,
})  # fmt: skip
QWEN3_8B = ("qwen3", {  # Qwen/Qwen3-8B
    "num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
})  # fmt: skip

# teacher, target, billions in all and without embeddings, as printed (to the digits printed), and where
PUBLISHED = [
    (LLAMA_3_1_8B, {}, "8.0", None, "2408.11796, section 2.1 (the teacher)"),
    (LLAMA_3_1_8B, {"hidden": 3072, "ffn": 9216}, "4.5", "3.7", "2408.11796, table 3: Llama-3.1-Minitron-4B-Width"),
    (LLAMA_3_1_8B, {"layers": 16}, "4.5", "3.5", "2408.11796, table 3: Llama-3.1-Minitron-4B-Depth"),
    (MISTRAL_NEMO_12B, {"hidden": 4096, "ffn": 11520}, "8.4", "7.3", "2408.11796, table 3: MN-Minitron-8B"),
    (NEMOTRON_4_15B, {}, "15.6", "12.5", "2407.14679, table 10 (the teacher)"),
    (NEMOTRON_4_15B, {"hidden": 4096, "ffn": 16384}, "8.27", "6.2", "2407.14679, table 10: Minitron 8B"),
    (NEMOTRON_4_15B, {"hidden": 3072, "ffn": 9216, "heads": 24}, "4.19", "2.6", "2407.14679, table 10: Minitron 4B"),
    (QWEN3_8B, {"layers": 24}, "6", None, "ModelOpt, examples/pruning/README.md: Qwen3-8B to 6B by depth"),
    (QWEN3_8B, {"hidden": 3584, "ffn": 9216}, "6", None, "ModelOpt, examples/pruning/README.md: Qwen3-8B to 6B by width"),
]


NAMES = ("teacher", "target", "total", "without_embeddings", "source")


@pytest.mark.parametrize(NAMES, PUBLISHED, ids=[row[-1] for row in PUBLISHED])
def test_parameter_counts(teacher, target, total, without_embeddings, source):
    config = AutoConfig.for_model(teacher[0], **teacher[1])
    architecture = Architecture.of(config)
    after = architecture.shape.cut_to(target)
    check_target(architecture, after)
    rows = architecture.rows
    assert printed(after.num_parameters(rows), total) == total
    if without_embeddings:
        rest = {row: pattern for row, pattern in rows.items() if "vocab" not in pattern}
        assert printed(after.num_parameters(rest), without_embeddings) == without_embeddings


def printed(parameters, like):
    """Billions, to as many digits as the paper prints."""
    return f"{parameters / 1e9:.{len(like.partition('.')[2])}f}"
