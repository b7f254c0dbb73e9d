"""TreeModel: a node has the logits of a plain transformers forward over its path, and the model stays its owner's."""

from __future__ import annotations

import gc
import inspect
import random
import re
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import FAMILIES, PROMPT, tiny_model
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, T5Config

from specbranch_ext.integrations.transformers import ATTENTION, TreeModel

VOCABULARY = 32


def family(name: str, **overrides: Any) -> PreTrainedModel:
    return tiny_model(name.partition("-")[0], **FAMILIES[name], **overrides)


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model()


def own_logits(model: PreTrainedModel, text: Sequence[int]) -> Tensor:
    """After the last token of `text`, [V], from transformers' own attention and no cache."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([list(text)]), use_cache=False).logits
    return logits[0, -1]


def assert_same(logits: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert int(logits.argmax()) == int(expected.argmax())


class Reference:
    """A TreeModel beside the text and the tree that it should hold: each node is compared over its own path."""

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.model, self.trees = model, TreeModel(model, capacity)
        self.text: list[int] = []
        self.paths: list[list[int]] = []  # the tokens of each pending node's path

    def forward(self, tokens: list[int], parents: list[int] | None) -> None:
        logits = self.trees.forward(tokens, parents)
        assert logits.shape == (len(tokens), VOCABULARY)
        for i, token in enumerate(tokens):
            parent = len(self.paths) - 1 if parents is None else parents[i]
            self.paths.append([*(self.paths[parent] if parent >= 0 else []), token])
            assert_same(logits[i], own_logits(self.model, [*self.text, *self.paths[-1]]))
        assert self.trees.nodes == len(self.paths)

    def commit(self, path: Sequence[int]) -> None:
        self.trees.commit(path)
        self.text += self.paths[path[-1]] if path else []
        self.paths = []
        assert (self.trees.length, self.trees.nodes) == (len(self.text), 0)

    def rollback(self, length: int) -> None:
        self.trees.rollback(length)
        self.text, self.paths = self.text[:length], []
        assert (self.trees.length, self.trees.nodes) == (length, 0)


# ---- Logits


@pytest.mark.parametrize("name", FAMILIES)
def test_trees_grown_step_by_step(name: str) -> None:
    """Roots, branches and chains anywhere in the pending tree, over several commits and a rollback."""
    chance = random.Random(name)
    decoder = Reference(family(name), 64)
    decoder.forward(PROMPT, None)
    decoder.commit(range(len(PROMPT)))
    for turn in range(3):
        parents: list[int] = []
        for _ in range(3):
            first, count = len(parents), chance.randint(1, 4)
            added = [chance.randint(-1, first + i - 1) for i in range(count)]
            parents += added
            decoder.forward([chance.randrange(VOCABULARY) for _ in added], added)
        path = [len(parents) - 1 - turn]
        while (parent := parents[path[0]]) >= 0:
            path.insert(0, parent)
        decoder.commit(path)
    decoder.rollback(len(PROMPT) - 3)
    decoder.forward([5, 6], None)
    decoder.forward([7], None)  # below the newest node
    decoder.forward([8, 9], [0, 3])
    decoder.commit([0, 3, 4])
    decoder.forward([1], [-1])


def test_a_chain_of_several_forwards_has_no_bits(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a long prompt in parts must not take memory that grows with the square of its length."""
    decoder = Reference(llama, 32)

    def never(parents: Tensor) -> Any:
        raise AssertionError("bits of a chain")

    monkeypatch.setattr("specbranch_ext.integrations.transformers.ancestor_mask", never)
    decoder.forward(PROMPT, None)
    decoder.forward([3, 4], None)
    decoder.forward([5], [len(PROMPT) + 1])


def test_more_nodes_than_a_word_has_bits(llama: PreTrainedModel) -> None:
    decoder = Reference(llama, 100)
    decoder.forward([1], None)
    decoder.commit([0])
    decoder.forward(list(range(VOCABULARY)), [-1] * VOCABULARY)
    decoder.forward(list(range(VOCABULARY)), list(range(VOCABULARY)))
    decoder.forward([3, 4, 5], [33, 64, 2])
    decoder.commit([1, 33, 64, 65])
    decoder.forward([9], None)


def test_only_the_last_logits(llama: PreTrainedModel) -> None:
    trees, again = TreeModel(llama, 32), TreeModel(llama, 32)
    # Not to the bit: torch may multiply fewer rows in another way.
    assert_same(trees.forward(PROMPT, logits_to_keep=2), again.forward(PROMPT)[-2:])
    assert not trees.forward([1]).requires_grad


def test_dropped_rows_and_rows_never_written_are_not_read(llama: PreTrainedModel) -> None:
    trees = TreeModel(llama, 24)
    trees.forward(PROMPT)
    trees.commit(range(6))
    for layer in trees._layers:
        for buffer in (layer.keys, layer.values):
            assert buffer is not None
            with torch.inference_mode():
                buffer[:, :, 6:] = float("nan")
    assert_same(trees.forward([7, 8], [-1, -1])[1], own_logits(llama, [*PROMPT[:6], 8]))


def test_inputs_may_be_tensors(llama: PreTrainedModel) -> None:
    lists, tensors = TreeModel(llama, 16), TreeModel(llama, 16)
    expected = lists.forward([4, 5, 6], [-1, 0, 0])
    assert torch.equal(tensors.forward(torch.tensor([4, 5, 6]), torch.tensor([-1, 0, 0])), expected)
    lists.commit([0, 2])
    tensors.commit(torch.tensor([0, 2]))
    assert torch.equal(tensors.forward(torch.tensor([1])), lists.forward([1]))


def test_the_cache_is_handed_over_by_the_name_that_the_model_has_for_it() -> None:
    """5.24 calls it `cache`, earlier ones `past_key_values`."""
    model = tiny_model()
    original, handed = model.forward, []
    its_name = "cache" if "cache" in inspect.signature(original).parameters else "past_key_values"

    def forward(self: Any, input_ids: Any, position_ids: Any, use_cache: Any, cache: Any) -> Any:
        handed.append(cache)
        arguments = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": use_cache, its_name: cache}
        return original(**arguments)

    model.forward = types.MethodType(forward, model)  # without logits_to_keep, too
    trees = TreeModel(model, 16)
    expected = TreeModel(tiny_model(), 16).forward([1, 2, 3])
    assert torch.equal(trees.forward([1, 2, 3], logits_to_keep=2), expected[1:])
    assert handed == [trees._cache]


# ---- The owner's model


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_the_owner_s_forwards_are_transformers_own(name: str) -> None:
    model: Any = family(name)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        before = model(ids).logits
    text = model.generate(ids, max_new_tokens=6, do_sample=False)
    trees = TreeModel(model, 40)
    for _ in range(2):
        trees.forward([3, 4, 5], [-1, -1, 0])
        with torch.no_grad():
            assert torch.equal(model(ids).logits, before)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), text)
        assert model.config._attn_implementation == "eager"
        trees.commit([1])
    model(ids).logits.sum().backward()  # and it still has gradients
    assert all(weight.grad is not None for weight in model.parameters())
    trees.forward([7])


def test_training_mode_and_the_owner_s_attention_are_put_back() -> None:
    model = tiny_model("phi", attention_dropout=0.5, resid_pdrop=0.5)
    expected = TreeModel(model, 16).forward(PROMPT)
    model.set_attn_implementation("sdpa")
    model.train()
    next(model.children()).eval()  # of some modules only
    model.get_submodule("model.layers").train()
    modes = [module.training for module in model.modules()]
    trees = TreeModel(model, 16)
    assert torch.equal(trees.forward(PROMPT), expected)
    with pytest.raises(ValueError, match="tokens"):
        trees.forward([99])
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"


def test_an_error_within_the_model_leaves_everything_as_it_was(llama: PreTrainedModel) -> None:
    trees = TreeModel(llama, 16)
    expected = TreeModel(llama, 16).forward([1, 2])
    trees.forward([1])

    def fail(*_: Any) -> None:
        raise OSError("no more")

    hook = llama.get_submodule("model.layers.1").register_forward_hook(fail)
    with pytest.raises(OSError, match="no more"):
        trees.forward([2])
    hook.remove()
    assert llama.config._attn_implementation == "eager"
    assert trees.nodes == 1
    torch.testing.assert_close(trees.forward([2])[0], expected[1])


def test_several_share_a_model_from_several_threads(llama: PreTrainedModel) -> None:
    texts = [[3, 4, 5], [6, 7, 8], [9, 1, 2]]
    expected = [TreeModel(llama, 64).forward(text) for text in texts]
    results: list[Tensor] = [torch.empty(0)] * len(texts)

    def run(place: int) -> None:
        trees = TreeModel(llama, 64)
        for _ in range(20):
            results[place] = trees.forward(texts[place])
            trees.rollback(0)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, one) for result, one in zip(results, expected, strict=True))
    assert llama.config._attn_implementation == "eager"


def test_buffers_are_freed_with_their_owner(llama: PreTrainedModel) -> None:
    trees = TreeModel(llama, 16)
    trees.forward([1])
    keys = weakref.ref(trees._layers[0].keys)
    gc.disable()
    try:
        del trees
        assert keys() is None
    finally:
        gc.enable()


def test_the_attention_is_for_forwards_of_ours_only(llama: PreTrainedModel) -> None:
    llama.set_attn_implementation(ATTENTION)
    with pytest.raises(RuntimeError, match=r"is for TreeModel\.forward only"):
        llama(torch.tensor([PROMPT]))


# ---- What is refused


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([], None, "tokens: expected at least one, got none"),
        ([[1, 2], [3, 4]], None, "tokens: expected ints of shape [n], got int64 of shape [2, 2]; a TreeModel"),
        (torch.tensor([[1, 2]]), None, "tokens: expected ints of shape [n], got int64 of shape [1, 2]; a TreeModel"),
        ([1.0], None, "tokens: expected ints of shape [n], got float32 of shape [1]"),
        (7, None, "tokens: expected a sequence of ints, got int"),
        (["a"], None, "tokens: expected a sequence of ints, got list"),
        ([1, 32, 2], None, "tokens: expected ids from 0 to 31, the vocabulary of LlamaForCausalLM, got 32 at place 1"),
        ([-1], None, "tokens: expected ids from 0 to 31, the vocabulary of LlamaForCausalLM, got -1 at place 0"),
        ([1] * 6, None, "tokens: expected at most 5, which is how many rows are free (capacity 9, 2 committed, 2 pend"),
        ([1, 2, 3], [0, 1], "parents: expected one for each of 3 tokens, got 2"),
        ([1, 2], [1, 3], "parents: expected an earlier node or -1 for node 3, got 3"),
        ([1, 2], [-2, 0], "parents: expected an earlier node or -1 for node 2, got -2"),
        ([1, 2], [[0, 1]], "parents: expected ints of shape [n], got int64 of shape [1, 2]"),
    ],
)
def test_bad_tokens_and_parents(llama: PreTrainedModel, tokens: Any, parents: Any, message: str) -> None:
    trees = TreeModel(llama, 9)
    trees.forward([1, 2])
    trees.commit([0, 1])
    trees.forward([3, 4])
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        trees.forward(tokens, parents)
    assert (trees.length, trees.nodes) == (2, 2)
    assert len(trees.forward([1] * 5)) == 5  # to the last row


def test_bad_logits_to_keep(llama: PreTrainedModel) -> None:
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"logits_to_keep: expected None or 1 to 3, .*got {count}"):
            TreeModel(llama, 9).forward([1, 2, 3], logits_to_keep=count)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([1], "path: expected a root, got node 1, whose parent is 0"),
        ([0, 2], "path: expected a child of node 0, got node 2, whose parent is 1"),
        ([0, 1, 1], "path: expected a child of node 1, got node 1, whose parent is 0"),
        ([0, 3], "path: expected a child of node 0, got node 3, whose parent is -1"),
        ([4], "path: expected nodes of the pending tree, which has 4, got 4"),
        ([-1], "path: expected nodes of the pending tree, which has 4, got -1"),
        ([[0, 1]], "path: expected ints of shape [n], got int64 of shape [1, 2]"),
    ],
)
def test_bad_paths(llama: PreTrainedModel, path: Any, message: str) -> None:
    trees = TreeModel(llama, 9)
    trees.forward([1, 2, 3, 4], [-1, 0, 1, -1])
    with pytest.raises(ValueError, match=re.escape(message)):
        trees.commit(path)
    assert (trees.length, trees.nodes) == (0, 4)
    trees.commit([])
    assert (trees.length, trees.nodes) == (0, 0)


@pytest.mark.parametrize("length", [-1, 3, 1.0, True])
def test_bad_rollbacks(llama: PreTrainedModel, length: Any) -> None:
    trees = TreeModel(llama, 9)
    trees.forward([1, 2])
    trees.commit([0, 1])
    with pytest.raises((TypeError, ValueError), match="length: expected"):
        trees.rollback(length)
    assert trees.length == 2


@pytest.mark.parametrize("capacity", [0, -3, 2.5, True])
def test_bad_capacities(llama: PreTrainedModel, capacity: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="capacity: expected"):
        TreeModel(llama, capacity)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bloom", "model: BloomForCausalLM does not honour transformers' AttentionInterface"),
        ("mamba", "model: expected layers of full_attention and sliding_attention, and MambaForCausalLM has linear"),
        ("gpt_oss", "layer 0 (GptOssAttention) hands s_aux to the attention, which tree_attention does not know"),
    ],
)
def test_models_that_cannot_be_run(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TreeModel(tiny_model(name), 16).forward([1])


def test_what_is_no_causal_language_model() -> None:
    with pytest.raises(TypeError, match="model: expected a transformers PreTrainedModel, got Linear"):
        TreeModel(torch.nn.Linear(2, 2), 4)  # type: ignore[arg-type]
    config = T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match="model: expected a decoder-only causal language model, got T5For"):
        TreeModel(AutoModelForSeq2SeqLM.from_config(config), 4)


def test_a_model_that_ignores_the_registered_attention(llama: PreTrainedModel) -> None:
    llama.get_submodule("model.layers.1.self_attn").forward = lambda hidden_states, **_: (hidden_states, None)
    trees = TreeModel(llama, 9)
    with pytest.raises(ValueError, match="model: LlamaForCausalLM called the registered attention in 1 of 2 layers"):
        trees.forward([1])
    assert trees.nodes == 0


def test_a_mask_that_the_model_changes(llama: PreTrainedModel) -> None:
    def change(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": torch.zeros(1, 1, 1, 1)}

    llama.get_submodule("model.layers.1").register_forward_pre_hook(change, with_kwargs=True)
    message = r"layer 1 \(LlamaAttention\): expected a mask that transformers makes, got one that the model makes"
    with pytest.raises(ValueError, match=message):
        TreeModel(llama, 9).forward([1])


@pytest.mark.parametrize("capacity", [16, 24])
def test_a_mask_of_something_else(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that see ahead from position 17 on: out of reach for a small cache."""
    model = tiny_model()
    modeling = sys.modules[type(model).__module__]
    create = modeling.create_causal_mask

    def prefix_visible(*args: Any, **kwargs: Any) -> Any:
        return create(*args, or_mask_function=lambda batch, head, query, key: (query >= 17) & (key >= 17), **kwargs)

    monkeypatch.setattr(modeling, "create_causal_mask", prefix_visible)
    trees = TreeModel(model, capacity)
    if capacity == 16:
        trees.forward([1, 2])
        return
    with pytest.raises(ValueError, match="causality and at most a sliding window; position 17 sees"):
        trees.forward([1, 2])


@pytest.mark.parametrize(
    ("rope", "turn"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 64),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 32,
            },
            32,
        ),
    ],
)
def test_frequencies_that_depend_on_the_length_of_the_text(rope: dict[str, Any], turn: int) -> None:
    model = tiny_model("llama", max_position_embeddings=64, rope_parameters={"rope_theta": 10000.0, **rope})
    with pytest.raises(ValueError, match=f"capacity: expected at most {turn} rows, .*got {turn + 1}"):
        TreeModel(model, turn + 1)
    decoder = Reference(model, turn)
    chance = random.Random(0)
    decoder.forward([chance.randrange(VOCABULARY) for _ in range(turn)], None)


def test_without_transformers_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['transformers'] = None; import specbranch_ext.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs transformers 5.17 or newer: pip install 'specbranch[transformers]'" in done.stderr.splitlines()[-1]
