"""Corpora: texts that drafts by retrieval copy from, built, kept in files, mapped, and refused by name."""

from __future__ import annotations

import copy
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from specbranch import Corpus, SpecBranch, SpecBranchError
from specbranch import corpus as module
from specbranch.core.files import tensors_header
from specbranch.core.suffix_index import SuffixIndex

PROMPT = "def read_lines(path):\n    with open(path) as file:\n"
NEW = 48
SAMPLINGS: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}]


@pytest.fixture(scope="session")
def tokenizer(bundled_pair: SpecBranch) -> PreTrainedTokenizerBase:
    assert bundled_pair.tokenizer is not None
    return bundled_pair.tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "some.py"
    file.write_text("import os\n\n\ndef cwd() -> str:\n    return os.getcwd()\n", encoding="utf-8")
    return file


@pytest.fixture
def saved(text: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    file = tmp_path / "code.safetensors"
    Corpus.build(text, tokenizer).save(file)
    return file


def refused(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(SpecBranchError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- building


def test_texts_are_tokenised_one_after_the_other(tmp_path, tokenizer):
    texts = ["def f(x):\r\n    return x\n", "", "\ufeffclass Ünï:\n    pass"]
    files = [tmp_path / f"{number}.py" for number in range(3)]
    for file, one in zip(files, texts, strict=True):
        file.write_bytes(one.encode())
    seen: list[str] = []
    corpus = Corpus.build(files, tokenizer, texts=["x = 1"], before=seen.append)
    parts = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in (texts[0], texts[2][1:], "x = 1")]
    end = tokenizer.eos_token_id
    assert corpus.index.tokens.tolist() == [*parts[0], end, *parts[1], end, *parts[2]]
    assert corpus.index.order == SuffixIndex(corpus.index.tokens).order
    assert corpus.files == ("0.py", "1.py", "2.py")
    assert seen == ["0.py", "1.py", "2.py", "the index"]
    assert len(corpus) == len(corpus.index)


def test_a_long_text_is_the_sum_of_its_lines(tmp_path, tokenizer, monkeypatch):
    """It is tokenised in pieces that end with lines, and so the tokens are those of the whole."""
    file = tmp_path / "long.py"
    lines = [f"value_{number} = compute({number})\n" for number in range(400)]
    file.write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(module, "PIECE", 500)
    corpus = Corpus.build(file, tokenizer)
    assert corpus.index.tokens.tolist() == tokenizer("".join(lines), add_special_tokens=False)["input_ids"]


def test_a_text_without_lines_is_cut(tmp_path, tokenizer, monkeypatch):
    file = tmp_path / "one_line.txt"
    file.write_text("word " * 1000, encoding="utf-8")
    monkeypatch.setattr(module, "PIECE", 100)
    assert tokenizer.decode(Corpus.build(file, tokenizer).index.tokens.tolist()) == "word " * 1000


def test_without_a_token_that_ends_texts_the_one_that_begins_them_stands_between(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = None
    tokens = Corpus.build([], other, texts=["a", "b"]).index.tokens.tolist()
    assert tokens[1:2] == ([] if other.bos_token_id is None else [other.bos_token_id])
    other.bos_token = None
    assert len(Corpus.build([], other, texts=["a", "b"])) == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a\xff\xfe", "some.txt: expected text in UTF-8 (invalid start byte)"),
        ("text".encode("utf-16"), "some.txt: expected text in UTF-8 (invalid start byte)"),
        (b"text\0text", "some.txt: expected text, found a NUL byte"),
        (b"", "the corpus is empty: expected a text, found no token in "),
    ],
)
def test_files_that_are_no_text_are_refused_by_name(tmp_path, tokenizer, content, expected):
    file = tmp_path / "some.txt"
    file.write_bytes(content)
    said = refused(Corpus.build, file, tokenizer)
    assert expected in said
    assert str(file) in said


def test_what_is_not_there_is_refused_by_name(tmp_path, tokenizer):
    missing = tmp_path / "none.txt"
    assert refused(Corpus.build, [missing], tokenizer) == f"{missing}: No such file or directory"
    assert refused(Corpus.build, [tmp_path], tokenizer) == f"{tmp_path}: Is a directory"
    assert "found no token in no files" in refused(Corpus.build, [], tokenizer)
    assert "texts[0] is 3; expected text" in refused(Corpus.build, [], tokenizer, texts=[3])
    assert "texts[0]: cannot be tokenized: " in refused(Corpus.build, [], tokenizer, texts=["\ud800"])


def test_more_than_fits_is_refused_before_it_is_read(tmp_path, tokenizer, monkeypatch):
    file = tmp_path / "huge.txt"
    with file.open("wb") as stream:
        stream.truncate(2**42)
    monkeypatch.setattr(module, "available_memory", lambda: 3 * 2**30)
    said = refused(Corpus.build, file, tokenizer)
    assert said == (
        f"the corpus has about {2**40} tokens; its index takes 32768.00 GiB while it is built, "
        "and 3.00 GiB are available"
    )


def test_more_than_fits_is_refused_when_its_tokens_are_known(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda: 32 * 99)
    assert "the corpus has about 199 tokens; " in refused(Corpus.build, [], tokenizer, texts=["x"] * 100)


def test_available_memory_is_some_of_this_machine():
    available = module.available_memory()
    assert available is None or 2**20 < available < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---- files


def test_a_saved_corpus_is_the_one_that_was_built(saved, text, tokenizer):
    built, loaded = Corpus.build(text, tokenizer), Corpus.load(saved)
    assert loaded.index.tokens == built.index.tokens
    assert loaded.index.order == built.index.order
    assert loaded.index.check()
    assert (loaded.tokenizer, loaded.files) == (built.tokenizer, built.files) == (built.tokenizer, ("some.py",))
    assert (loaded.name, built.name) == (str(saved), "some.py")


def test_the_same_corpus_is_the_same_file(saved, tmp_path):
    again = tmp_path / "again.safetensors"
    corpus = Corpus.load(saved)
    corpus.save(again)
    assert again.read_bytes() == saved.read_bytes()
    corpus.save(saved)  # over what it is mapped from
    assert again.read_bytes() == saved.read_bytes()
    assert str(tmp_path).encode() not in saved.read_bytes()  # no folders


def test_a_file_of_something_else_stays(saved, tmp_path):
    for other in ("notes.txt", "model.safetensors"):
        file = tmp_path / other
        if other.endswith("txt"):
            file.write_text("mine")
        else:
            save_file({"weight": torch.zeros(3)}, file)
        before = file.read_bytes()
        said = refused(Corpus.load(saved).save, file)
        assert said == f"{file} is not a corpus: it stays as it is; choose another file"
        assert file.read_bytes() == before


def test_an_interrupted_write_leaves_what_was_there(saved, tokenizer, monkeypatch):
    before = saved.read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("specbranch.core.files._to_disk", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Corpus.build([], tokenizer, texts=["something else"]).save(saved)
    assert saved.read_bytes() == before
    assert sorted(file.name for file in saved.parent.iterdir()) == ["code.safetensors", "some.py"]


def changed(saved: Path, **metadata: str) -> None:
    """The file with other metadata."""
    data = saved.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] |= metadata
    saved.write_bytes(tensors_header(header) + data[end:])


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda file: file.write_text("some text"), "not a readable corpus: "),
        (lambda file: file.write_bytes(b""), "not a readable corpus: "),
        (lambda file: file.unlink(), "not a readable corpus: "),
        (lambda file: os.truncate(file, file.stat().st_size - 4), "not a readable corpus: "),
        (lambda file: os.truncate(file, 40), "not a readable corpus: "),
        (
            lambda file: save_file({"weight": torch.zeros(3)}, file),
            "expected a corpus of the format specbranch-corpus-1",
        ),
        (
            lambda file: changed(file, format="specbranch-corpus-2"),
            "expected a corpus of the format specbranch-corpus-1; this one is specbranch-corpus-2: build it anew",
        ),
        (lambda file: changed(file, tokens="7"), "not a readable corpus: it has "),
        (lambda file: changed(file, files="?"), "not a readable corpus: "),
        (
            lambda file: save_file({"tokens": torch.zeros(3)}, file, {"format": "specbranch-corpus-1"}),
            "not a readable corpus: ",
        ),
        (
            lambda file: save_file(
                {"tokens": torch.zeros(3), "order": torch.zeros(3)}, file, {"format": "specbranch-corpus-1"}
            ),
            "not a readable corpus: tokens: expected a contiguous buffer of int32",
        ),
    ],
)
def test_files_that_are_no_corpus_are_refused_by_name(saved, harm, expected):
    harm(saved)
    assert re.match(f"{re.escape(str(saved))}: {expected}", refused(Corpus.load, saved))


def test_a_file_is_mapped_and_not_read(tmp_path):
    """One of 1.6 GB, of which nothing is on the disk, takes no memory."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    tokens, file = 200_000_000, tmp_path / "large.safetensors"
    tensor: dict[str, Any] = {"dtype": "I32", "shape": [tokens]}
    metadata = {"format": module.FORMAT, "tokens": str(tokens), "tokenizer": "t", "vocabulary": "v", "files": "[]"}
    places = {"tokens": [0, 4 * tokens], "order": [4 * tokens, 8 * tokens]}
    header = {name: {**tensor, "data_offsets": place} for name, place in places.items()}
    head = tensors_header({"__metadata__": metadata, **header})
    file.write_bytes(head)
    os.truncate(file, len(head) + 8 * tokens)
    before = resident()
    corpus = Corpus.load(file)
    assert len(corpus) == tokens
    assert resident() - before < 2**26


# ---- engines


def test_a_corpus_is_copied_from_and_the_text_stays(bundled_pair, tokenizer, tmp_path):
    alone = [bundled_pair.generate(PROMPT, max_new_tokens=NEW, method="autoregressive", **each) for each in SAMPLINGS]
    file = tmp_path / "copied.py"
    file.write_text(PROMPT + alone[0].text, encoding="utf-8")
    corpus = Corpus.build(file, tokenizer)
    corpus.save(tmp_path / "saved.safetensors")
    for given in (corpus, file, str(tmp_path / "saved.safetensors"), [Corpus.build([], tokenizer, texts=["x"]), file]):
        engine = SpecBranch(bundled_pair.target, tokenizer=tokenizer, retrieval=True, corpus=given)
        for sampling, expected in zip(SAMPLINGS, alone, strict=True):
            for method in ("specbranch", "speculative"):
                found = engine.generate(PROMPT, max_new_tokens=NEW, method=method, **sampling)
                assert found.tokens == expected.tokens
                if not sampling and method == "speculative":  # which goes by no measured costs
                    assert found.stats.retrieved_accepted > NEW // 2
                    assert found.stats.target_forwards < NEW // 2


def test_a_damaged_corpus_ends_the_text_that_finds_it_so_by_name(
    bundled_pair: SpecBranch, tokenizer: PreTrainedTokenizerBase, saved: Path
) -> None:
    """What is mapped is not read before a look-up comes upon it."""
    corpus = Corpus.load(saved)
    tokens = np.array(corpus.index.tokens)
    damaged = SuffixIndex.mapped(tokens, np.full(len(tokens), len(tokens) + 9, dtype=np.int32))
    engine = SpecBranch(bundled_pair.target, tokenizer=tokenizer, retrieval=True, corpus=replace(corpus, index=damaged))
    with pytest.raises(ValueError, match=f"corpus {re.escape(str(saved))}: damaged: order: entry"):
        engine.generate([1, 2, 3], max_new_tokens=4)


def test_engines_with_a_draft_share_a_corpus(bundled_pair, tokenizer):
    expected = bundled_pair.generate(PROMPT, max_new_tokens=NEW, method="autoregressive")
    corpus = Corpus.build([], tokenizer, texts=[PROMPT + expected.text])
    options: dict[str, Any] = {"tokenizer": tokenizer, "corpus": corpus, "draft_context": "all"}
    engines = [SpecBranch(bundled_pair.target, bundled_pair.draft, **options) for _ in range(2)]
    for engine in engines:
        assert engine.corpora == [corpus]
        assert engine.generate(PROMPT, max_new_tokens=NEW).tokens == expected.tokens
        found = engine.generate(PROMPT, max_new_tokens=NEW, method="speculative", retrieval=True)
        assert found.tokens == expected.tokens
        assert found.stats.retrieved_accepted > 0
        without = engine.generate(PROMPT, max_new_tokens=NEW, retrieval=False)
        assert (without.tokens, without.stats.retrieved) == (expected.tokens, 0)
        assert engine.generate(PROMPT, max_new_tokens=NEW, method="autoregressive").tokens == expected.tokens


def test_text_files_become_one_corpus(bundled_pair, tokenizer, text, saved):
    engine = SpecBranch(bundled_pair.target, tokenizer=tokenizer, retrieval=True, corpus=[text, saved, str(text)])
    assert [corpus.files for corpus in engine.corpora] == [("some.py",), ("some.py", "some.py")]


def test_a_corpus_of_another_tokenizer_is_refused_by_name(bundled_pair, tokenizer, text):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["another"])
    other.name_or_path = "/models/another"
    corpus = Corpus.build(text, other)
    expected = (
        "corpus some.py has the tokens of another, whose vocabulary is not that of the target's tokenizer, target: "
        "build it with the target's"
    )
    assert refused(SpecBranch, bundled_pair.target, bundled_pair.draft, tokenizer=tokenizer, corpus=corpus) == expected
    corpus.save(text.with_name("other.safetensors"))
    path = text.with_name("other.safetensors")
    said = refused(SpecBranch.from_pretrained, "bundled", draft="bundled", corpus=path)
    assert said == expected.replace("some.py", str(path))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"retrieval": False}, "corpus has no effect with method 'specbranch' and retrieval False, which retrieve"),
        ({"method": "autoregressive"}, "corpus has no effect with method 'autoregressive' and retrieval 'auto', which"),
        ({"method": "autoregressive", "retrieval": True}, "corpus has no effect with method 'autoregressive' and"),
        ({"method": "specbranch-paper"}, "corpus has no effect with method 'specbranch-paper' and retrieval 'auto'"),
        (
            {"method": "specbranch-paper", "retrieval": True},
            "corpus has no effect with method 'specbranch-paper' and retrieval True, which retrieve nothing",
        ),
        (
            {"method": "speculative"},
            "corpus has no effect with method 'speculative' and retrieval 'auto': pass retrieval=True",
        ),
        ({"tokenizer": None}, "corpus needs the target's tokenizer: pass tokenizer="),
        ({"corpus": []}, "corpus is an empty list; expected a Corpus, or the path of one or of a text file"),
        ({"corpus": [3]}, "corpus is 3; expected a Corpus, the path of one or of a text file"),
        ({"corpus": "no/such/file"}, "no/such/file: No such file or directory"),
    ],
)
def test_what_has_no_effect_or_is_no_corpus_is_refused(bundled_pair, tokenizer, text, options, expected):
    given = {"tokenizer": tokenizer, "corpus": text, **options}
    assert refused(SpecBranch, bundled_pair.target, bundled_pair.draft, **given).startswith(expected)


def test_a_truncated_corpus_is_no_text(bundled_pair, tokenizer, saved):
    os.truncate(saved, saved.stat().st_size - 4)
    said = refused(SpecBranch, bundled_pair.target, bundled_pair.draft, tokenizer=tokenizer, corpus=saved)
    assert said.startswith(f"{saved}: not a readable corpus: ")


def test_a_draft_that_is_retrieval_cannot_be_without_it():
    said = refused(SpecBranch.from_pretrained, "bundled", draft="retrieval", retrieval=False)
    assert said == "draft is 'retrieval', but retrieval is False: expected 'auto' or True"
