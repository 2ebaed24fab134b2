"""vLLM's CPU build, in process, through the engine that `LLM` drives; compiled, prefix caching on.

The environment that it reads when it is imported is set in catalog.py.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm  # pyright: ignore[reportMissingImports]
from benchmarks.cpu.peers.clock import Clock
from benchmarks.cpu.peers.worker import Options, serve
from benchmarks.cpu.workloads import Request, Timing
from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]


class Vllm:
    """Steps as large as quire's on a CPU may be."""

    def __init__(self, options: Options) -> None:
        self.llm = vllm.LLM(
            options.model,
            dtype="bfloat16",
            max_model_len=options.max_model_len,
            max_num_batched_tokens=4096,
            max_num_seqs=64,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
        self.serial = 0

    @property
    def settings(self) -> dict[str, Any]:
        return {"vllm": vllm.__version__, "torch": torch.__version__, "max_num_batched_tokens": 4096}

    def prepare(self, requests: list[Request]) -> None:
        pass

    def generate(self, requests: list[Request]) -> list[Timing]:
        engine = self.llm.llm_engine
        clock = Clock(requests)
        index_of: dict[str, int] = {}
        for index, request in enumerate(requests):
            name = str(self.serial)
            self.serial += 1
            index_of[name] = index
            params = vllm.SamplingParams(
                temperature=0.0,
                ignore_eos=True,
                max_tokens=request.output_tokens,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            engine.add_request(name, {"prompt_token_ids": request.prompt}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = clock.now()
            for output in outputs:
                clock.add(index_of[output.request_id], len(output.outputs[0].token_ids), now)
        return clock.timings()


if __name__ == "__main__":
    serve(Vllm)
