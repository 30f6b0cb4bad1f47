"""Corrections after pruning, against least squares on the data itself."""

import re
from collections import Counter
from threading import Thread

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_minitron import axes
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.checkpoint.checkpoint import _header, write_tensors
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.importance.moments import ChannelEnergy, SecondMoment
from hf_minitron.importance.streamed import check_streamable
from hf_minitron.plan import Plan, make_plan
from hf_minitron.pruning.compensate import DEFAULT_CORRECTIONS, corrections_for
from hf_minitron.pruning.prune import prune_checkpoint, prune_model
from hf_minitron.pruning.reconstruction import factorised, least_squares
from hf_minitron.statistics import Moments, Residuals, Statistics

IDS = tiny.blocks(40)["input_ids"][:]


def test_least_squares_are_those_of_the_data():
    torch.manual_seed(0)
    x, weight, kept = (
        torch.randn(500, 8).double() @ torch.randn(8, 8).double(),
        torch.randn(5, 8).double(),
        torch.tensor([0, 2, 3, 6]),
    )
    moment = x.T @ x / len(x)
    expected = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    assert torch.allclose(least_squares(weight, moment, kept, 1e-12), expected)
    assert torch.allclose(least_squares(weight, moment, kept, 1e12), weight[:, kept])
    ridge = 0.3 * moment.diagonal()[kept].mean()  # the same by gradient: 2 (W' x_k - W x) x_k' + 2 ridge (W' - W_k) = 0
    found = least_squares(weight, moment, kept, 0.3)
    gradient = found @ moment[kept][:, kept] - weight @ moment[:, kept] + ridge * (found - weight[:, kept])
    assert gradient.abs().max() < 1e-10


def test_moments_are_means_over_tokens_that_are_text():
    x = torch.randn(3, 8, 5)
    mask = torch.ones(3, 8)
    mask[1, 5:] = 0
    tokens = x[mask > 0]
    second, energy = SecondMoment(), ChannelEnergy()
    for half in (slice(0, 2), slice(2, 3)):
        second.update(x[half], mask[half])
        energy.update(x[half], mask[half])
    read = torch.cat([tokens[:13][::4], tokens[13:][::4]])
    assert torch.allclose(second.finish(), torch.cat([read.T @ read, read.sum(0)[None]]) / len(read), atol=1e-6)
    assert torch.allclose(energy.finish(), (tokens.square() / tokens.square().mean(1, keepdim=True)).mean(0), atol=1e-5)


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_corrections_in_memory_equal_those_on_disk(model_type, tmp_path):
    teacher = tiny.model(model_type, dtype=torch.float32)
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size="40KB")
    shape = Architecture.of(teacher.config).shape
    resident = calibrate(teacher, tiny.blocks(), moments=True)
    streamed = calibrate(tmp_path / "teacher", tiny.blocks(), moments=True, save_to=tmp_path / "streamed")
    plan = make_plan(resident.scores, shape, shape.cut_to(tiny.target(shape)))
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student", statistics=streamed)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student").state_dict()
    corrected = prune_model(teacher, plan, resident).state_dict()
    plain = prune_model(teacher, plan).state_dict()
    assert loaded.keys() == corrected.keys() == plain.keys()
    assert all(torch.allclose(loaded[name], value, rtol=1e-3, atol=1e-4) for name, value in corrected.items())
    assert any(not torch.allclose(plain[name], value, rtol=1e-2) for name, value in corrected.items())


NEARER = [(t, a) for t in ("llama", "phi3", "gpt2", "starcoder2", "gemma2", "nemotron") for a in ("ffn", "heads")]


@pytest.mark.parametrize(("model_type", "axis"), [case for case in NEARER if case != ("gpt2", "heads")])  # cut with hidden only
def test_a_corrected_projection_is_nearer_to_what_it_gave(model_type, axis):
    """On the tokens that were read, the first layer's projection must err less than the sliced one."""
    teacher = tiny.model(model_type, dtype=torch.float32)
    shape = Architecture.of(teacher.config).shape
    target = tiny.target(shape, axis)
    statistics = calibrate(teacher, tiny.blocks(40), moments=True)
    plan = make_plan(statistics.scores, shape, shape.cut_to(target))
    (_, name), *_ = Architecture.of(teacher.config).taps(axis)

    def output(model):
        found = []
        hook = model.get_submodule(name).register_forward_hook(lambda m, args, out: found.append(out))
        with torch.no_grad():
            model(input_ids=IDS, use_cache=False)
        hook.remove()
        return found[0]

    expected = output(teacher)
    plain, corrected = ((output(prune_model(teacher, plan, m)) - expected).square().mean() for m in (None, statistics))
    assert corrected < 0.97 * plain


@pytest.mark.parametrize("model_type", ["olmo2", "olmoe", "minimax_m2"])
def test_a_norm_over_all_heads_is_corrected_by_the_energy_of_those_that_stay(model_type):
    """As in real models, heads differ in energy; then most of what the cut does to queries and keys is made up for."""
    teacher = tiny.model(model_type, torch.float32)
    shape = Architecture.of(teacher.config).shape
    with torch.no_grad():
        for layer in teacher.model.layers:
            for heads, weight in (("heads", layer.self_attn.q_proj.weight), ("kv_heads", layer.self_attn.k_proj.weight)):
                weight.mul_(torch.linspace(0.3, 2, shape[heads]).repeat_interleave(shape["head_dim"])[:, None])
    statistics = calibrate(teacher, tiny.blocks(40), moments=True)
    target = {"kv_heads": 1, **({"hidden": 20, "heads": 2} if model_type == "olmoe" else {})}
    plan = make_plan(statistics.scores, shape, shape.cut_to(target))
    name = "model.layers.0.self_attn.k_norm"

    def given(model):
        found = []
        hook = model.get_submodule(name).register_forward_hook(lambda m, args, out: found.append((args[0], out)))
        with torch.no_grad():
            model(input_ids=IDS, use_cache=False)
        hook.remove()
        return found[0]

    whole, kept = given(teacher), plan.keep_at(0)["kv_heads"][:, None] * shape["head_dim"] + torch.arange(shape["head_dim"])
    energy = whole[0].square() / whole[0].square().mean(-1, keepdim=True)
    ratio = energy[..., kept.flatten()].mean().sqrt()
    plain, corrected = (prune_model(teacher, plan, *more) for more in ((), (statistics, ["norm_ratio"])))
    sliced = teacher.get_parameter(f"{name}.weight")[kept.flatten()]
    assert torch.allclose(corrected.get_parameter(f"{name}.weight"), sliced * ratio, rtol=1e-4)
    if "hidden" not in plan.keep:
        before, after = ((given(model)[1] - whole[1][..., kept.flatten()]).square().mean() for model in (plain, corrected))
        assert after < before / 10
    older = Statistics(statistics.scores, Moments())
    for key, value in statistics.moments.items():
        if key != name:
            older.moments[key] = value
    with pytest.raises(ValueError, match=f"Corrections need the moments of '{name}'"):
        prune_model(teacher, plan, older, ["norm_ratio"])


def test_a_hidden_cut_gives_norms_and_readers_nearer_to_the_old_ones():
    teacher = tiny.model(dtype=torch.float32)
    with torch.no_grad():
        teacher.model.embed_tokens.weight.mul_(torch.linspace(0.2, 3, 40))  # as in real models, channels differ in energy
    shape = Architecture.of(teacher.config).shape
    statistics = calibrate(teacher, tiny.blocks(40), moments=True)
    plan = make_plan(statistics.scores, shape, shape.cut_to({"hidden": 24}))
    kept = torch.tensor(plan.keep["hidden"])

    def first(model):
        norm, up = [], []
        hooks = [
            model.model.layers[0].input_layernorm.register_forward_hook(lambda m, args, out: norm.append(out)),
            model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, args, out: up.append(out)),
        ]
        with torch.no_grad():
            model(input_ids=IDS, use_cache=False)
        for hook in hooks:
            hook.remove()
        return norm[0], up[0]

    norm, query = first(teacher)
    errors = {}
    for name, given in {
        "plain": (), "norms": (statistics, ("norm_ratio",)), "both": (statistics, ("norm_ratio", "least_squares")),
    }.items():  # fmt: skip
        found = first(prune_model(teacher, plan, *given))
        errors[name] = [(found[0] - norm[..., kept]).square().mean(), (found[1] - query).square().mean()]
    assert errors["norms"][0] < 0.97 * errors["plain"][0]
    assert errors["both"][1] < 0.97 * errors["norms"][1]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Teachers with their moments, and a plan for any target."""
    made = {}

    def get(model_type):
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            teacher = tiny.model(model_type, dtype=torch.float32)
            teacher.save_pretrained(folder / "teacher")
            made[model_type] = folder, teacher, calibrate(teacher, tiny.blocks(), moments=True)
        return made[model_type]

    def prepare(model_type, target):
        folder, teacher, statistics = get(model_type)
        shape = Architecture.of(teacher.config).shape
        return folder, teacher, make_plan(statistics.scores, shape, shape.cut_to(target)), statistics

    return prepare


def refused(small, model_type, target, match, **given):
    """Both doors refuse, and the one on disk leaves nothing."""
    folder, teacher, plan, statistics = small(model_type, target)
    given = {key: statistics if value == "s" else value for key, value in given.items()}
    with pytest.raises(ValueError, match=match) as caught:
        prune_model(teacher, plan, **given)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=match):
        prune_checkpoint(folder / "teacher", plan, folder / "student", **given)
    assert not list(folder.glob("student*"))


def test_what_corrections_need_and_what_is_given_without_use(small):
    ffn = {"ffn": 8}
    refused(small, "llama", ffn, r"least_squares needs moments: give the statistics of", corrections=["least_squares"])
    refused(small, "llama", ffn, r"least_squares needs moments", corrections=DEFAULT_CORRECTIONS)
    refused(small, "llama", ffn, r"statistics: not used with corrections: \[\]", corrections=[], statistics="s")
    refused(
        small, "llama", ffn, r"residuals: for layer_merge, which is none of", residuals=Residuals({}, {}, {}), statistics="s"
    )
    refused(small, "llama", ffn, "corrections: 'magic' is none of", corrections=["magic"], statistics="s")
    refused(small, "llama", ffn, "least_squares needs moments: give the statistics of", statistics=Statistics({}))
    refused(small, "llama", ffn, "statistics: 'folder' is no Statistics: give what", statistics="folder")
    merge = {"corrections": [*DEFAULT_CORRECTIONS, "layer_merge"], "statistics": "s"}
    refused(small, "llama", {"layers": 2}, r"layer_merge needs residuals, what read_residuals", **merge)


WITHOUT_EFFECT = [
    ("llama", {"ffn": 8}, ["bias"], r"bias has no effect: no projection .*\(cut: ffn\) has a bias. Leave bias out"),
    ("llama", {"ffn": 8}, ["least_squares", "bias"], "bias has no effect"),
    ("llama", {"ffn": 8}, ["norm_ratio"], r"norm_ratio has no effect: hidden is not cut \(cut: ffn\)"),
    ("llama", {"ffn": 8}, [*DEFAULT_CORRECTIONS, "rotation"], "rotation has no effect: hidden is not cut"),
    ("llama", {"ffn": 8}, [*DEFAULT_CORRECTIONS, "layer_merge"], "layer_merge has no effect: no layer is dropped"),
    ("llama", {"layers": 2}, ["least_squares"], r"least_squares has no effect: no projection reads .*\(cut: layers\)"),
    ("olmo", {"hidden": 24}, ["norm_ratio"], "norm_ratio has no effect: the norms of olmo have no weights"),
    ("gpt2", {"layers": 2}, ["layer_merge"], "layer_merge is not for gpt2"),
    ("gemma2", {"hidden": 24}, ["rotation"], "rotation is not for gemma2: it needs RMS norms"),
    ("mixtral", {"ffn": 32}, ["least_squares"], "least_squares has no effect"),
]


@pytest.mark.parametrize(("model_type", "target", "names", "match"), WITHOUT_EFFECT)
def test_a_correction_without_effect_is_refused(model_type, target, names, match, small):
    refused(small, model_type, target, match, corrections=names, statistics="s")


@pytest.mark.parametrize(
    ("model_type", "target"), [("llama", {"layers": 2}), ("mixtral", {"ffn": 32}), ("olmo", {"hidden": 24})]
)
def test_the_default_corrections_do_what_applies(model_type, target, small):
    _, teacher, plan, statistics = small(model_type, target)
    made = [prune_model(teacher, plan, statistics, *given).state_dict() for given in ((), (DEFAULT_CORRECTIONS,))]
    plain = prune_model(teacher, plan).state_dict()
    assert all(torch.equal(value, made[1][name]) for name, value in made[0].items())
    assert (model_type == "olmo") == any(not torch.equal(value, made[0][name]) for name, value in plain.items())


def test_moments_of_another_model_are_refused(small):
    (*_, others), (_, teacher, plan, own) = small("exaone4", {"hidden": 24}), small("llama", {"hidden": 24})
    with pytest.raises(ValueError, match=r"need the moments of 'model.layers.0.input_layernorm', .*has none: score this model"):
        prune_model(teacher, plan, others)
    other = tiny.model(hidden_size=48)
    scores, shape = calibrate(other, tiny.blocks()).scores, Architecture.of(other.config).shape
    with pytest.raises(ValueError, match=r"those of shape \(40,\): score this model again"):
        prune_model(other, make_plan(scores, shape, shape.cut_to({"hidden": 24})), own)


def inputs_of(model, modules):
    """The second moments of what modules are given when the whole model reads the calibration text, head included."""
    found = {name: SecondMoment() for name in modules}
    of_weight = {id(model.get_submodule(name).weight): found[name] for name in modules}  # layers may share it
    hooks = [
        module.register_forward_pre_hook(lambda m, args, metric=metric: metric.update(args[0].view(*shape, -1)))
        for module in model.modules()
        if (metric := of_weight.get(id(getattr(module, "weight", None)))) and not isinstance(module, torch.nn.Embedding)
    ]
    for batch in tiny.blocks()["input_ids"][:].split(4):
        shape = batch.shape
        with torch.no_grad():
            model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: metric.finish() for name, metric in found.items() if isinstance(metric.totals[0], torch.Tensor)}


@pytest.mark.parametrize(("model_type", "changes"), tiny.slow_twins(tiny.ACCEPTED), ids=str)
def test_every_projection_is_corrected_by_the_moments_of_what_it_reads(model_type, changes, tmp_path):
    """Whatever the tables say: compared with hooks on the projections themselves, in memory and layer by layer."""
    model = tiny.model(model_type, dtype=torch.float32, **changes)
    architecture = Architecture.of(model.config)
    shape = architecture.shape
    measured = {"resident": calibrate(model, tiny.blocks(), moments=True)}
    if model_type == "olmo_hybrid":
        with pytest.raises(ValueError, match="cannot be scored layer by layer: OlmoHybridConfig refuses .*at least one att"):
            check_streamable(architecture)
    elif not any(axis.endswith("layers") for axis in {**architecture.inexact, **shape.fixed}):  # else refused
        model.save_pretrained(tmp_path / "model")
        measured["streamed"] = calibrate(tmp_path / "model", tiny.blocks(), moments=True)
    plan = make_plan(measured["resident"].scores, shape, shape.cut_to(tiny.target(shape)))
    corrections_for(architecture, plan, measured["resident"].moments)
    modules = dict(model.named_modules())
    corrected = architecture.reads
    expected = inputs_of(model, corrected)
    assert expected.keys() == corrected.keys()
    for name, read in corrected.items():
        for how, statistics in measured.items():
            found = statistics.moments[read.moment]
            assert torch.allclose(found, expected[name], rtol=1e-3, atol=1e-4), f"{how}: {name} by {read}"
    linear = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear | Conv1D)}
    linear &= architecture.weights.keys()  # the others have the weights of one of these
    narrow = {
        name for name in linear if name.endswith(("q_b_proj", "kv_b_proj", "wq_b", "dt_proj", "q_gate_proj", "norm.mlp.fc2"))
    }  # read no hidden channels
    heads = model_type in (*tiny.BERTS, "modernbert-decoder")
    narrow |= {name for name in linear if heads and not re.search(r"\.layers?\.\d", name)}  # only sliced, too
    narrow |= {name for name in linear if architecture.weights[name].role == "router"}  # only sliced
    # no norm outside of the layers, or a division after it: only sliced
    headless = {"lm_head"} if (model_type == "opt" and changes) or model_type == "minicpm3" else set()
    # of Gemma 4: a narrow embedding for every layer, and what makes it of the wide one
    narrow |= {name for name in linear if name.endswith(("per_layer_projection", "per_layer_model_projection"))}
    # of Gemma 3n: what mixes its states; of Zamba: what reads the stream and the embeddings, and adapters
    between = ("modality_router", "_coefs", "linear_right", "altup_projections.", "altup_unembed_projections.")
    narrow |= {name for name in linear if any(part in name for part in between) or re.search(r"shared.*(q|k|v)_proj$", name)}
    narrow |= {name for name in linear if "_adapter_list." in name or name.endswith(".linear")}
    assert linear - corrected.keys() - narrow == headless


def test_a_target_is_enough_where_statistics_choose():
    teacher = tiny.model(dtype=torch.float32)
    statistics, shape = calibrate(teacher, tiny.blocks(), moments=True), Architecture.of(teacher.config).shape
    chosen = make_plan(statistics.scores, shape, shape.cut_to({"ffn": 32, "hidden": 24}))
    expected = prune_model(teacher, chosen, statistics).state_dict()
    found = prune_model(teacher, {"ffn": 32, "hidden": 24}, statistics).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(ValueError, match=r"plan: the sizes \{'ffn': 32\} need statistics to choose by"):
        prune_model(teacher, {"ffn": 32})
    with pytest.raises(ValueError, match="intermediate: not an axis of this model"):
        prune_model(teacher, {"intermediate": 32}, statistics)


def test_a_name_is_matched_once_and_a_moment_factorised_once(tmp_path, monkeypatch):
    """Three layers of Qwen2: what attention, the output, the MLP and down_proj read in each, less the uncut heads; the head."""
    teacher = tiny.model("qwen2", dtype=torch.float32, rms_norm_eps=1.5e-6)  # no other test's: architectures are kept
    teacher.save_pretrained(tmp_path / "teacher")
    counts = Counter()

    def counted(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: counts.update([name]) or original(*args, **kwargs))

    counted(axes, "match")
    statistics = calibrate(teacher, tiny.blocks(), moments=True)
    statistics.save(tmp_path / "statistics")
    counted(torch.linalg, "cholesky")
    reads, read = Counter(), Moments.__getitem__
    monkeypatch.setattr(Moments, "__getitem__", lambda self, name: reads.update([name]) or read(self, name))
    stored = Statistics.load(tmp_path / "statistics")
    prune_checkpoint(tmp_path / "teacher", {"hidden": 24, "ffn": 32}, tmp_path / "student", statistics=stored)
    assert counts["cholesky"] == 3 * 3 + 1
    assert len(reads) == 3 * 3 + 1 + 3 * 2 + 1, "inputs of projections, of the head, and energies of the norms"
    assert set(reads.values()) == {1}, "a moment is read once"
    prune_model(teacher, {"hidden": 24, "ffn": 32}, statistics)
    assert counts["match"] == len(Architecture.of(teacher.config).parameters) == 39


def test_writing_uses_one_thread_corrections_all_and_the_process_keeps_its_number(tmp_path, monkeypatch):
    tiny.model(dtype=torch.float32).save_pretrained(tmp_path / "teacher")
    statistics = calibrate(tmp_path / "teacher", tiny.blocks(), moments=True)
    seen = {"solver": set(), "pieces": set(), "a new thread": set(), "the caller": set()}

    def watched(function, name):
        def call(*args):
            seen[name].add(torch.get_num_threads())
            return function(*args)

        return call

    def write(folder, specs, tensors, max_shard_bytes):
        def read():
            for name, pieces in tensors:
                seen["pieces"].add(torch.get_num_threads())
                thread = Thread(target=lambda: seen["a new thread"].add(torch.get_num_threads()))
                thread.start()
                thread.join()
                yield name, pieces

        write_tensors(folder, specs, read(), max_shard_bytes)

    monkeypatch.setattr("hf_minitron.pruning.compensate.factorised", watched(factorised, "solver"))
    monkeypatch.setattr("hf_minitron.pruning.prune.write_tensors", write)
    monkeypatch.setattr("hf_minitron.checkpoint.checkpoint._header", watched(_header, "the caller"))
    torch.set_num_threads(3)
    try:
        prune_checkpoint(tmp_path / "teacher", {"ffn": 32}, tmp_path / "student", statistics=statistics)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert seen == {"solver": {3}, "pieces": {1}, "a new thread": {3}, "the caller": {3}}


def test_a_saved_plan_makes_the_same_corrections_again(tmp_path):
    """What is cut is one value: a plan with its basis and its corrections."""
    teacher = tiny.model(dtype=torch.float32)
    teacher.save_pretrained(tmp_path / "teacher")
    statistics = calibrate(teacher, tiny.blocks(), moments=True)
    target = {"hidden": 24}
    prune_checkpoint(tmp_path / "teacher", target, tmp_path / "student", statistics=statistics, corrections=["rotation"])
    plan = Plan.load(tmp_path / "student/plan.json")
    assert plan.corrections == ("rotation",)
    assert plan.rotated
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "student").state_dict()
    again = prune_model(teacher, plan, statistics).state_dict()
    default = prune_model(teacher, target, statistics).state_dict()
    for name, value in expected.items():
        assert torch.allclose(again[name], value, atol=1e-5), name
    assert again["model.embed_tokens.weight"].shape == default["model.embed_tokens.weight"].shape
    assert not torch.allclose(again["model.embed_tokens.weight"], default["model.embed_tokens.weight"], atol=1e-2)
