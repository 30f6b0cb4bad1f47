"""Speed: what is measured and how it is read; the numbers themselves are the machine's."""

import sys

import pytest
import tiny
import torch

from hf_minitron.evaluation import speed
from hf_minitron.evaluation.speed import SpeedSettings, measure_speed

SETTINGS = SpeedSettings(batch_sizes=(1, 3), prompt=(5, 16), new_tokens=4, rounds=2)


def test_models_take_turns_at_every_setting(monkeypatch):
    models = {"big": tiny.model(dtype=torch.float32), "small": tiny.model(dtype=torch.float32, intermediate_size=24)}
    seen, real = [], speed.generate

    def generate(model, prompt, count):
        seen.append((model, tuple(prompt.shape), count))
        return real(model, prompt, count)

    monkeypatch.setattr(speed, "generate", generate)
    found = measure_speed(models, SETTINGS)
    cases = [(1, 5), (1, 16), (3, 5), (3, 16)]
    warm = [(model, case, 5) for case in cases for model in models.values()]
    turn = [(model, case, count) for case in cases for model in models.values() for count in (1, 5)]
    assert seen == warm + turn * 2
    for name in models:
        assert [(entry["batch_size"], entry["prompt"]) for entry in found[name]] == cases
        for entry in found[name]:
            for kind in ("first_token", "prefill", "decode"):
                assert 0 < entry[kind]["low"] <= entry[kind]["value"] <= entry[kind]["high"]


def test_rates_follow_from_the_times(monkeypatch):
    times = iter([0.5, 2.5, 0.25, 1.25, 1.0, 4.0])  # first token, then all; three rounds
    monkeypatch.setattr(speed, "seconds_of", lambda work: next(times))
    settings = SpeedSettings(batch_sizes=(2,), prompt=(10,), new_tokens=4, rounds=3)
    (entry,) = measure_speed({"": tiny.model(dtype=torch.float32)}, settings)[""]
    assert entry["first_token"] == {"value": 0.5, "low": 0.25, "high": 1.0}
    assert entry["prefill"]["value"] == 2 * 10 / 0.5
    assert entry["decode"] == {"value": 8 / 2, "low": 8 / 3, "high": 8 / 1}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_weights_and_what_a_run_adds():
    model = tiny.model(dtype=torch.float32)
    weights = 4 * sum(tensor.numel() for tensor in model.parameters())
    held = torch.ones(10_000_000)  # there before, so not the run's

    def work():
        torch.ones(25_000_000).sum()  # 100 MB for a moment
        return held

    quiet, busy = speed._peak_bytes(model, lambda: None), speed._peak_bytes(model, work)
    assert weights <= quiet < weights + 20e6
    assert 90e6 < busy - weights < 130e6


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"batch": 1}, "speed: unknown key 'batch'; known: batch_sizes, prompt"),
        ({"batch_sizes": [1, 0]}, r"speed.batch_sizes: \[1, 0\] is not a whole number from 1 on, or a list"),
        ({"prompt": []}, "speed.prompt"),
        ({"new_tokens": [3]}, r"speed.new_tokens: \[3\] is not a whole number from 1 on"),
        ({"rounds": "x"}, "speed.rounds: 'x'"),
    ],
)
def test_bad_settings_are_refused(section, message):
    with pytest.raises(ValueError, match=message):
        SpeedSettings.read(section)


def test_settings_are_read_and_checked_against_positions():
    assert SpeedSettings.read(False) is None
    assert SpeedSettings.read(True) == SpeedSettings()
    read = SpeedSettings.read({"batch_sizes": 2, "prompt": [7, 9]})
    assert read == SpeedSettings(batch_sizes=(2,), prompt=(7, 9))
    assert read.check(33, "me") is None
    assert SpeedSettings(prompt=(8, 500, 900)).within(100).prompt == (8, 76)
    assert SpeedSettings().within(None) == SpeedSettings()
    with pytest.raises(ValueError, match="prompt 9 and 24 new_tokens are more than the 32 positions of me"):
        read.check(32, "me")
