"""llama.cpp through llama-cpp-python's low-level functions, with the loop that its server runs.

Each step decodes one token of every running sequence and fills the rest of the batch with waiting prompts. What all
prompts begin with is decoded once and copied to the other sequences.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np
from benchmarks.cpu.peers.clock import Clock
from benchmarks.cpu.peers.worker import Options, Refused, serve
from benchmarks.cpu.workloads import Request, Timing

BATCH, MICRO_BATCH = 2048, 512


@llama_cpp.llama_log_callback
def silent(level: int, text: bytes, data: Any) -> None:
    """Its log is long."""


class LlamaCpp:
    """f16 cache, flash attention, one cache for all sequences."""

    def __init__(self, options: Options) -> None:
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(options.model.encode(), params)
        if not self.model:
            raise Refused(f"cannot load {options.model}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.threads = options.threads
        self.context: Any = None
        self.memory: Any = None
        self.shape = (0, 0)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    @property
    def settings(self) -> dict[str, Any]:
        return {"llama_cpp_python": llama_cpp.__version__, "n_batch": BATCH, "n_ubatch": MICRO_BATCH, "kv": "f16"}

    def prepare(self, requests: list[Request]) -> None:
        """A context of the size of the load, as a server would be started with."""
        longest = max(len(r.prompt) + r.output_tokens for r in requests)
        shape = (len(requests), -(-longest // 256) * 256)
        if shape == self.shape:
            return
        if self.context:
            llama_cpp.llama_free(self.context)
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max, params.n_ctx = shape[0], shape[0] * shape[1]
        params.n_batch, params.n_ubatch = BATCH, MICRO_BATCH
        params.n_threads = params.n_threads_batch = self.threads
        params.kv_unified = True
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F16
        params.flash_attn_type = 1
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise Refused(f"cannot make a context of {shape[0]} x {shape[1]} tokens")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.shape = shape

    def generate(self, requests: list[Request]) -> list[Timing]:
        clock = Clock(requests)
        llama_cpp.llama_memory_clear(self.memory, True)
        self.batch.n_tokens = 0
        shared = self._share(requests)
        done, last = [shared] * len(requests), [0] * len(requests)
        running: list[int] = []
        waiting = list(range(len(requests)))
        while running or waiting:
            sampled = [(s, self._put(last[s], len(requests[s].prompt) + clock.counts[s] - 1, s, True)) for s in running]
            while waiting and self.batch.n_tokens < BATCH:
                s, index = waiting[0], 0
                prompt = requests[s].prompt
                end = min(len(prompt), done[s] + BATCH - self.batch.n_tokens)
                for position in range(done[s], end):
                    index = self._put(prompt[position], position, s, position == len(prompt) - 1)
                done[s] = end
                if end == len(prompt):
                    sampled.append((s, index))
                    running.append(waiting.pop(0))
            self._decode()
            for s, index in sampled:
                last[s] = self._pick(index)
            now = clock.now()
            for s, _ in sampled:
                clock.add(s, 1, now)
                if clock.counts[s] == requests[s].output_tokens:
                    running.remove(s)
                    llama_cpp.llama_memory_seq_rm(self.memory, s, -1, -1)
        return clock.timings()

    def _share(self, requests: list[Request]) -> int:
        """Decode what all prompts begin with, once; its length."""
        shared = 0
        if len(requests) > 1:
            for column in zip(*(r.prompt[:-1] for r in requests), strict=False):
                if len(set(column)) > 1:
                    break
                shared += 1
        for begin in range(0, shared, BATCH):
            for position in range(begin, min(shared, begin + BATCH)):
                self._put(requests[0].prompt[position], position, 0, False)
            self._decode()
        if shared:
            for s in range(1, len(requests)):
                llama_cpp.llama_memory_seq_cp(self.memory, 0, s, 0, shared)
        return shared

    def _put(self, token: int, position: int, sequence: int, logits: bool) -> int:
        batch, index = self.batch, self.batch.n_tokens
        batch.token[index], batch.pos[index] = token, position
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
        batch.logits[index] = logits
        batch.n_tokens = index + 1
        return index

    def _decode(self) -> None:
        status = llama_cpp.llama_decode(self.context, self.batch)
        if status:
            raise Refused(f"llama_decode answered {status}")
        self.batch.n_tokens = 0

    def _pick(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())


if __name__ == "__main__":
    serve(LlamaCpp)
