"""What a run is made of: the base model that it ends with."""

import dataclasses
import json

import pytest
import torch

from hydraspec.base.model import BaseModel
from hydraspec.train import run
from hydraspec.train.prepare import load_for_deployment
from tests.conftest import make_model
from tests.train.conftest import make_store, prepare_small


@pytest.fixture
def folder(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def prepare_from(folder, out, dtype, **more):
    prepared = prepare_small(out, BaseModel.load(folder, dtype=dtype), epochs=1, max_tokens=128)
    return dataclasses.replace(prepared, run=dataclasses.replace(prepared.run, base=folder), **more)


def test_a_base_that_is_rounded_for_training_is_read_again_for_deployment(folder, tmp_path):
    prepared = prepare_from(folder, tmp_path / "heads", torch.bfloat16)
    deployed = load_for_deployment(prepared)
    truth = dict(make_model("llama").named_parameters())
    for name, parameter in deployed.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, truth[name])
    assert deployed.fingerprint() == prepared.base.fingerprint()


def test_a_base_that_is_deployed_as_it_was_trained_with_is_used_again(folder, tmp_path):
    prepared = prepare_from(folder, tmp_path / "heads", torch.float32)
    assert load_for_deployment(prepared) is prepared.base


def test_heads_are_measured_on_the_base_as_it_is_deployed(folder, tmp_path, monkeypatch):
    prepared = prepare_from(folder, tmp_path / "heads", torch.bfloat16, held_out=make_store(tmp_path / "held", 4))
    measure, seen = run.measure_heads, []

    def note(base, *more):
        seen.append(base.dtype)
        return measure(base, *more)

    monkeypatch.setattr(run, "measure_heads", note)
    trainer = run.make_trainer(prepared)
    trainer.run()
    run.finish(prepared, trainer, done=True)
    assert seen == [torch.float32]
    measured = json.loads((tmp_path / "heads" / "config.json").read_text())["provenance"]["measured"]
    assert all(length["real"] >= 1 for length in measured["acceptance"].values())
