"""Width metrics against their formulas, on tensors and on models."""

import pytest
import tiny
import torch
from accelerate import PartialState

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.axes import pieces
from hf_minitron.importance.activation import OVER, Activation, Contribution, Fluctuation
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.importance.metrics import METRICS, BlockImportance, needs_outgoing
from hf_minitron.probe import probe

REDUCTIONS = {f"{batch}_{sequence}": (batch, sequence) for batch in OVER for sequence in OVER}
OUTGOING = [name for name, make in METRICS.items() if needs_outgoing(make)]
REDUCE = {
    "mean": lambda x, dim: x.abs().mean(dim),
    "l2": lambda x, dim: torch.linalg.vector_norm(x, dim=dim),
    "variance": lambda x, dim: x.var(dim, unbiased=False),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_are_those_of_their_names(name):
    batch, sequence = name.split("_")
    torch.manual_seed(0)
    samples = [torch.randn(length, 7) + 0.5 for length in (4, 9, 9, 6)]
    padded, mask = torch.full((4, 9, 7), 5.0), torch.zeros(4, 9, dtype=torch.long)
    for row, sample in enumerate(samples):
        padded[row, : len(sample)], mask[row, : len(sample)] = sample, 1
    metric = Activation(batch, sequence)
    for part in (slice(0, 1), slice(1, 4)):
        metric.update(padded[part], mask[part])
    expected = REDUCE[batch](torch.stack([REDUCE[sequence](sample, 0) for sample in samples]), 0)
    assert torch.allclose(metric.finish(), expected, rtol=1e-4, atol=1e-6)


def test_what_an_expert_does_not_see_counts_as_zeros():
    torch.manual_seed(0)
    seen = torch.randn(2, 3, 5)
    whole = torch.cat([seen, torch.zeros(2, 4, 5)], 1)
    lengths = torch.tensor([[7.0], [7.0]])
    for batch, sequence in REDUCTIONS.values():
        part, all_tokens = Activation(batch, sequence), Activation(batch, sequence)
        part.update(seen, lengths=lengths)
        all_tokens.update(whole)
        assert torch.allclose(part.finish(), all_tokens.finish(), rtol=1e-4, atol=1e-7)


def test_a_head_is_worth_the_sum_of_its_dimensions():
    torch.manual_seed(0)
    x, outgoing = torch.randn(3, 8, 4, 6), torch.rand(4, 6)
    for metric, expected in (
        (Contribution(outgoing), (x.square().mean((0, 1)) * outgoing.square()).sum(1)),
        (Contribution(outgoing, power=1), (x.abs().mean((0, 1)) * outgoing).sum(1)),
        (Fluctuation(outgoing), (x.flatten(0, 1).var(0, unbiased=False) * outgoing.square()).sum(1)),
    ):
        metric.update(x[:2])
        metric.update(x[2:])
        assert torch.allclose(metric.finish(), expected, rtol=1e-4)


WEIGHTED = [("llama", "o_proj", "down_proj"), ("phi3", "o_proj", "down_proj"), ("gpt2", "c_proj", "c_proj")]


@pytest.mark.parametrize(("model_type", "attention", "mlp"), WEIGHTED)
def test_contributions_are_the_energy_of_what_goes_out(model_type, attention, mlp):
    """Of a channel alone, the projection's output has exactly the energy that is its contribution."""
    model = tiny.model(model_type, dtype=torch.float32)
    blocks, ids = tiny.blocks(), tiny.blocks()["input_ids"][:]
    scores = calibrate(model, blocks, metric={"ffn": "contribution", "heads": "contribution"}).scores
    shape = Architecture.of(model.config).shape
    for axis, at in (("ffn", mlp), ("heads", attention)):
        name = Architecture.of(model.config).taps(axis)[1][1]
        assert name.endswith(at)
        module, seen = model.get_submodule(name), []
        hook = module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        hook.remove()
        bias = module(torch.zeros_like(seen[0]))
        per_index = seen[0].shape[-1] // shape[axis]
        for index in (0, shape[axis] - 1):
            for_one, energy = slice(index * per_index, (index + 1) * per_index), 0.0
            for channel in range(for_one.start, for_one.stop):
                alone = torch.zeros_like(seen[0])
                alone[..., channel] = seen[0][..., channel]
                energy += (module(alone) - bias).square().sum(-1).mean().item()
            assert scores[axis][1, index].item() == pytest.approx(energy, rel=1e-3)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "gpt_neox"])
@pytest.mark.parametrize("metric", ["mean_variance", "magnitude", *OUTGOING])
def test_layer_by_layer_equals_resident_for_every_metric(model_type, metric, tmp_path):
    model = tiny.model(model_type, dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    axes = ["ffn", "heads", "dense_ffn", "shared_ffn", *(() if metric in OUTGOING else ("hidden",))]
    wanted = dict.fromkeys(axes, metric) | ({"experts": metric, "layers": metric} if metric == "magnitude" else {})
    resident, streamed = (calibrate(source, tiny.blocks(), metric=wanted).scores for source in (model, tmp_path))
    plain = calibrate(model, tiny.blocks()).scores
    for axis, values in resident.items():
        assert torch.allclose(streamed[axis], values, rtol=1e-4, atol=1e-7, equal_nan=True), axis
        assert values.shape == plain[axis].shape
        assert torch.equal(values.isnan(), plain[axis].isnan())
        assert axis not in wanted or not torch.allclose(values, plain[axis], equal_nan=True)


def test_magnitude_is_the_norm_of_all_weights_that_carry_an_index():
    model = tiny.model(dtype=torch.float32)
    scores = calibrate(model, tiny.blocks(), metric="magnitude").scores
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
    ffn = mlp.gate_proj.weight.square().sum(1) + mlp.up_proj.weight.square().sum(1) + mlp.down_proj.weight.square().sum(0)
    heads = attention.q_proj.weight.view(4, 6, 40).square().sum((1, 2))
    heads += attention.o_proj.weight.view(40, 4, 6).square().sum((0, 2))
    layer = sum(parameter.square().sum() for parameter in model.model.layers[1].parameters())
    assert torch.allclose(scores["ffn"][1], ffn.sqrt())
    assert torch.allclose(scores["heads"][1], heads.sqrt())
    assert torch.allclose(scores["layers"][1], layer.sqrt())


@pytest.mark.parametrize(("model_type", "axis"), [("phi3", "heads"), ("qwen3_next", "ssm_heads"), ("zamba2", "heads")])
def test_magnitude_of_an_index_that_carries_a_part_of_a_dimension_is_that_of_what_goes_with_it(model_type, axis):
    model = tiny.model(model_type, dtype=torch.float32)
    architecture, scores = Architecture.of(model.config), calibrate(model, tiny.blocks(), metric="magnitude").scores[axis]
    sizes = architecture.shape.sizes
    layer = next(at for at, score in enumerate(scores) if score.isfinite().all())
    for index in range(sizes[axis]):
        keep = {axis: torch.tensor([other for other in range(sizes[axis]) if other != index])}
        lost = 0.0
        for name, parameter in architecture.parameters.items():
            if parameter.layer == layer:
                tensor = model.get_parameter(name).data
                kept = sum(float(piece.square().sum()) for piece in pieces(tensor, parameter.pattern, keep, sizes))
                lost += float(tensor.square().sum()) - kept
        assert abs(float(scores[layer, index]) ** 2 - lost) < 1e-3 * lost


def test_random_scores_repeat_with_their_seed():
    model, found = tiny.model(), []
    for seed in (0, None, 0):
        if seed is not None:
            torch.manual_seed(seed)
        found.append(calibrate(model, tiny.blocks(), metric="random").scores["ffn"])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("l2_men", "'l2_men' is none of those for ffn: mean_mean"),
        ("contribution", "'contribution' is none of those for hidden: .*Write metric as axis: name lines"),
        ({"width": "l2_mean"}, "'width' is none of ffn, dense_ffn"),
        ({"layers": "l2_mean"}, "'l2_mean' is none of those for layers: block_importance, magnitude, random"),
        ({"heads": BlockImportance}, "BlockImportance is for layers, not for heads"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused(metric, words):
    with pytest.raises(ValueError, match=words):
        calibrate(tiny.model(), tiny.blocks(), metric=metric)


class Peak:
    """A metric of one's own: the largest activation of every index."""

    axis = ("ffn", "heads")

    def __init__(self):
        self.peak = torch.tensor(0.0)

    def update(self, activation, mask=None):
        if mask is not None:
            activation = activation * mask.view(*mask.shape, *[1] * (activation.dim() - 2))
        self.peak = torch.maximum(self.peak, activation.abs().amax((0, 1)))

    def finish(self):
        return self.peak.flatten(1).amax(1) if self.peak.dim() > 1 else self.peak


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_metric_of_ones_own_is_one_class(model_type, tmp_path):
    model, blocks = tiny.model(model_type, dtype=torch.float32), tiny.blocks()
    model.save_pretrained(tmp_path)
    scores, streamed = (calibrate(source, blocks, metric=Peak).scores for source in (model, tmp_path))
    plain, seen = calibrate(model, blocks).scores, []
    with probe(model, [("model.layers.1.self_attn.o_proj", lambda visit: seen.append(visit.input))]), torch.no_grad():
        model(input_ids=blocks["input_ids"][:])
    expected = seen[0].abs().amax((0, 1)).view(4, 6).amax(1)
    assert torch.allclose(scores["heads"][1], expected)
    assert scores["ffn"].shape == plain["ffn"].shape
    for axis, values in plain.items():
        assert torch.allclose(streamed[axis], scores[axis], rtol=1e-4), axis
        assert torch.equal(scores[axis], values) == (axis not in Peak.axis), axis


def test_an_expert_of_a_metric_of_ones_own_sees_zeros_for_the_tokens_of_others():
    model, blocks = tiny.model("mixtral", dtype=torch.float32), tiny.blocks()
    calls = []

    class Watch(Peak):
        axis = "ffn"

        def update(self, activation, mask=None):
            calls.append((tuple(activation.shape), int((activation != 0).any(-1).sum())))
            super().update(activation, mask)

    calibrate(model, blocks, batch_size=6, metric={"ffn": Watch})
    assert {shape for shape, _ in calls} == {(6, 12, 72)}
    assert sum(tokens for _, tokens in calls) == 3 * 2 * 6 * 12, "two experts of every layer see each token"


def test_a_metric_without_sums_is_refused_by_several_processes(monkeypatch):
    monkeypatch.setitem(vars(PartialState()), "num_processes", 2)
    with pytest.raises(ValueError, match="metric: Peak has no totals for processes to add up"):
        calibrate(tiny.model(), tiny.blocks(), metric=Peak)
