"""What no engine on the machine can beat: bytes that a workload must read, and operations that it must do.

Owns: that arithmetic. Each step reads all weights of linear layers and head once, and every row its keys and values (a
shared prefix: once for all rows); every computed token goes through the linear layers once and attends to what is
before it; a sampled token goes through the head. Reading and computing may overlap, so the longer of the two counts;
W6's prompts come before its tokens. Activations, norms, sampling and the host are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu import workloads

NUMBER = 2  # bytes, bf16


@dataclass(frozen=True)
class Ceilings:
    """Bytes and operations a second."""

    read: float
    product: float


@dataclass
class Needs:
    """Bytes and operations."""

    model: str
    bytes: float = 0.0
    operations: float = 0.0

    def steps(self, count: int) -> Needs:
        """The weights, read by so many steps."""
        self.bytes += count * workloads.weights(self.model) * NUMBER
        return self

    def context(self, tokens: float) -> Needs:
        """Keys and values of so many tokens, read."""
        self.bytes += tokens * workloads.kv_numbers(self.model) * NUMBER
        return self

    def tokens(self, computed: int, sampled: int) -> Needs:
        """Products of the linear layers and of the head."""
        c = workloads.MODELS[self.model]
        head = c["vocab_size"] * c["hidden_size"]
        self.operations += 2.0 * (workloads.weights(self.model) - head) * computed + 2.0 * head * sampled
        return self

    def attends(self, pairs: float) -> Needs:
        """So many pairs of a token and one that it attends to."""
        c = workloads.MODELS[self.model]
        self.operations += 4.0 * c["num_hidden_layers"] * c["num_attention_heads"] * c["head_dim"] * pairs
        return self

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.bytes / ceilings.read, self.operations / ceilings.product)


def decode(model: str, batch: int, ceilings: Ceilings) -> float:
    """Seconds of a step in the middle of W3 or W7: 128 tokens in, half of 256 out."""
    length = 128 + 128
    needs = Needs(model).steps(1).context(batch * length).tokens(batch, batch).attends(batch * length)
    return needs.seconds(ceilings)


def throughput(model: str, lengths: list[tuple[int, int]], ceilings: Ceilings) -> float:
    """Output tokens a second of requests of (tokens in, tokens out) that all run together. The last token is not
    computed again, and a request's first comes of its prompt."""
    made = sum(out for _, out in lengths)
    pairs = sum((given + out - 1) * (given + out) / 2 for given, out in lengths)
    later = sum((out - 1) * (given + out / 2) for given, out in lengths)
    needs = Needs(model).steps(max(out for _, out in lengths)).context(later).attends(pairs)
    return made / needs.tokens(sum(given + out - 1 for given, out in lengths), made).seconds(ceilings)


def prefill(model: str, count: int, length: int, ceilings: Ceilings) -> float:
    """Seconds until `count` prompts have their first token."""
    pairs = count * length * (length + 1) / 2
    return Needs(model).steps(1).tokens(count * length, count).attends(pairs).seconds(ceilings)


def shared(model: str, known: bool, ceilings: Ceilings) -> float:
    """Seconds of W6: the prefix new, or known."""
    rows, prefix, own, out = 64, 4096, 64, 64
    pairs = rows * own * (prefix + (own + 1) / 2) + (0 if known else prefix * (prefix + 1) / 2)
    computed = rows * own + (0 if known else prefix)
    prompts = Needs(model).steps(1).tokens(computed, rows).attends(pairs)
    length = own + out / 2
    step = Needs(model).steps(1).context(prefix + rows * length).tokens(rows, rows).attends(rows * (prefix + length))
    return prompts.seconds(ceilings) + (out - 1) * step.seconds(ceilings)


def bound(workload: str, model: str, ceilings: Ceilings) -> float | None:
    """In the workload's own unit (see `report.METRICS`); None where nothing simple can be said."""
    if workload == "W1":
        prompts, outs = workloads.varied()
        return throughput(model, [(len(p), n) for p, n in zip(prompts, outs, strict=True)], ceilings)
    if workload == "W2":
        return throughput(model, [(512, 128)] * 1000, ceilings)
    if workload in ("W3", "W7_64", "W7_256"):
        return 1e3 * decode(model, int(workload.partition("_")[2] or 1), ceilings)
    if workload.startswith("W4_"):
        count, _, length = workload[3:].partition("x")
        return prefill(model, int(count), int(length), ceilings)
    if workload in ("W6_new", "W6_cached"):
        return shared(model, workload == "W6_cached", ceilings)
    return None
