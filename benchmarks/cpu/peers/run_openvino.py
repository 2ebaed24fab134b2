"""OpenVINO GenAI's pipeline with continuous batching and a paged cache; prefix caching on."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino  # pyright: ignore[reportMissingImports]
import openvino_genai as genai  # pyright: ignore[reportMissingImports]
from benchmarks.cpu.peers.clock import Clock
from benchmarks.cpu.peers.worker import Options, serve
from benchmarks.cpu.workloads import Request, Timing


class OpenVino:
    """Computes in the type that it finds best for the processor; the folder has the weights' precision."""

    def __init__(self, options: Options) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1
        scheduler.max_num_seqs = 64
        scheduler.max_num_batched_tokens = 4096
        scheduler.enable_prefix_caching = True
        scheduler.dynamic_split_fuse = True
        properties = {"INFERENCE_NUM_THREADS": options.threads, "PERFORMANCE_HINT": "LATENCY"}
        self.pipeline = genai.ContinuousBatchingPipeline(options.model, scheduler, "CPU", properties)
        self.serial = 0

    @property
    def settings(self) -> dict[str, Any]:
        versions = {"openvino": openvino.__version__, "openvino_genai": genai.__version__}
        return {**versions, "cache_gib": 1, "max_num_batched_tokens": 4096}

    def prepare(self, requests: list[Request]) -> None:
        pass

    def generate(self, requests: list[Request]) -> list[Timing]:
        clock = Clock(requests)
        handles: list[Any] = []
        for request in requests:
            config = genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = request.output_tokens
            config.ignore_eos = True
            config.do_sample = False
            ids = openvino.Tensor(np.array([request.prompt], dtype=np.int64))
            handles.append(self.pipeline.add_request(self.serial, ids, config))
            self.serial += 1
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            now = clock.now()
            for index, handle in enumerate(handles):
                while handle.can_read():
                    clock.add(index, sum(len(output.generated_ids) for output in handle.read().values()), now)
        return clock.timings()


if __name__ == "__main__":
    serve(OpenVino)
