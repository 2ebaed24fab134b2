"""Transformers' `generate` on one batch, padded on the left, that runs until its longest request is done."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from benchmarks.cpu.peers.clock import Clock
from benchmarks.cpu.peers.worker import Options, serve
from benchmarks.cpu.workloads import Request, Timing
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList


class Ticks(StoppingCriteria):
    """Notes when each token of the batch was chosen; never stops it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        self.times.append(self.clock.now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Transformers:
    """bf16, PyTorch's own attention."""

    def __init__(self, options: Options) -> None:
        torch.set_num_threads(options.threads)
        auto = transformers.AutoModelForCausalLM
        self.model: Any = auto.from_pretrained(options.model, dtype=torch.bfloat16, attn_implementation="sdpa").eval()

    @property
    def settings(self) -> dict[str, Any]:
        return {"transformers": transformers.__version__, "torch": torch.__version__, "attention": "sdpa"}

    def prepare(self, requests: list[Request]) -> None:
        pass

    def generate(self, requests: list[Request]) -> list[Timing]:
        width = max(len(r.prompt) for r in requests)
        steps = max(r.output_tokens for r in requests)
        clock = Clock(requests)
        ids = torch.zeros(len(requests), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        ticks = Ticks(clock)
        with torch.inference_mode():
            self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=steps,
                max_new_tokens=steps,
                stopping_criteria=StoppingCriteriaList([ticks]),
            )
        # A short request of a batch has its tokens early, but gets them when the batch returns.
        last = clock.now() if len(requests) > 1 else ticks.times[-1]
        return [Timing(ticks.times[0], last, r.output_tokens) for r in requests]


if __name__ == "__main__":
    serve(Transformers)
