"""Measuring: our methods, transformers' own, vLLM and llama.cpp, on the same prompts, interleaved."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from specbranch.cli.arguments import sampling_options
from specbranch.cli.bench import llama_peer, memory, report, vllm_peer
from specbranch.cli.bench.masked import Asked
from specbranch.cli.bench.peers import Peers, PeerText
from specbranch.cli.bench.process import ROOM, PeerProcess
from specbranch.cli.constraint import constraint_for
from specbranch.cli.drafting import drafting_options, method_of
from specbranch.cli.machine import describe_measuring_machine
from specbranch.cli.messages import complain, one_line
from specbranch.cli.terminal import Progress
from specbranch.core.errors import SpecBranchError
from specbranch.core.generation import GenerationFailed
from specbranch.policies.methods import METHODS, make_policy
from specbranch.runtime.checkpoint import is_gguf
from specbranch.runtime.loading import load_model
from specbranch.runtime.packed import weight_format
from specbranch.runtime.sources import resolve
from specbranch.text.encoding import encode
from specbranch.text.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specbranch import SpecBranch

WARM_UP_TOKENS = 16
IN_A_PROCESS = (*vllm_peer.NAMES, *llama_peer.NAMES)  # peers that have one of their own


@dataclass(frozen=True)
class Output:
    """New tokens of one run, how many of them came after the prefill and what that took; stats if it is ours.

    Our prefill leaves the prompt's last token to the first round; transformers' gives the first token.
    """

    tokens: list[int]
    decoded_tokens: int
    prefill_seconds: float
    stats: dict[str, Any] | None = None
    seconds: float | None = None  # of a run in another process, measured there


@dataclass(frozen=True)
class Contender:
    """Something that generates: `generate(asked, max_new_tokens)`. together: where it can have several prompts at once,
    decodes them; what it returns then gives each text in turn, as `generate` would."""

    name: str
    generate: Callable[[Asked, int], Output]
    comparable: bool  # its text can be compared with autoregressive's
    together: Callable[[list[Asked], int], Callable[[Asked, int], Output]] | None = None


class Contenders:
    """What runs, by name: methods and peers."""

    def __init__(self, engine: SpecBranch, args: argparse.Namespace) -> None:
        self._engine, self._greedy = engine, args.temperature == 0
        self._llama_comparable = self._greedy and llama_peer.has_our_weights(args)
        self._options = sampling_options(args)
        del self._options["max_new_tokens"]
        self._peers = None
        # Whoever asks for retrieval asks it of the methods that can.
        given = drafting_options(args)
        self._never = [name for name in METHODS if not make_policy(name, given).may_retrieve]
        if set(args.peers) - set(IN_A_PROCESS):
            # A peer has the weights of the checkpoint, whatever we made of ours.
            models = {role: _as_stored(role, model, args) for role, model in engine.models.items()}
            self._peers = Peers(models["target"], models.get("draft"), args.threads)

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        """All that are loaded in this process."""
        theirs = () if self._peers is None else self._peers.models
        return (*self._engine.models.values(), *theirs)

    def named(self, names: Sequence[str], processes: Mapping[str, PeerProcess]) -> list[Contender]:
        """Contenders of these names. processes: of those that have one, by name."""
        return [self._named(name, processes) for name in names]

    def _named(self, name: str, processes: Mapping[str, PeerProcess]) -> Contender:
        if method_of(name) in METHODS:
            return Contender(name, partial(self._of_method, name), True, partial(self._together, name))
        comparable = self._llama_comparable if name in llama_peer.NAMES else self._greedy  # else they draw other noise
        if name in IN_A_PROCESS:
            write = processes[name].generate
        else:
            assert self._peers is not None
            write = partial(self._peers.generate, name)
        return Contender(name, partial(self._of_peer, write), comparable)

    def _options_of(self, name: str) -> dict[str, Any]:
        method = method_of(name)
        off = name != method or method in self._never
        return {"method": method, **self._options, **({"retrieval": False} if off else {})}

    def _of_method(self, name: str, asked: Asked, new_tokens: int) -> Output:
        options = {**self._options_of(name), "max_new_tokens": new_tokens, "constraint": asked.constraint}
        generation = self._engine.generate(asked.ids, **options)
        tokens, stats = generation.tokens, generation.stats.as_dict()
        return Output(tokens, len(tokens), stats["prefill_seconds"], stats)

    def _together(self, name: str, asked: list[Asked], new_tokens: int) -> Callable[[Asked, int], Output]:
        """Each text's share of the time is that of its tokens: the speed of each is that of all. Where it fails, each
        fails."""
        constraints = [each.constraint for each in asked]
        options = {**self._options_of(name), "max_new_tokens": new_tokens, "constraint": constraints}
        started = time.perf_counter()
        try:
            generations = self._engine.generate([each.ids for each in asked], **options)
        except Exception as error:
            return partial(_fail, error)
        seconds = time.perf_counter() - started
        each = seconds / sum(len(generation.tokens) for generation in generations)
        left = iter(generations)

        def next_one(asked: Asked, new_tokens: int) -> Output:
            generation = next(left)
            tokens, stats = generation.tokens, generation.stats.as_dict()
            share = each * len(tokens)
            return Output(tokens, len(tokens), min(stats["prefill_seconds"], share), stats, share)

        return next_one

    def _of_peer(self, write: Callable[..., PeerText], asked: Asked, new_tokens: int) -> Output:
        under = asked.request(self._engine)
        options = self._options if under is None else {**self._options, "under": under}
        text = write(asked.ids, max_new_tokens=new_tokens, **options)
        decoded = len(text.tokens) - text.first_tokens
        return Output(text.tokens, decoded, text.first_seconds, seconds=text.seconds)


def _fail(error: Exception, asked: Asked, new_tokens: int) -> Output:
    raise error


def _as_stored(role: str, model: PreTrainedModel, args: argparse.Namespace) -> PreTrainedModel:
    """A loaded model, once more if its weights are packed, unless they are stored so."""
    if not weight_format(model) or is_gguf(getattr(args, role)):
        return model
    return load_model(getattr(args, role), role, args.dtype, "cpu", None, args.trust_remote_code)


class Bench:
    """One benchmark run, lap by lap: who runs now, and the records so far. before: the report that it resumes."""

    def __init__(
        self,
        engine: SpecBranch,
        args: argparse.Namespace,
        request: dict[str, Any],
        resident_before_loading: int,
        before: dict[str, Any] | None,
    ) -> None:
        self.engine, self.args = engine, args
        self._known = Contenders(engine, args)
        self.lap, self.contenders = 0, list[Contender]()
        self.records: list[report.Record] = [] if before is None else list(before["records"])
        self._request = request
        self._resumed = 0 if before is None else before.get("resumed", 0) + 1
        self._learned = None if before is None else before.get("learned")
        self._resident_before_loading = resident_before_loading
        self._weights = memory.weight_bytes(*self._known.models)
        memory.make_resident(*self._known.models)
        self._machine = describe_measuring_machine()

    def measured(self, lap: int) -> int:
        """How many measurements of a lap there are."""
        return sum(report.lap(record) == lap for record in self.records)

    def start(self, name: str, prompts: Sequence[Prompt], progress: Progress) -> PeerProcess:
        """The process of a peer that has one, for texts as long as those of these prompts become.

        Raises ChildProcessError if it does not start, and if it cannot do what is asked.
        """
        progress.next(f"starting {name}")
        lengths = [0]
        for prompt in prompts:
            with suppress(SpecBranchError):
                lengths.append(len(encode(self.engine.tokenizer, prompt.text, chat=prompt.chat)))
        needed = max(lengths) + self.args.max_new_tokens + ROOM
        config = self.engine.target.config.get_text_config()
        positions = min(needed, getattr(config, "max_position_embeddings", needed))
        threads = self.args.threads or torch.get_num_threads()
        if name in llama_peer.NAMES:
            models = llama_peer.models(self.args)
            return llama_peer.LlamaServer(name, models, positions=positions, threads=threads)
        return self._start_vllm(name, prompts, positions, threads)

    def _start_vllm(self, name: str, prompts: Sequence[Prompt], positions: int, threads: int) -> vllm_peer.VllmEngine:
        """vLLM with our models."""
        target, args = self.engine.target, self.args
        stop = target.generation_config.eos_token_id
        vllm = vllm_peer.VllmEngine(
            name,
            {
                "target": resolve(args.target, "target"),
                "draft": None if self.engine.draft is None else resolve(args.draft, "draft"),
                "dtype": str(target.dtype).removeprefix("torch."),
                "max_model_len": positions,
                "kv_cache_memory_bytes": max(vllm_peer.LEAST_CACHE, 2 * memory.cache_bytes(self.engine, positions)),
                "trust_remote_code": args.trust_remote_code,
                "seed": args.seed,
            },
            cores=vllm_peer.cores(threads),
            stop=stop if isinstance(stop, list) else [] if stop is None else [stop],
        )
        if args.temperature > 0 and (usable := self._first_usable(prompts)):
            try:
                vllm.check_sampling(usable.ids)
            except BaseException:
                vllm.close()
                raise
        return vllm

    def begin_lap(
        self,
        lap: int,
        names: Sequence[str],
        prompts: Sequence[Prompt],
        progress: Progress,
        processes: Mapping[str, PeerProcess],
    ) -> None:
        """Who runs now, and a short run of everybody, on the first prompt that can be used, before anything is timed. A
        process that cannot do even that is reported and ended, and the others go on. A resumed run then knows what its
        engine had learned."""
        self.lap, self.contenders = lap, self._known.named(names, processes)
        usable = self._first_usable(prompts)
        for contender in list(self.contenders):
            if usable is None:
                break
            progress.next(f"warm-up: {contender.name}")
            try:
                contender.generate(usable, min(WARM_UP_TOKENS, self.args.max_new_tokens))
            except ChildProcessError as error:
                complain(f"error: {contender.name}: {one_line(error)}")
                processes[contender.name].close()
                self.contenders.remove(contender)
            except (SpecBranchError, GenerationFailed):  # under a constraint; which is told when it is measured
                pass
            progress.done()
        if self._learned is not None:
            self.engine.decoder.calibrator.restore(self._learned)
        self._learned = self.engine.decoder.calibrator.state()

    def _first_usable(self, prompts: Sequence[Prompt]) -> Asked | None:
        for prompt in prompts:
            with suppress(SpecBranchError):
                return self._asked(prompt)
        return None

    def _asked(self, prompt: Prompt) -> Asked:
        """Raises SpecBranchError for a prompt, or a constraint, that cannot be used."""
        ids = encode(self.engine.tokenizer, prompt.text, chat=prompt.chat)
        constraint = constraint_for(self.args, prompt)
        if constraint is not None:
            self.engine.prepare(constraint)
        return Asked(ids, constraint)

    def measure(self, prompts: Sequence[Prompt], first: int, progress: Progress) -> None:
        """Every contender on some prompts, the first of which has this number, in an order that rotates with it, so
        that none is always first. Our methods get them at once. Contenders that have records of them are skipped."""
        numbers = range(first, first + len(prompts))
        earlier = [r for r in self.records if r["prompt"] in numbers and report.lap(r) == self.lap]
        done = {record["name"] for record in earlier}
        left = [contender for contender in self.contenders if contender.name not in done]
        asked: dict[int, Asked] = {}
        for number, prompt in zip(numbers, prompts, strict=True):
            try:
                asked[number] = self._asked(prompt)
            except SpecBranchError as error:
                if self.lap == 0 and left:
                    complain(f"error: {prompt.id}: {one_line(error)}")
                self.records += [
                    _record(contender, prompt, self.lap) | {"error": one_line(error), "prompt": number}
                    for contender in left
                ]
        start = first // len(prompts) % len(self.contenders)
        records: list[report.Record] = []
        try:
            for contender in self.contenders[start:] + self.contenders[:start]:
                if contender in left and asked:
                    progress.next(f"{prompts[0].id}: {contender.name}")
                    records += self._measure_together(contender, prompts, first, asked, progress)
                    self._learned = self.engine.decoder.calibrator.state()  # of whole measurements
        finally:  # also when interrupted
            for number, one in asked.items():
                self._compare([r for r in (*earlier, *records) if r["prompt"] == number], one)
            self.records += records

    def _measure_together(
        self,
        contender: Contender,
        prompts: Sequence[Prompt],
        first: int,
        asked: Mapping[int, Asked],
        progress: Progress,
    ) -> list[report.Record]:
        """Records of the prompts that can be used, by number: all of them, or none."""
        records = []
        if len(asked) > 1 and contender.together is not None:
            contender = replace(contender, generate=contender.together([*asked.values()], self.args.max_new_tokens))
        for number, one in asked.items():
            records.append(self._measure_one(contender, prompts[number - first], one) | {"prompt": number})
            progress.done()
        return records

    def _measure_one(self, contender: Contender, prompt: Prompt, asked: Asked) -> report.Record:
        ids = asked.ids
        record = _record(contender, prompt, self.lap) | {"prompt_tokens": len(ids)}
        resets = memory.reset_peak()
        started = time.perf_counter()
        try:
            output = contender.generate(asked, self.args.max_new_tokens)
        except Exception as error:
            complain(f"error: {contender.name} on {prompt.id}: {one_line(error)}")
            return record | {"error": one_line(error)}
        elsewhere = output.seconds is not None
        seconds = output.seconds if output.seconds is not None else time.perf_counter() - started
        peak, tokens = memory.peak_resident_bytes(), output.tokens
        decode_seconds = seconds - output.prefill_seconds
        caches = memory.cache_bytes(self.engine, len(ids) + len(tokens))
        over = peak - self._resident_before_loading - self._weights - caches
        return record | {
            "seconds": seconds,
            "new_tokens": len(tokens),
            "tokens_per_second": len(tokens) / seconds,
            "prefill_seconds": output.prefill_seconds,
            "decode_tokens_per_second": output.decoded_tokens / decode_seconds if output.decoded_tokens else None,
            "tokens": tokens,
            "stats": output.stats,
            "peak_resident_bytes": None if elsewhere else peak,
            "memory_over_bytes": over if resets and not elsewhere else None,
        }

    def _compare(self, records: list[report.Record], asked: Asked) -> None:
        reference = next((r for r in records if r["name"] == report.REFERENCE and r["error"] is None), None)
        if reference is None:
            return
        for record in records:
            if record["error"] is not None or not record["comparable"]:
                continue
            position = report.compare_tokens(record["tokens"], reference["tokens"])
            record["same_tokens"] = position is None
            if position is not None:
                shared = reference["tokens"][:position]
                record["first_difference"] = {
                    "id": record["id"],
                    "position": position,
                    "token": _at(record["tokens"], position),
                    "reference_token": _at(reference["tokens"], position),
                    "logit_gap": top_two_gap(self.engine, asked, shared, self.args),
                }

    def report(self, interrupted: bool) -> dict[str, Any]:
        """Everything measured so far, ready for JSON."""
        peaks = [r["peak_resident_bytes"] for r in self.records if r.get("peak_resident_bytes") is not None]
        return {
            "command": shlex.join(["specbranch", *self.args.argv]),
            "interrupted": interrupted,
            "machine": self._machine,
            "versions": self._request["versions"],
            "request": self._request,
            "resumed": self._resumed,
            "settings": self._request["options"]
            | {
                "dtype": str(self.engine.target.dtype).removeprefix("torch."),
                "weights": {role: weight_format(model) for role, model in self.engine.models.items()},
                "threads": self.args.threads or torch.get_num_threads(),
            },
            "memory": {
                "resident_before_loading_bytes": self._resident_before_loading,
                "weight_bytes": self._weights,
                "peak_resident_bytes": max(peaks) if peaks else None,
            },
            "rows": report.summarize(self.records),
            "notes": self._notes(),
            "learned": self._learned,
            "records": self.records,
        }

    def _notes(self) -> list[str]:
        is_there = any(record["name"] in llama_peer.NAMES and record["error"] is None for record in self.records)
        return llama_peer.notes(self.args) if is_there else []


def _record(contender: Contender, prompt: Prompt, lap: int) -> report.Record:
    """What is known before the measurement."""
    return {
        "name": contender.name,
        "task": prompt.task,
        "id": prompt.id,
        "lap": lap,
        "constraint": None if prompt.constraint is None else prompt.constraint[0],
        "prompt_tokens": None,
        "same_tokens": None,
        "first_difference": None,
        "comparable": contender.comparable,
        "error": None,
    }


@torch.inference_mode()
def top_two_gap(engine: SpecBranch, asked: Asked, answer: list[int], args: argparse.Namespace) -> float | None:
    """By how much the target's best next token after so much of an answer beats its second best.

    A fresh forward of the target with transformers' own attention: logits at temperature 0, perturbed scores
    above it. None where the filters, or the constraint, leave one token.
    """
    from specbranch_ext import draft_sample

    input_ids = torch.tensor([[*asked.ids, *answer]], device=engine.target.device)
    logits = engine.target(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits[0]
    position = torch.tensor([input_ids.shape[1]], device=logits.device)
    options = {name: getattr(args, name) for name in ("seed", "temperature", "top_k", "top_p", "min_p")}
    allowed = asked.allowed(engine, answer)
    options["allowed"] = None if allowed is None else allowed.to(logits.device)
    scores = draft_sample(logits, position, 2, **options).scores[0]
    gap = float(scores[0] - scores[1])
    return gap if torch.isfinite(scores).all() else None


def resident_with_libraries() -> int:
    """Resident memory once the libraries are loaded, before any model is."""
    import specbranch.engine  # noqa: F401

    return memory.resident_bytes()


def _at(tokens: list[int], position: int) -> int | None:
    return tokens[position] if position < len(tokens) else None
