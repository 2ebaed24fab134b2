"""What blocks are spent on: shared prompts once, forks their own last block, never a block too many."""

from __future__ import annotations

from quire.core.scheduler import Scheduler
from quire.types.kv import KVGroup
from quire.types.params import SamplingParams
from quire.types.request import Request

from .device import SimDevice

GROUPS = (KVGroup("full", (0,)),)


def make(**options: int) -> tuple[Scheduler, SimDevice]:
    settings = {"max_num_seqs": 80, "max_num_batched_tokens": 8192, "max_model_len": 2048, **options}
    return Scheduler(GROUPS, 2000, 16, **settings), SimDevice(GROUPS, 16)  # type: ignore[arg-type]


def step(scheduler: Scheduler, device: SimDevice) -> None:
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.commit(plan, device.execute(plan))
    scheduler.check()


def request(name: str, prompt: list[int], n: int = 1) -> Request:
    return Request(name, prompt, SamplingParams(n=n, max_tokens=64, ignore_eos=True), seed=1)


def test_eight_samples_store_the_prompt_once() -> None:
    scheduler, device = make()
    scheduler.add(request("a", list(range(1000)), n=8))
    step(scheduler, device)
    assert scheduler.stats().blocks_used == 63, "62 full blocks and the partial one, all shared"
    assert device.computed == 1000
    step(scheduler, device)
    assert scheduler.stats().blocks_used == 62 + 8, "each sample owns its last block now"
    assert device.computed == 1000 + 8


def test_samples_of_a_block_aligned_prompt_copy_nothing() -> None:
    scheduler, device = make()
    scheduler.add(request("a", list(range(32)), n=4))
    step(scheduler, device)
    plan = scheduler.schedule()
    assert plan is not None and len(plan.copies) == 0
    assert scheduler.stats().blocks_used == 2 + 4


def test_a_prefix_of_64_requests_submitted_together_is_computed_once() -> None:
    scheduler, device = make()
    prefix = [7 * i % 501 for i in range(512)]
    for i in range(64):
        scheduler.add(request(str(i), [*prefix, 600 + i, 700 + i]))
    step(scheduler, device)
    assert scheduler.stats().running == 64
    assert device.computed == 512 + 64 * 2
    assert scheduler.stats().blocks_used == 32 + 64
    assert scheduler.stats().prefix_hits == 63 * 512


def test_waste_is_under_one_block_a_sequence() -> None:
    scheduler, device = make()
    lengths = [1, 15, 16, 17, 100, 333]
    for i, length in enumerate(lengths):
        scheduler.add(request(str(i), [i * 400 + j for j in range(length)]))
    for done in range(40):
        step(scheduler, device)
        stored = sum(length + done for length in lengths)
        slots = scheduler.stats().blocks_used * 16
        assert stored <= slots < stored + 16 * len(lengths)


def test_a_cached_prefix_serves_later_requests_but_one_token() -> None:
    scheduler, device = make()
    prompt = list(range(64))
    for name in ("first", "again"):
        before = device.computed
        scheduler.add(request(name, prompt))
        step(scheduler, device)
        scheduler.abort(name)
        cost = device.computed - before
        assert cost == (64 if name == "first" else 16), "the last block is computed again, for its last token's logits"
    assert scheduler.stats().blocks_used == 0


def test_salts_and_adapters_do_not_share() -> None:
    scheduler, device = make()
    prompt = list(range(64))
    params = SamplingParams(max_tokens=4)
    for i, options in enumerate(({}, {"cache_salt": "x"}, {"lora_id": 3}, {"item_hashes": ((3, 5, b"image"),)})):
        scheduler.add(Request(str(i), prompt, params, seed=0, **options))  # type: ignore[arg-type]
    step(scheduler, device)
    assert scheduler.stats().prefix_hits == 0


def test_evicted_prefixes_come_back_from_the_host() -> None:
    scheduler = Scheduler(GROUPS, 34, 16, 4, 512, 512, num_host_blocks=40)
    device = SimDevice(GROUPS, 16)
    first = list(range(500))
    for name, prompt in (("a", first), ("b", [1000 + t for t in first]), ("c", first)):
        before = device.computed
        scheduler.add(request(name, prompt))
        step(scheduler, device)
        scheduler.abort(name)
        cost = device.computed - before
    assert cost < 100, "most of the first prompt came back by copying"
    assert scheduler.stats().host_blocks_used > 0
