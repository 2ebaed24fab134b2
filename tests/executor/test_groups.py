"""Collectives: what each rank gets."""

from __future__ import annotations

import threading

import torch

from quire.parallel.groups import SoloGroup, join


def test_collectives_of_three_ranks(tmp_path):
    """Three ranks as threads: there is no process-wide group to get in the way."""
    got = [None] * 3

    def rank(r):
        group = join(r, 3, tmp_path / "meeting")
        x = torch.tensor([[r, 10.0 - r]])
        got[r] = (
            group.all_reduce(x.clone()).tolist(),
            group.all_reduce(x.clone(), "min").tolist(),
            group.all_gather(x).tolist(),
            group.broadcast(x.clone(), source=2).tolist(),
        )
        group.close()

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    expected = ([[3.0, 27.0]], [[0.0, 8.0]], [[0.0, 10.0, 1.0, 9.0, 2.0, 8.0]], [[2.0, 8.0]])
    assert got == [expected] * 3


def test_alone_every_collective_is_the_identity(tmp_path):
    group, x = join(0, 1, tmp_path / "never"), torch.ones(2)
    assert isinstance(group, SoloGroup)
    assert group.all_reduce(x) is x and group.all_gather(x) is x and group.broadcast(x) is x
