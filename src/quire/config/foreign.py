"""Arguments of vLLM, present or past, that quire does not have, each with what to do instead.

Owns: the answers only. They are better than "no argument named ..." for code that is carried over.
"""

from __future__ import annotations

from collections.abc import Mapping

_AUTO = "quire chooses the implementation of each operation itself (`quire env` shows which and why); leave it out"
_MM = "models are text-only for now; leave it out"
_DP = "data parallelism is not yet in quire; leave it out"
_NODES = "running on several nodes is not yet in quire; leave it out"

FOREIGN: Mapping[str, str] = {
    # gone from vLLM itself, but alive in tutorials
    "prompt_token_ids": 'pass {"prompt_token_ids": [...]} as the prompt instead',
    "best_of": "ask for n outputs and choose among them",
    "max_seq_len_to_capture": "CUDA graphs do not depend on the length; leave it out",
    "max_context_len_to_capture": "CUDA graphs do not depend on the length; leave it out",
    "use_v2_block_manager": "there is one block manager; leave it out",
    "num_scheduler_steps": "steps overlap by themselves; see async_scheduling",
    "num_lookahead_slots": "leave it out",
    "worker_use_ray": "use distributed_executor_backend",
    "engine_use_ray": "use distributed_executor_backend",
    "guided_decoding_backend": "there is one backend, llguidance; leave it out",
    "use_beam_search": "call LLM.beam_search",
    "disable_async_output_proc": "use async_scheduling=False",
    "preemption_mode": "swap_space above 0 swaps where host blocks are free, else preempted sequences are recomputed",
    "kv_cache_free_gpu_mem_fraction": "use gpu_memory_utilization",
    # of today's vLLM
    "attention_backend": _AUTO,
    "attention_config": _AUTO,
    "kernel_config": _AUTO,
    "linear_backend": _AUTO,
    "moe_backend": _AUTO,
    "compilation_config": "quire does not compile models; enforce_eager=True turns CUDA graphs off",
    "cudagraph_capture_sizes": "quire chooses the sizes itself; leave it out",
    "max_cudagraph_capture_size": "quire chooses the sizes itself; leave it out",
    "optimization_level": "quire has one level; leave it out",
    "prefix_caching_hash_algo": "quire has one hash; leave it out",
    "quantization_config": "quantization is not yet in quire; leave it out",
    "config_format": "checkpoints are read in Hugging Face's layout; leave it out",
    "hf_config_path": "put config.json beside the weights, or use hf_overrides",
    "code_revision": "a checkpoint's code is that of its revision; leave it out",
    "model_loader_extra_config": "the loaders have no options; leave it out",
    "ignore_patterns": "only the files of the chosen format are loaded; leave it out",
    "scheduler_cls": "the scheduler cannot be replaced; see scheduling_policy",
    "worker_cls": "workers cannot be replaced; leave it out",
    "worker_extension_cls": "workers cannot be extended; leave it out",
    "long_prefill_token_threshold": "bound a step with max_num_batched_tokens",
    "max_num_partial_prefills": "bound a step with max_num_batched_tokens",
    "max_long_partial_prefills": "bound a step with max_num_batched_tokens",
    "stream_interval": "each step's tokens are streamed; leave it out",
    "master_addr": _NODES,
    "master_port": _NODES,
    "node_rank": _NODES,
    "data_parallel_rank": _DP,
    "data_parallel_size_local": _DP,
    "data_parallel_address": _DP,
    "data_parallel_rpc_port": _DP,
    "data_parallel_backend": _DP,
    "decode_context_parallel_size": "context parallelism is not in quire; leave it out",
    "prefill_context_parallel_size": "context parallelism is not in quire; leave it out",
    "allowed_media_domains": _MM,
    "media_io_kwargs": _MM,
    "mm_processor_cache_gb": _MM,
    "interleave_mm_strings": _MM,
    "language_model_only": _MM,
    "lora_modules": "LoRA is not yet in quire: merge the adapter into the checkpoint",
    "fully_sharded_loras": "LoRA is not yet in quire; leave it out",
    "max_cpu_loras": "LoRA is not yet in quire; leave it out",
    "lora_dtype": "LoRA is not yet in quire; leave it out",
    "collect_detailed_traces": "tracing is not yet in quire; leave it out",
    "otlp_traces_endpoint": "tracing is not yet in quire; leave it out",
    "kv_events_config": "KV events are not yet in quire; leave it out",
}
