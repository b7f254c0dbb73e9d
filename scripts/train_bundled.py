"""Train the bundled pair: a byte-level BPE tokenizer and two tiny Llama models, target and draft.

The text is the standard library of the Python that runs this script, so nothing is downloaded. The target is
trained by next-token prediction and the draft is distilled from it. A few files, fixed by name, are never
trained on; loss and agreement are measured on those and written to CARD.json beside the two models.

    python scripts/train_bundled.py --out python/specbranch/bundled
    python scripts/train_bundled.py --out python/specbranch/bundled --resume --learning-rate 1e-3  # a little more

The schedule follows the clock, so a slower machine takes fewer steps and gives other weights: data, order and
initialisation are seeded, the number of steps is not.

Needs torch, transformers, tokenizers and safetensors.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import random
import shlex
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048
CONTEXT = 1024  # tokens
SHORT_WINDOW = 256  # tokens; cheaper than windows of CONTEXT tokens, which every fourth step sees
TARGET_TOKENS_PER_STEP = 2048
DRAFT_TOKENS_PER_STEP = 1024

HIDDEN_SIZE = 128
TARGET_INTERMEDIATE_SIZE = 192
# Training starts shallow, where a step is cheap: (fraction of the time from which it holds, layers).
TARGET_GROWTH = ((0.0, 4), (0.22, 8), (0.45, 16))

DRAFT_SOURCE_LAYERS = (0, 12)  # two of the four (0, 4, 8, 12) that training began with
DRAFT_INTERMEDIATE_SIZE = 384
HARD_LABEL_WEIGHT = 0.5  # share of the target's argmax (cross entropy) in the draft's loss; the rest is KL

DRAFT_LEARNING_RATE = 2e-3
WARM_UP_STEPS = 50

# Files that every supported Python has and that are never trained on.
HELD_OUT = (
    "asyncio/queues.py", "bisect.py", "calendar.py", "colorsys.py", "concurrent/futures/thread.py",
    "contextlib.py", "csv.py", "email/header.py", "fractions.py", "graphlib.py", "heapq.py", "html/parser.py",
    "http/cookies.py", "json/decoder.py", "logging/handlers.py", "queue.py", "sched.py", "shelve.py",
    "statistics.py", "textwrap.py", "timeit.py", "unittest/case.py", "wave.py", "zipapp.py",
)  # fmt: skip
# Tests, applications, tables (encodings, pydoc_data) and what others installed.
EXCLUDED = {
    "__phello__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
MACHINE_DEPENDENT = ("config-", "_sysconfigdata")  # beginnings of names


def library_files(root: Path) -> list[str]:
    """The .py files to learn from, sorted and relative to the standard library's folder; none held out."""
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        excluded = not EXCLUDED.isdisjoint(relative.parts) or relative.parts[0].startswith(MACHINE_DEPENDENT)
        if not excluded and relative.as_posix() not in HELD_OUT:
            files.append(relative.as_posix())
    return sorted(files)


def train_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE with VOCABULARY entries; any text round-trips: all 256 bytes are in the alphabet."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def for_transformers(bpe: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one int64 [N] tensor, each preceded by the end-of-text token."""
    ids: list[int] = []
    for text in texts:
        ids += [tokenizer.eos_token_id, *tokenizer.backend_tokenizer.encode(text).ids]
    return torch.tensor(ids)


def new_model(layers: int, intermediate_size: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.04,
        )
    )


def deepened(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A model that computes the same function with twice the layers.

    Behind every layer comes a copy of it whose two output projections are zero, so that it adds nothing yet.
    """
    deep = new_model(2 * model.config.num_hidden_layers, TARGET_INTERMEDIATE_SIZE)
    weights = {}
    for name, value in model.state_dict().items():
        if not name.startswith("model.layers."):
            weights[name] = value
            continue
        index, rest = name.removeprefix("model.layers.").split(".", 1)
        is_output = "o_proj" in rest or "down_proj" in rest
        weights[f"model.layers.{2 * int(index)}.{rest}"] = value
        weights[f"model.layers.{2 * int(index) + 1}.{rest}"] = torch.zeros_like(value) if is_output else value
    deep.load_state_dict(weights)
    return deep


def shallow_copy(target: LlamaForCausalLM) -> LlamaForCausalLM:
    """A draft that starts with the target's embedding, final norm and layers DRAFT_SOURCE_LAYERS.

    Its MLPs are wider than the target's; the additional neurons start silent.
    """
    draft = new_model(len(DRAFT_SOURCE_LAYERS), DRAFT_INTERMEDIATE_SIZE)
    draft.model.embed_tokens.load_state_dict(target.model.embed_tokens.state_dict())
    draft.model.norm.load_state_dict(target.model.norm.state_dict())
    for layer, source in zip(draft.model.layers, DRAFT_SOURCE_LAYERS, strict=True):
        layer.mlp.down_proj.weight.data.zero_()
        for name, value in target.model.layers[source].named_parameters():
            corner = tuple(slice(size) for size in value.shape)
            layer.get_parameter(name).data[corner] = value.data
    return draft


def layers_at(progress: float) -> int:
    """The target's layers when this fraction of the time has passed."""
    return max(layers for since, layers in TARGET_GROWTH if progress >= since)


def batches(
    stream: torch.Tensor, minutes: float, tokens_per_step: int, seed: int
) -> Iterator[tuple[float, torch.Tensor]]:
    """Yields (fraction of the time passed, batch) until the time is over.

    A batch is int64 [tokens_per_step // length, length + 1]: random windows of the stream (int64 [N]).
    """
    generator = torch.Generator().manual_seed(seed)
    start = time.monotonic()
    for step in itertools.count(1):
        elapsed = time.monotonic() - start
        if elapsed >= 60 * minutes:
            return
        length = CONTEXT if step % 4 == 0 else SHORT_WINDOW
        starts = torch.randint(len(stream) - length, (tokens_per_step // length,), generator=generator)
        yield elapsed / (60 * minutes), torch.stack([stream[i : i + length + 1] for i in starts])


class Optimizer:
    """AdamW with gradient clipping, a short warm-up and a cosine decay over the whole training time."""

    def __init__(self, model: LlamaForCausalLM, peak: float) -> None:
        self.peak = peak
        self.parameters = list(model.parameters())
        matrices = [p for p in self.parameters if p.dim() > 1]
        vectors = [p for p in self.parameters if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), foreach=True)
        self.steps = 0

    def step(self, loss: torch.Tensor, progress: float) -> None:
        """Follow the loss's gradient; `progress` is the fraction of the training time that has passed."""
        self.steps += 1
        warm_up = min(1.0, self.steps / WARM_UP_STEPS)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.adamw.param_groups:
            group["lr"] = self.peak * warm_up * decay
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)


class Log:
    """Prints a smoothed loss every half minute and calls `checkpoint` every five minutes."""

    def __init__(self, name: str, tokens_per_step: int, checkpoint: Callable[[LlamaForCausalLM], None]) -> None:
        self.name, self.tokens_per_step, self.checkpoint = name, tokens_per_step, checkpoint
        self.steps, self.loss = 0, float("nan")
        self.start = self.printed = self.saved = time.monotonic()

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    def __call__(self, model: LlamaForCausalLM, loss: float, progress: float) -> None:
        self.steps += 1
        self.loss = loss if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss
        now = time.monotonic()
        if now - self.printed > 30:
            self.printed = now
            speed = self.tokens / (now - self.start)
            layers = model.config.num_hidden_layers
            print(f"{self.name} {progress:5.1%}  step {self.steps}  layers {layers}  loss {self.loss:.3f}  "
                  f"{speed:.0f} tokens/s", flush=True)  # fmt: skip
        if now - self.saved > 300:
            self.saved = now
            self.checkpoint(model)


def train_target(
    model: LlamaForCausalLM, batch_stream: Iterator[tuple[float, torch.Tensor]], peak: float, log: Log
) -> LlamaForCausalLM:
    """Train the target to predict the next token; returns it, grown to its full depth."""
    optimizer = Optimizer(model, peak)
    for progress, batch in batch_stream:
        if model.config.num_hidden_layers < layers_at(progress):
            model = deepened(model)
            optimizer = Optimizer(model, peak)
        logits = model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.step(loss, progress)
        log(model, loss.item(), progress)
    while model.config.num_hidden_layers < layers_at(1.0):  # the run was too short to reach every stage
        model = deepened(model)
    return model


def distil_draft(
    target: LlamaForCausalLM, batch_stream: Iterator[tuple[float, torch.Tensor]], peak: float, log: Log
) -> LlamaForCausalLM:
    """A draft trained on the target's distribution and on its argmax over the same text."""
    draft = shallow_copy(target)
    optimizer = Optimizer(draft, peak)
    for progress, batch in batch_stream:
        with torch.no_grad():
            target_logits = target(batch[:, :-1], use_cache=False).logits.flatten(0, 1)
        draft_logits = draft(batch[:, :-1], use_cache=False).logits.flatten(0, 1)
        target_logs, draft_logs = target_logits.log_softmax(-1), draft_logits.log_softmax(-1)
        divergence = F.kl_div(draft_logs, target_logs, log_target=True, reduction="batchmean")
        hard = F.cross_entropy(draft_logits, target_logits.argmax(-1))
        loss = (1 - HARD_LABEL_WEIGHT) * divergence + HARD_LABEL_WEIGHT * hard
        optimizer.step(loss, progress)
        log(draft, loss.item(), progress)
    return draft


@torch.inference_mode()
def evaluate(target: LlamaForCausalLM, draft: LlamaForCausalLM, streams: list[torch.Tensor]) -> dict[str, float]:
    """Loss (nats a token) of both models and the share of positions where their argmax is the same.

    `streams`: one int64 [N] per held-out file; each is cut into windows of CONTEXT tokens.
    """
    target_loss = draft_loss = 0.0
    agreed = right = count = 0
    for piece in (piece for stream in streams for piece in stream.split(CONTEXT) if len(piece) > 1):
        context, following = piece[None, :-1], piece[1:]
        target_logits, draft_logits = target(context).logits[0], draft(context).logits[0]
        target_loss += F.cross_entropy(target_logits, following, reduction="sum").item()
        draft_loss += F.cross_entropy(draft_logits, following, reduction="sum").item()
        agreed += int((target_logits.argmax(-1) == draft_logits.argmax(-1)).sum())
        right += int((target_logits.argmax(-1) == following).sum())
        count += len(following)
    return {
        "tokens": count,
        "target_loss": round(target_loss / count, 4),
        "draft_loss": round(draft_loss / count, 4),
        "target_accuracy": round(right / count, 4),
        "greedy_agreement": round(agreed / count, 4),
    }


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the weights as float16; config.json asks for float32, in which they are meant to be loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = {name: value.to(torch.float16) for name, value in model.state_dict().items()}
    del weights["lm_head.weight"]  # tied to the embedding
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file leaves it to its owner only


def load(folder: Path) -> LlamaForCausalLM:
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def describe(folder: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    model = load(folder)
    return {
        "layers": model.config.num_hidden_layers,
        "hidden_size": model.config.hidden_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "runs": runs,
    }


def run_of(log: Log, minutes: float) -> dict[str, Any]:
    command = shlex.join(["python", "scripts/train_bundled.py", *sys.argv[1:]])
    return {"command": command, "minutes": minutes, "steps": log.steps, "tokens": log.tokens}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the bundled pair on Python's standard library.")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder that receives target/, draft/ and CARD.json")
    add("--minutes", type=float, default=35, help="training time of the target (default 35)")
    add("--draft-minutes", type=float, default=14, help="training time of the draft (default 14)")
    add("--learning-rate", type=float, default=3e-3, help="the target's peak learning rate (default 0.003)")
    add("--resume", action="store_true", help="start with the target that is in --out already")
    add("--threads", type=int, default=1, help="torch threads (default 1)")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    root = Path(sysconfig.get_path("stdlib"))
    names = library_files(root)
    random.Random(arguments.seed).shuffle(names)
    texts = [(root / name).read_text(encoding="utf-8", errors="ignore") for name in names]
    held_out = [(root / name).read_text(encoding="utf-8") for name in HELD_OUT if (root / name).exists()]
    target_folder, draft_folder = arguments.out / "target", arguments.out / "draft"
    card_file = arguments.out / "CARD.json"
    earlier_runs: list[dict[str, Any]] = []
    if arguments.resume:
        if card_file.exists():
            earlier_runs = json.loads(card_file.read_text(encoding="utf-8"))["target"]["runs"]
        bpe = tokenizers.Tokenizer.from_file(str(target_folder / "tokenizer.json"))
        first = load(target_folder).train()
    else:
        bpe = train_tokenizer(texts)
        first = new_model(layers_at(0.0), TARGET_INTERMEDIATE_SIZE)
    tokenizer = for_transformers(bpe)
    stream = token_stream(tokenizer, texts)
    size = sum(len(text.encode()) for text in texts)
    print(f"{len(texts)} files, {size / 1e6:.2f} MB, {len(stream):,} tokens", flush=True)

    target_log = Log("target", TARGET_TOKENS_PER_STEP, lambda model: save(model, tokenizer, target_folder))
    target_batches = batches(stream, arguments.minutes, TARGET_TOKENS_PER_STEP, arguments.seed)
    target = train_target(first, target_batches, arguments.learning_rate, target_log)
    save(target, tokenizer, target_folder)
    target = load(target_folder)  # the rounded weights are the ones that the draft must follow
    draft_log = Log("draft", DRAFT_TOKENS_PER_STEP, lambda model: save(model, tokenizer, draft_folder))
    draft_batches = batches(stream, arguments.draft_minutes, DRAFT_TOKENS_PER_STEP, arguments.seed)
    draft = distil_draft(target, draft_batches, DRAFT_LEARNING_RATE, draft_log)
    save(draft, tokenizer, draft_folder)

    held_out_streams = [token_stream(tokenizer, [text]) for text in held_out]
    results = evaluate(target, load(draft_folder), held_out_streams)
    print(json.dumps(results, indent=2))
    card = {
        "data": "the .py sources of Python's standard library, without tests, applications and tables",
        "license": "weights: Apache-2.0, as the rest of this package; the sources that they were trained on "
        "are under the PSF License Agreement and are not contained here",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "files": len(texts),
        "training_tokens": len(stream),
        "vocabulary": VOCABULARY,
        "context": CONTEXT,
        "stored_dtype": "float16",
        "target": describe(target_folder, [*earlier_runs, run_of(target_log, arguments.minutes)]),
        "draft": describe(draft_folder, [run_of(draft_log, arguments.draft_minutes)]),
        "held_out": {"files": list(HELD_OUT), **results},
    }
    card_file.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
