"""Cosmos described by its numbers is what diffusers builds, and the document holds what the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import CosmosTransformer3DModel

from benchmarks.cosmos_on_paper import BLOCKS, block, forward_flops, in_a_block, report, rest
from mutoscope.estimate.strategies import numbers

PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"


def test_the_weights_are_those_of_the_model() -> None:
    with torch.device("meta"):
        model = CosmosTransformer3DModel(in_channels=17)  # of 7b, and a mask of what is known
    shapes = lambda module: sorted((p.shape[0], p.numel() // p.shape[0]) for p in module.parameters())
    assert sorted((w.rows, w.columns) for w in block()) == shapes(model.transformer_blocks[0])
    assert numbers([block()] * BLOCKS + [rest()]) == sum(p.numel() for p in model.parameters())
    in_blocks = {id(p) for p in model.transformer_blocks.parameters()}
    others = [p for p in model.parameters() if id(p) not in in_blocks]
    assert sorted((w.rows, w.columns) for w in rest()) == sorted((p.shape[0], p.numel() // p.shape[0]) for p in others)


def test_flops_are_those_that_a_block_has() -> None:
    """All but a few thousandths, outside of blocks and for the time."""
    assert forward_flops() == pytest.approx(BLOCKS * in_a_block().flops["forward"], rel=1e-3)


def test_the_document_holds_what_the_command_prints() -> None:
    assert "\n".join(report()) in PAGE.read_text()
