"""Engines that call back as the documentation of both interfaces of vLLM says."""

import enum
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from tests.pipeline.stego.adapters.toys import END, toy_logits


class CurrentBase(ABC):
    def __init__(self, vllm_config, req_states):
        return

    @classmethod
    def validate_params(cls, sampling_params):
        return None

    def add_request(self, req_idx, sampling_params):
        return True

    def apply_staged_writes(self):
        return None

    @abstractmethod
    def apply(self, logits, ctx):
        raise NotImplementedError


class LegacyBase(ABC):
    @classmethod
    def validate_params(cls, sampling_params):
        return None

    @abstractmethod
    def __init__(self, vllm_config, device, is_pin_memory):
        raise NotImplementedError

    @abstractmethod
    def apply(self, logits):
        raise NotImplementedError

    @abstractmethod
    def is_argmax_invariant(self):
        raise NotImplementedError

    @abstractmethod
    def update_state(self, batch_update):
        raise NotImplementedError


class MoveDirectionality(enum.Enum):
    UNIDIRECTIONAL = enum.auto()
    SWAP = enum.auto()


@dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: list
    added: list
    moved: list


@dataclass
class SamplingParams:
    extra_args: dict | None = None
    max_tokens: int = 400
    temperature: float = 1.0
    detokenize: bool = True


def install(monkeypatch, name, **members):
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = ".".join(parts[:i])
        if module not in sys.modules:
            monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    for key, value in members.items():
        setattr(sys.modules[name], key, value)


def config(**changes):
    found = SimpleNamespace(
        speculative_config=None, parallel_config=SimpleNamespace(world_size=1), model_config=None
    )
    for name, value in changes.items():
        setattr(found, name, value)
    return found


class CurrentRunner:
    """Model Runner V2: slots from a free list, rows in any order, prompts in chunks."""

    def __init__(self, kind, vllm_config=None, *, num_slots=4, chunk=100):
        def lengths():
            return SimpleNamespace(np=np.zeros(num_slots, np.int32))

        self.states = SimpleNamespace(prompt_len=lengths(), prefill_len=lengths())
        self.processor = kind(vllm_config or config(), self.states)
        self.free = list(range(num_slots))
        self.active = {}
        self.answers = {}
        self.chunk = chunk
        self.rng = np.random.default_rng(1)

    def add(self, name, prompt, params, output=()):
        slot = self.free.pop()
        self.answers[name] = self.processor.add_request(slot, params)
        self.states.prompt_len.np[slot] = len(prompt)
        self.states.prefill_len.np[slot] = len(prompt) + len(output)
        self.active[name] = [slot, list(prompt), list(output), 0, params]

    def preempt(self, name):
        slot, prompt, output, _, params = self.active.pop(name)
        self.free.append(slot)
        self.add(name, prompt, params, output)

    def step(self):
        self.processor.apply_staged_writes()
        names = list(self.active)
        self.rng.shuffle(names)
        rows, token_ids, positions, slots = [], [], [], []
        for name in names:
            slot, prompt, output, num_computed, _ = self.active[name]
            text = prompt + output
            end = min(num_computed + self.chunk, len(text))
            self.active[name][3] = end
            rows.append(toy_logits(text[:end]))
            token_ids.append(text[end - 1])
            positions.append(end - 1)
            slots.append(slot)
        logits = torch.stack(rows)
        ctx = SimpleNamespace(
            expanded_idx_mapping=torch.tensor(slots, dtype=torch.int32),
            idx_mapping=torch.tensor(slots, dtype=torch.int32),
            idx_mapping_np=np.array(slots, np.int32),
            expanded_local_pos=torch.zeros(len(slots), dtype=torch.int32),
            input_ids=torch.tensor(token_ids),
            pos=torch.tensor(positions),
            seq_lens_upper_bound_np=np.array(positions) + 1,
        )
        logits = self.processor.apply(logits, ctx)
        finished = {}
        for name, row in zip(names, logits, strict=True):
            slot, prompt, output, num_computed, params = self.active[name]
            if num_computed < len(prompt + output):
                continue  # what was sampled behind a part of the prompt is thrown away
            output.append(int(row.argmax()))
            if output[-1] == END or len(output) == params.max_tokens:
                finished[name] = output
                del self.active[name]
                self.free.append(slot)
        return finished

    def run(self):
        finished = {}
        while self.active:
            finished |= self.step()
        return finished


class LegacyRunner:
    """Runner V1: who comes takes a free row or a new one; then the last rows fill the others."""

    def __init__(self, kind, vllm_config=None):
        self.processor = kind(vllm_config or config(), torch.device("cpu"), False)
        assert self.processor.is_argmax_invariant() is False
        self.rows, self.removed, self.added, self.moved = [], [], [], []

    def add(self, name, prompt, params):
        output = []
        index = self.removed.pop(0) if self.removed else len(self.rows)
        if index == len(self.rows):
            self.rows.append(None)
        self.rows[index] = [name, list(prompt), output, params]
        self.added.append((index, params, list(prompt), output))

    def swap(self, first, second):
        self.condense()
        self.moved.append((first, second, MoveDirectionality.SWAP))
        self.rows[first], self.rows[second] = self.rows[second], self.rows[first]

    def condense(self):
        while None in self.rows:
            row = self.rows.pop()
            if row is not None:
                hole = self.rows.index(None)
                self.rows[hole] = row
                self.moved.append((len(self.rows), hole, MoveDirectionality.UNIDIRECTIONAL))

    def step(self):
        self.condense()
        update = None
        if self.removed or self.added or self.moved:
            update = BatchUpdate(len(self.rows), self.removed, self.added, self.moved)
            self.removed, self.added, self.moved = [], [], []
        self.processor.update_state(update)
        logits = torch.stack([toy_logits(prompt + out) for _, prompt, out, _ in self.rows])
        logits = self.processor.apply(logits)
        finished = {}
        for index, ((name, _, output, params), row) in enumerate(
            zip(list(self.rows), logits, strict=True)
        ):
            output.append(int(row.argmax()))
            if output[-1] == END or len(output) == params.max_tokens:
                finished[name] = output
                self.rows[index] = None
                self.removed.append(index)
        return finished

    def run(self):
        finished = {}
        while any(self.rows):
            finished |= self.step()
        return finished
