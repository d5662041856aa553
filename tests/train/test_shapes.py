"""Every kind of heads in every size: a step of training moves all weights, and what is saved decodes exactly."""

import pytest
import torch

from hydraspec.decode.engine import Engine
from hydraspec.heads import KINDS
from hydraspec.heads.checkpoint import Provenance, load_heads, save_heads
from hydraspec.train.batch import Example
from hydraspec.train.prepare import make_trainer
from hydraspec.train.store import TokenStore
from hydraspec.tree import find_tree
from hydraspec.types import Output, Request
from tests.conftest import VOCABULARY, generate_plainly, random_prompts
from tests.train.conftest import prepare_small

# Heads, layers, and what else differs: all values of each come up, in every kind.
SHAPES = [
    (1, 1, {"tied_vocabulary": False}),
    (8, 1, {"draft_vocabulary": 40}),
    (2, 6, {"tied_vocabulary": False, "draft_vocabulary": 40}),
    (8, 6, {}),
    (3, 2, {"shared_blocks": True}),
    (5, 4, {"prefix_layer": "plain", "prefix_window": 5}),
    (6, 3, {"teacher_weight": 0.5, "reverse_kl_weight": 0.2, "reconstruction_weight": 0.3, "noise": 5.0}),
    (4, 5, {"kl_weight": 1.0, "head_decay": 0.8, "dropout": 0.1}),
    (7, 1, {"data_weight": 1.0, "ema": 0.9}),
]
PROMPTS = random_prompts([9, 5, 14])


def fit(kind, options):
    """The options that this kind of heads knows."""
    options = dict(options)
    if kind == "eagle":
        options.pop("shared_blocks", None)
        options.pop("tied_vocabulary", None)
    if not KINDS[kind].count_decoder_layers(1):
        options.pop("prefix_window", None)
        options.pop("prefix_layer", None)
    return options


@pytest.fixture(scope="module")
def truth(tiny_llama):
    return [generate_plainly(tiny_llama.model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_any_size_learn_and_decode(tiny_llama, truth, tmp_path, kind, shape):
    heads, layers, options = shape
    options = {"recipe": kind, "num_heads": heads, "num_layers": layers, **fit(kind, options)}
    # Answers long enough for the last of eight heads.
    examples = [Example(prompt, [True] * 24) for prompt in random_prompts([24] * 12, seed=7)]
    TokenStore.build(tmp_path / "run" / "training" / "tokens", examples, VOCABULARY)
    prepared = prepare_small(tmp_path / "run", tiny_llama, batch_tokens=64, max_tokens=128, **options)
    before = {name: value.clone() for name, value in prepared.heads.state_dict().items()}
    trainer = make_trainer(prepared)
    trainer.run()
    trained = trainer.trained_weights()
    assert trained.keys() == before.keys()
    still = [name for name, value in trained.items() if value.is_floating_point() and torch.equal(value, before[name])]
    assert not still
    prepared.heads.load_state_dict(trained)
    save_heads(prepared.heads, tmp_path / "heads", Provenance("tiny", tiny_llama.fingerprint()))
    loaded = load_heads(str(tmp_path / "heads"), tiny_llama)
    assert (loaded.num_heads, loaded.config.num_layers) == (heads, layers)
    for tree in (f"chain-{heads}", "published-63"):
        engine = Engine(tiny_llama, loaded, find_tree(tree).cut(heads))
        outputs = [Output() for _ in PROMPTS]
        for _ in engine.run([Request(tuple(prompt), 12) for prompt in PROMPTS], outputs):
            pass
        assert [output.token_ids for output in outputs] == truth
