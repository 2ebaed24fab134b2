"""The words between the core and the runner: `Plan` (what one step does) and `StepResult` (what came of it).

Owns: the layout of both and their encoding as bytes. Knows nothing of scheduling, tensors or devices.

A plan is a value: integers in numpy arrays, no tensors, no references into the core. It can be logged, replayed and
sent to other ranks as it is. Shape legend: R rows of the step, S sampled rows, K known tokens, G KV groups,
E table entries, A position axes.

What the receiver does with a plan, in this order (plans are executed in the order of their numbers, one after the
other as far as device memory can tell; that order is the contract which lets the core reuse blocks at once):

1. wait for the swaps of plans up to `fence`;
2. `retired` rows become dead;
3. `new_rows` are written;
4. `forks` copy rows (all sources are read before any destination is written);
5. `tables` are applied: block table entries of the rows;
6. `swap_out`, then `swap_in`, then `copies` move whole pages (of each list, all sources are read before any
   destination is written);
7. the ragged batch of `rows` runs; in each layer every KV write precedes every read;
8. `sample_rows` are sampled from the hidden states at the end of `rows[sample_index]`; of the rows in `pool_index` the
   prompt is complete, and its hidden states are pooled.
"""

from __future__ import annotations

from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from quire.types.params import SamplingParams
from quire.types.pooling import PoolingParams

Ints = NDArray[np.int32]


def ints(values: Any = (), shape: tuple[int, ...] | None = None) -> Ints:
    """An int32 array of `values`, reshaped to `shape` (so that an empty list of pairs is still (0, 2))."""
    out = np.asarray(values, dtype=np.int32)
    return out if shape is None else out.reshape(shape)


class NewRow(msgspec.Struct, frozen=True):
    """A sequence that enters (or enters again, after preemption) the device's request table.

    `prompt_length` is the number of prompt tokens. `tokens` holds every token known so far, prompt first, but only
    where sampling needs the history (`params.needs_history`); else it is empty. `eos_token_ids` are masked until
    `params.min_tokens` are there. `position_offset` is added to the token index to give the position. `pooling`: of a
    row that is pooled; then nothing is sampled, and `params` say nothing.
    """

    row: int
    params: SamplingParams
    seed: int
    sample_index: int
    prompt_length: int
    length: int
    tokens: Ints
    eos_token_ids: tuple[int, ...] = ()
    position_offset: int = 0
    pooling: PoolingParams | None = None


class TableDelta(msgspec.Struct, frozen=True):
    """New entries of one KV group's block tables: `table[rows[e], index[e]] = blocks[e]`, each (E,)."""

    rows: Ints
    index: Ints
    blocks: Ints


class Plan(msgspec.Struct, frozen=True):
    """One step.

    `rows`, `starts`, `counts` (R,): row `rows[i]` computes the tokens at indices `starts[i] .. starts[i]+counts[i]-1`.
    Its last `n_i = token_offsets[i+1] - token_offsets[i]` input tokens are `tokens[token_offsets[i]:]`; the
    `counts[i] - n_i` (0 or 1) before them are the row's last sampled token, which lives on the device.
    Where `upper[i]` is set the host does not know yet how far the row has come: the length kept on the device is the
    truth and `starts[i]` an upper bound that reserved the blocks.
    `positions` (A, K) gives explicit positions of the known tokens for models with several axes; None means
    index + offset.
    `sample_index`, `sample_rows` (S,): the hidden state at the end of `rows[sample_index[s]]` is sampled with the
    parameters of row `sample_rows[s]`, which also receives the token. They differ where a prompt is shared by n > 1;
    then S may exceed R.
    `pool_index` (P,): rows of the step that end with it, and are pooled instead of sampled.
    `swap_out` (., 2) device block -> host block; `swap_in` (., 2) host block -> device block;
    `copies` (., 2) device block -> device block; `forks` (., 3) source row, destination row, sample index.
    `fence`: swaps of plans up to this number must have finished before this plan touches device blocks.
    """

    number: int
    rows: Ints
    starts: Ints
    counts: Ints
    upper: NDArray[np.bool_]
    token_offsets: Ints
    tokens: Ints
    sample_index: Ints
    sample_rows: Ints
    tables: tuple[TableDelta, ...]
    new_rows: tuple[NewRow, ...] = ()
    retired: Ints = msgspec.field(default_factory=ints)
    forks: Ints = msgspec.field(default_factory=lambda: ints((), (0, 3)))
    copies: Ints = msgspec.field(default_factory=lambda: ints((), (0, 2)))
    swap_out: Ints = msgspec.field(default_factory=lambda: ints((), (0, 2)))
    swap_in: Ints = msgspec.field(default_factory=lambda: ints((), (0, 2)))
    fence: int = -1
    positions: Ints | None = None
    pool_index: Ints = msgspec.field(default_factory=ints)


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Logprobs of some positions. `ids`, `values` (L, 1+k): column 0 is the token itself, then the k most likely;
    `ranks` (L,): 1-based rank of the token itself."""

    ids: Ints
    values: NDArray[np.float32]
    ranks: Ints


class PromptLogprobs(msgspec.Struct, frozen=True):
    """Logprobs of the prompt tokens at indices `start .. start+L-1` of `row` (token 0 has none)."""

    row: int
    start: int
    logprobs: TokenLogprobs


class StepResult(msgspec.Struct, frozen=True):
    """What came of a plan.

    `tokens` (S, 1+k) and `accepted` (S,): the first `accepted[s]` tokens of line s are valid (1 without speculation).
    `logprobs[s]` is None where row s asked for none. `failed`: (index into the sampled rows, message) of rows whose own
    work went wrong (say a logits processor raised); the others are not touched by it. `pooled`: of each row of
    `pool_index` its vector (D,), or one for each token of its prompt (L, D).
    """

    number: int
    tokens: Ints
    accepted: Ints
    logprobs: tuple[TokenLogprobs | None, ...] | None = None
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    failed: tuple[tuple[int, str], ...] = ()
    pooled: tuple[NDArray[np.float32], ...] = ()


def _enc(obj: Any) -> Any:
    if isinstance(obj, np.ndarray):
        array = cast("NDArray[Any]", obj)
        return (array.dtype.str, array.shape, array.tobytes())
    raise NotImplementedError(f"cannot send {type(obj).__name__}")


def _dec(kind: Any, obj: Any) -> Any:
    if kind is np.ndarray or getattr(kind, "__origin__", None) is np.ndarray:
        dtype, shape, data = obj
        return np.frombuffer(data, dtype=dtype).reshape(shape)
    raise NotImplementedError(f"cannot receive {kind}")


def encode(value: Any) -> bytes:
    """A plan, a result or any struct of this package, as msgpack bytes."""
    return msgspec.msgpack.encode(value, enc_hook=_enc)


def decode(data: bytes, kind: Any) -> Any:
    """The inverse of `encode`; raises `msgspec.ValidationError` where the bytes are not a `kind`."""
    return msgspec.msgpack.decode(data, type=kind, dec_hook=_dec)
