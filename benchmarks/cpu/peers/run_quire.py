"""quire, through the engine that `LLM` drives; bf16, or weights quantized at load."""

from __future__ import annotations

from typing import Any

from benchmarks.cpu.peers.clock import Clock
from benchmarks.cpu.peers.worker import Options, Refused, serve
from benchmarks.cpu.workloads import Request, Timing

from quire import LLM, SamplingParams, __version__
from quire.types.errors import ClientError
from quire.types.params import RequestOutputKind
from quire.utils.optional import version


class Quire:
    """Defaults, but for the threads and the longest sequence, which all engines are given."""

    def __init__(self, options: Options) -> None:
        extra: dict[str, Any] = {} if options.precision == "bf16" else {"quantization": options.precision}
        try:
            self.llm = LLM(
                options.model,
                max_model_len=options.max_model_len,
                threads=options.threads,
                log_level="warning",
                **extra,
            )
        except ClientError as error:
            raise Refused(str(error)) from error
        self.serial = 0

    @property
    def settings(self) -> dict[str, Any]:
        return {"quire": __version__, "torch": version("torch")}

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
            params = SamplingParams(
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
    serve(Quire)
