"""The formulas of many GPUs, against numbers by hand and against what they say of each other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mutoscope.estimate.cluster import BASE_LATENCY, WITHIN_LATENCY, cluster_of, ring
from mutoscope.estimate.strategies import Moment, Weight, Work, exchanges, memory, step
from mutoscope.parallel import Parallel

BLOCK = (Weight(rows=1024, columns=1024), Weight(rows=1024, columns=1))
REST = (Weight(rows=512, columns=1024),)
P = 8 * (1024 * 1024 + 1024) + 512 * 1024
WORK = Work(
    blocks=(BLOCK,) * 8,
    rest=REST,
    moments=(Moment(False, 10**7), Moment(True, 2 * 10**7), Moment(True, 10**7, done=7 / 8)),
    replica={"weights": 4 * P, "gradients": 8 * P, "optimizer": 8 * P, "activations": 2 * 10**7},
    batch_size=2,
    flops_forward=1e12,
    flops_backward=2e12,
    bf16=True,
)
DDP, FSDP2, KEPT = Parallel(strategy="ddp"), Parallel(strategy="fsdp2"), Parallel(strategy="fsdp2", reshard=False)
EIGHT = cluster_of("h100", gpus=8)
MANY = cluster_of("h100", gpus=64)


def zero(stage: int, **more: str) -> Parallel:
    return Parallel(strategy="deepspeed", zero=stage, **more)  # type: ignore[arg-type]


def total(parallel: Parallel, cluster=EIGHT, work: Work = WORK) -> tuple[float, float]:
    sent = exchanges(work, parallel, cluster).total(work.accumulate)
    return sent.within, sent.between


def test_a_ring_sends_what_the_textbook_says() -> None:
    assert ring(800, 8, 1, 1, EIGHT).within == 700
    assert ring(800, 8, 1, 2, EIGHT).within == 1400
    across = ring(800, 64, 1, 2, MANY)
    assert across.within + across.between == pytest.approx(2 * 800 * 63 / 64)
    assert across.between == pytest.approx(across.within / 7), "one link of eight leaves the node"
    copies = ring(800, 8, 8, 2, MANY)  # a process of each node
    assert (copies.within, copies.between) == (0, 1400)
    assert ring(800, 1, 1, 2, EIGHT).seconds == 0


def test_a_collective_takes_its_latency_and_its_slowest_link() -> None:
    wide = replace(EIGHT, reached=1.0)
    latency = BASE_LATENCY + 7 * WITHIN_LATENCY
    assert ring(8e9, 8, 1, 1, wide).seconds == pytest.approx(latency + 7 / 450)
    assert ring(8e9, 8, 8, 1, replace(MANY, reached=1.0)).seconds == pytest.approx(7 / 50, rel=0.01)


def test_bytes_by_strategy() -> None:
    share = 7 / 8 * 4 * P
    rest = 7 / 8 * 4 * 512 * 1024
    assert total(DDP) == pytest.approx((2 * share, 0))
    assert total(FSDP2) == pytest.approx((3 * share - rest, 0)), "the rest is gathered once"
    assert total(KEPT) == pytest.approx((2 * share, 0))
    assert total(zero(1)) == total(zero(2)) == pytest.approx((3 * share, 0)), "gradients by all-reduce"
    assert total(zero(3)) == pytest.approx((3 * share, 0))


def test_bytes_of_copies_on_several_nodes() -> None:
    hsdp = Parallel(strategy="fsdp2", replicate=8)
    within, between = total(hsdp, MANY)
    assert within == total(FSDP2)[0], "a node does what it does alone"
    assert between == pytest.approx(2 * 7 / 8 * 4 * P / 8), "and adds up its eighth of the gradients"
    assert 0 < between < total(FSDP2, MANY)[1]


def test_micro_steps_gather_anew_and_send_gradients_once() -> None:
    twice = replace(WORK, accumulate=2)
    share = 7 / 8 * 4 * P
    assert total(DDP, work=twice) == total(DDP)
    assert total(FSDP2, work=twice)[0] - total(FSDP2)[0] == pytest.approx(total(FSDP2)[0] - share)
    assert total(KEPT, work=twice)[0] == pytest.approx(3 * share)
    assert total(zero(1), work=twice) == total(zero(1))
    assert total(zero(2), work=twice)[0] == pytest.approx(5 * share)


def test_memory_by_strategy() -> None:
    by = {parallel: memory(WORK, parallel, EIGHT) for parallel in (DDP, FSDP2, KEPT, zero(1), zero(2), zero(3))}
    assert by[FSDP2]["weights"] == 4 * P // 8 and by[FSDP2]["optimizer"] == P
    assert "gradients" not in by[FSDP2], "at the beginning of the backward pass there are none"
    block, rest = 4 * (1024 * 1024 + 1024), 4 * 512 * 1024
    assert by[FSDP2]["gathered"] == 2 * block + rest + (block + rest) + block
    assert by[KEPT]["gathered"] - by[FSDP2]["gathered"] == 6 * block
    assert sum(by[FSDP2].values()) < sum(by[KEPT].values()) < sum(by[DDP].values())
    assert by[zero(1)]["weights"] == by[zero(2)]["weights"] == 4 * P == 8 * by[zero(3)]["weights"]
    assert by[zero(1)]["gradients"] == 4 * P == 8 * by[zero(2)]["gradients"]
    far = memory(WORK, Parallel(strategy="fsdp2", offload="all"), EIGHT)
    assert not {"weights", "optimizer", "gradients"} & far.keys() and far["gathered"] == by[FSDP2]["gathered"]
    kept = memory(replace(WORK, accumulate=2), FSDP2, EIGHT)
    assert kept["gradients"] == 4 * P, "whole until they are sent"


def test_parts_are_padded_to_the_first() -> None:
    """A LoRA's 8 rows over 64 processes are 64 rows, and 512 numbers are 8 for each."""
    lora = replace(WORK, blocks=(), rest=(Weight(rows=8, columns=100), Weight(rows=512, columns=1)))
    held = memory(lora, FSDP2, MANY)
    assert held["weights"] == 4 * (100 + 8)
    sent = total(FSDP2, MANY, lora)
    assert sum(sent) == pytest.approx(2 * 63 / 64 * 4 * (6400 + 512))


def test_frozen_weights_are_gathered_and_have_no_gradients() -> None:
    frozen = tuple(replace(w, trained=False, kept=1, gathered=1) for w in BLOCK)
    lora = replace(WORK, blocks=((*frozen, Weight(rows=16, columns=1024)),) * 8)
    adapters = 7 / 8 * 4 * (8 * 16 * 1024 + 512 * 1024)
    assert total(DDP, work=lora)[0] == pytest.approx(2 * adapters)
    base = 7 / 8 * 8 * (1024 * 1024 + 1024)
    assert total(FSDP2, work=lora)[0] == pytest.approx(2 * base + 3 * adapters - 7 / 8 * 4 * 512 * 1024)


def test_time_is_computing_and_what_does_not_hide_behind_it() -> None:
    alone = 3e12 / (0.45 * 989e12)
    fast = step(WORK, FSDP2, EIGHT)
    assert fast.computing == pytest.approx(alone)
    assert alone < fast.seconds < 1.1 * alone and fast.samples == 16
    assert fast.mfu == pytest.approx(0.45 * alone / fast.seconds)
    slow = step(WORK, FSDP2, replace(EIGHT, within=1e9))
    assert slow.seconds == pytest.approx(slow.sent.seconds, rel=0.01), "nothing but waiting"
    again = step(replace(WORK, flops_recomputed=1e12), FSDP2, EIGHT)
    assert again.mfu == pytest.approx(fast.mfu * 3 / 4, rel=0.05)
    far = step(WORK, Parallel(strategy="fsdp2", offload="all"), EIGHT)
    assert far.seconds - fast.seconds == pytest.approx((4 * P / 8 * 3 / 64e9 + 28 * P / 8 / 77e9) / 0.8)
    assert step(WORK, zero(2), EIGHT).seconds > step(WORK, zero(3), EIGHT).seconds, "ZeRO-2 sends when all is computed"


@pytest.mark.parametrize(
    "wrong", [{"gpus": 12}, {"gpus": 0}, {"gpus": 8, "per_node": 0}, {"gpus": 8, "hfu": 1.5}, {"gpus": 8, "within": 0}]
)
def test_impossible_clusters_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        cluster_of("h100", **wrong)  # type: ignore[arg-type]
