"""From a plan and the device's rows to the tensors of a step.

Owns: the ragged batch. What the host knows goes up in one copy (`stage`); what only the device knows (last tokens, true
lengths, pages) is gathered there (`build`), with shapes that depend on the plan's counts alone, so that a graph can
record it. Shape legend: T tokens, R rows of the step, S sampled rows, P pages of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.layers.step import AttentionMeta, GroupMeta, Step
from quire.runner.table import RequestTable
from quire.runner.upload import Upload
from quire.types.plan import Plan


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens_T`, and `last_S`: where in T the hidden state of each sampled row is."""

    tokens_T: Tensor
    step: Step
    rows_R: Tensor
    lengths_R: Tensor
    sample_rows_S: Tensor
    sample_index_S: Tensor
    last_S: Tensor


def stage(plan: Plan, upload: Upload) -> None:
    """Put the batch's integers into the step's one copy to the device."""
    assert plan.positions is None, "positions with several axes are not there yet"
    counts = plan.counts
    num_rows, total = len(counts), int(counts.sum())
    known = np.diff(plan.token_offsets)
    cu_q = np.zeros(num_rows + 1, np.int64)
    np.cumsum(counts, out=cu_q[1:])
    upload.add("rows", plan.rows)
    upload.add("starts", plan.starts)
    upload.add("counts", counts)
    upload.add("upper", plan.upper)
    upload.add("cu_q", cu_q)
    if total == num_rows and not len(plan.tokens):  # every row decodes
        upload.add("row_of", np.arange(num_rows))
        upload.add("within", np.zeros(num_rows))
        upload.add("tokens", np.full(num_rows, -1))
    else:
        row_of = np.repeat(np.arange(num_rows), counts)
        within = np.arange(total) - cu_q[row_of]
        tokens = np.full(total, -1, np.int64)
        tokens[within >= (counts - known)[row_of]] = plan.tokens
        upload.add("row_of", row_of)
        upload.add("within", within)
        upload.add("tokens", tokens)
    upload.add("sample_rows", plan.sample_rows)
    upload.add("sample_index", plan.sample_index)
    upload.add("last", cu_q[1:][plan.sample_index] - 1)


def build(plan: Plan, upload: Upload, table: RequestTable, kv: list[tuple[int, Tensor]]) -> Batch:
    """The step's tensors, after the copy was sent and the table brought up to date."""
    size = table.block_size
    ends = plan.starts + plan.counts
    max_len = -(-int(ends.max(initial=1)) // size) * size
    num_decodes = int(np.argmax(plan.counts != 1)) if (plan.counts != 1).any() else len(plan.counts)
    rows_R, counts_R = upload["rows"], upload["counts"]
    starts_R = torch.where(upload["upper"].bool(), table.length_R[rows_R], upload["starts"])
    row_of_T = upload["row_of"]
    index_T = starts_R[row_of_T] + upload["within"]
    rows_T = rows_R[row_of_T]
    given_T = upload["tokens"]
    tokens_T = torch.where(given_T >= 0, given_T, table.last_R[rows_T])
    lengths_R = starts_R + counts_R
    groups = []
    for pages_RP in table.pages_RP:
        page_T = pages_RP[rows_T, (index_T // size).clamp(min=0)].long()
        slots_T = torch.where((page_T >= 0) & (index_T >= 0), page_T * size + index_T % size, -1)
        groups.append(GroupMeta(pages_RP[rows_R, : max_len // size], slots_T))
    meta = AttentionMeta(
        cu_q=upload["cu_q"].int(),
        lengths_R=lengths_R.int(),
        q_lens=plan.counts.tolist(),
        max_q=int(plan.counts.max(initial=1)),
        max_len=max_len,
        num_decodes=num_decodes,
        groups=tuple(groups),
        kv_lens=ends.tolist(),
    )
    positions_T = (index_T + table.offset_R[rows_T]).clamp(min=0)
    step = Step(positions_T, meta, kv)
    return Batch(tokens_T, step, rows_R, lengths_R, upload["sample_rows"], upload["sample_index"], upload["last"])
