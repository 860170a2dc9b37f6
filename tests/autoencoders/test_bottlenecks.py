"""Quantisers, against the formulas of their papers written out naively."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mutoscope.autoencoders.bottlenecks import (
    EMAVectorQuantizer,
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    VectorQuantizer,
    codebook_usage,
    nearest,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def alone(value: torch.Tensor) -> torch.Tensor:
    """all_reduce of a single process."""
    return value


# --- nearest ---


@pytest.mark.parametrize(
    ("queries", "keys", "dim"), [(1000, 5120, 4), (7, 1, 3), (1, 129, 8), (300, 128, 1), (9, 2, 2)]
)
def test_nearest_is_the_argmin_of_all_distances(queries, keys, dim):
    q, k = randn(queries, dim), randn(keys, dim, seed=1)
    found = nearest(q, k)
    distances = torch.cdist(q.double(), k.double())
    chosen = distances.gather(1, found[:, None])[:, 0]
    assert torch.equal(found, distances.argmin(1)) or torch.allclose(chosen, distances.amin(1), rtol=1e-5)
    assert found.dtype == torch.int64


def test_nearest_takes_the_first_of_equal_keys():
    keys = randn(10, 4).repeat(50, 1)
    assert nearest(keys[:10], keys).tolist() == list(range(10))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_nearest_is_a_key_even_of_what_overflowed(value):
    """The step is going to be skipped; it must get that far."""
    queries = torch.zeros(3, 4)
    queries[:, 0] = value
    assert nearest(queries, randn(100, 4)).max() < 100


def test_the_estimate_sees_one_operator_and_its_matrix_product() -> None:
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        found = nearest(torch.empty(1_000_000, 4), torch.empty(5120, 4))
    assert found.shape == (1_000_000,) and found.dtype == torch.int64
    assert counter.get_total_flops() == 2 * 1_000_000 * 5120 * 5


def test_nearest_works_in_bounded_memory(monkeypatch):
    """No matrix of queries by keys: the largest product stays within a block, however many queries there are."""
    sizes, mm = [], torch.mm

    def spy(a, b, out):
        sizes.append(out.numel())
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", spy)
    nearest(randn(4096, 4), randn(5120, 4))
    assert max(sizes) <= 1 << 18
    assert sum(sizes) >= 4096 * 5120


# --- vq ---


def naive_vq(z, weight):
    """VQ-VAE as in the paper, in fp64, with all distances and one-hot codes."""
    rows = z.permute(0, 2, 3, 4, 1).reshape(-1, z.shape[1])
    codes = (rows[:, None] - weight[None]).square().sum(2).argmin(1)
    q = F.one_hot(codes, len(weight)).to(weight) @ weight
    j = (rows[:, None] - weight[None]).square().sum(2).argmin(0)
    return {
        "tokens": codes.reshape(z.shape[0], *z.shape[2:]),
        "codebook": F.mse_loss(q, rows.detach()),
        "commitment": F.mse_loss(rows, q.detach()),
        "low_utilization": F.mse_loss(weight, rows[j].detach()),
        "latents": (rows + (q - rows).detach()).reshape(z.shape[0], *z.shape[2:], -1).movedim(-1, 1),
    }


def test_vq_equals_a_naive_reference_with_its_gradients():
    quantizer = VectorQuantizer(37, 5)
    z = randn(2, 5, 2, 3, 4).requires_grad_()
    out = quantizer(z)
    low = quantizer.low_utilization(z)
    total = out.codebook.mean() + 0.25 * out.commitment.mean() + 0.1 * low + (out.latents**3).sum()
    total.backward()

    z64 = z.detach().double().requires_grad_()
    weight = quantizer.weight.detach().double().requires_grad_()
    ref = naive_vq(z64, weight)
    (ref["codebook"] + 0.25 * ref["commitment"] + 0.1 * ref["low_utilization"] + (ref["latents"] ** 3).sum()).backward()

    assert torch.equal(out.tokens, ref["tokens"])
    for mine, name in (
        (out.codebook.mean(), "codebook"),
        (out.commitment.mean(), "commitment"),
        (low, "low_utilization"),
    ):
        torch.testing.assert_close(mine.double(), ref[name], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(z.grad.double(), z64.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(quantizer.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-6)


def test_vq_losses_are_by_sample():
    quantizer = VectorQuantizer(8, 3)
    z = randn(3, 3, 1, 2, 2)
    together = quantizer(z)
    for i in range(3):
        torch.testing.assert_close(quantizer(z[i : i + 1]).commitment[0], together.commitment[i])


def test_gradients_pass_straight_through():
    z = randn(1, 4, 1, 2, 2).requires_grad_()
    weights = randn(1, 4, 1, 2, 2, seed=2)
    for quantizer in (
        VectorQuantizer(16, 4),
        EMAVectorQuantizer(16, 4, 0.99, 0.1),
        LookupFreeQuantizer(4),
    ):
        out = quantizer(z)
        torch.testing.assert_close(out.latents, quantizer.lookup(out.tokens))  # forward: the code's vector ...
        [grad] = torch.autograd.grad((out.latents * weights).sum(), z)
        torch.testing.assert_close(grad, weights)  # ... backward: as if it were z itself


def test_low_utilization_pulls_an_idle_code_to_the_encoders_outputs_and_leaves_the_encoder_alone():
    quantizer = VectorQuantizer(4, 2)
    with torch.no_grad():
        quantizer.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [50.0, 50.0]]))
    z = randn(1, 2, 1, 8, 8).requires_grad_()
    assert 3 not in quantizer.encode(z)
    optimizer = torch.optim.SGD([quantizer.weight], lr=1.0)
    for _ in range(40):
        optimizer.zero_grad()
        quantizer.low_utilization(z).backward()
        optimizer.step()
    assert z.grad is None
    assert 3 in quantizer.encode(z)


def test_counts_are_of_the_epoch_and_not_of_the_last_batch():
    """The seed wrote `+used_indices` for `+=`, and so saw one batch."""
    quantizer = VectorQuantizer(4, 1)
    with torch.no_grad():
        quantizer.weight.copy_(torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    for value in (0.0, 0.0, 2.0):
        quantizer(torch.full((1, 1, 1, 1, 5), value))
        quantizer.after_step(alone, skipped=False)
    assert quantizer.counts.tolist() == [10, 0, 5, 0]
    usage, perplexity = codebook_usage(quantizer.counts)
    share = torch.tensor([2 / 3, 1 / 3])
    assert usage == 0.5
    assert perplexity == pytest.approx(math.exp(-(share * share.log()).sum()))
    state = {k: v.clone() for k, v in quantizer.state_dict().items()}
    resumed = VectorQuantizer(4, 1)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.counts, quantizer.counts)  # a resumed run goes on counting
    quantizer.after_epoch(0, reinit=False)
    assert quantizer.counts.sum() == 0


def test_eval_is_deterministic_and_leaves_no_trace():
    for quantizer in (VectorQuantizer(16, 4), EMAVectorQuantizer(16, 4, 0.9, 0.1)):
        quantizer.eval()
        before = {k: v.clone() for k, v in quantizer.state_dict().items()}
        z = randn(2, 4, 1, 3, 3)
        assert torch.equal(quantizer(z).latents, quantizer(z).latents)
        assert torch.equal(quantizer(z).tokens, quantizer.encode(z))
        assert quantizer(z).counts is None
        assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


def test_reinit_replaces_unused_codes_by_near_copies_of_used_ones_in_proportion_to_usage():
    quantizer = VectorQuantizer(1000, 4)
    quantizer.counts[:2] = torch.tensor([900, 100])
    before = quantizer.weight.detach().clone()
    quantizer.after_epoch(3, reinit=True)
    assert torch.equal(quantizer.weight[:2], before[:2])
    distances = torch.cdist(quantizer.weight[2:].detach(), before[:2])
    assert distances.amin(1).max() < 0.1
    assert 0.85 < (distances.argmin(1) == 0).float().mean() < 0.95
    assert len(quantizer.weight.unique(dim=0)) == 1000  # the seed's copies were exact, and so stayed one for ever

    again = VectorQuantizer(1000, 4)
    again.load_state_dict({**quantizer.state_dict(), "weight": before, "counts": torch.zeros(1000, dtype=torch.int64)})
    again.counts[:2] = torch.tensor([900, 100])
    again.after_epoch(3, reinit=True)
    assert torch.equal(again.weight, quantizer.weight)  # a function of the epoch: the same on every rank


@pytest.mark.parametrize("counts", [[1, 2, 3], [0, 0, 0]])
def test_reinit_where_all_or_none_are_used_changes_nothing(counts):
    quantizer = VectorQuantizer(3, 4)
    quantizer.counts.copy_(torch.tensor(counts))
    before = quantizer.weight.detach().clone()
    quantizer.after_epoch(0, reinit=True)
    assert torch.equal(quantizer.weight, before)


# --- ema_vq ---


def train_ema(quantizer, batches):
    """One optimizer step per list of micro-batches."""
    for micro_batches in batches:
        for z in micro_batches:
            quantizer(z)
        quantizer.after_step(alone, skipped=False)


def test_ema_follows_the_formula():
    quantizer = EMAVectorQuantizer(6, 3, decay=0.9, restart_below=0.0)
    train_ema(quantizer, [[randn(2, 3, 2, 4, 4)]])  # places the codes
    n, m, weight = (x.double() for x in (quantizer.ema_counts, quantizer.ema_sums, quantizer.weight))
    for step in range(5):
        z = randn(2, 3, 2, 4, 4, seed=10 + step)
        rows = z.permute(0, 2, 3, 4, 1).reshape(-1, 3).double()
        onehot = F.one_hot((rows[:, None] - weight[None]).square().sum(2).argmin(1), 6).double()
        n = 0.9 * n + 0.1 * onehot.sum(0)
        m = 0.9 * m + 0.1 * onehot.T @ rows
        weight = m / n[:, None]
        train_ema(quantizer, [[z]])
        torch.testing.assert_close(quantizer.weight.double(), weight, rtol=1e-5, atol=1e-6)


def test_ema_of_micro_batches_equals_that_of_the_whole():
    z = [randn(2, 3, 1, 4, 4, seed=i) for i in range(8)]
    whole, parts = (EMAVectorQuantizer(5, 3, 0.9, 0.1) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    train_ema(whole, [[torch.cat(z[i : i + 2])] for i in range(0, 8, 2)])
    train_ema(parts, [z[i : i + 2] for i in range(0, 8, 2)])
    torch.testing.assert_close(parts.weight, whole.weight)
    assert torch.equal(parts.counts, whole.counts)


def test_ema_of_two_ranks_equals_that_of_one_with_both_batches():
    z = [randn(2, 3, 1, 4, 4, seed=i) for i in range(2)]
    one = EMAVectorQuantizer(5, 3, 0.9, 0.1)
    ranks = [EMAVectorQuantizer(5, 3, 0.9, 0.1) for _ in range(2)]
    for rank in ranks:
        rank.load_state_dict(one.state_dict())
    for _ in range(30):  # enough for codes to die and be restarted
        train_ema(one, [[torch.cat(z)]])
        for rank, batch in zip(ranks, z, strict=True):
            rank(batch)
        names = ("pending", "pending_sums", "pending_moments")
        sums = {getattr(r, n).data_ptr(): sum(getattr(x, n).clone() for x in ranks) for r in ranks for n in names}
        for rank in ranks:
            rank.after_step(lambda value, sums=sums: sums[value.data_ptr()], skipped=False)
    assert torch.equal(ranks[0].weight, ranks[1].weight)
    torch.testing.assert_close(ranks[0].weight, one.weight)


def test_ema_is_placed_by_the_data_once_and_never_again_after_loading():
    """The seed's flag was a Python attribute: a codebook that was loaded was thrown away by the next batch."""
    quantizer = EMAVectorQuantizer(64, 3, 0.99, 0.1)
    train_ema(quantizer, [[100 + 5 * randn(2, 3, 2, 8, 8)]])
    assert quantizer.weight.mean().item() == pytest.approx(100, abs=3)
    assert quantizer.weight.std().item() == pytest.approx(5, rel=0.2)
    resumed = EMAVectorQuantizer(64, 3, 0.99, 0.1)
    resumed.load_state_dict(quantizer.state_dict())
    before = resumed.weight.clone()
    train_ema(resumed, [[100 + 5 * randn(2, 3, 2, 8, 8, seed=1)]])
    train_ema(quantizer, [[100 + 5 * randn(2, 3, 2, 8, 8, seed=1)]])
    assert torch.equal(resumed.weight, quantizer.weight)
    assert (resumed.weight - before).abs().mean() < 1


def test_ema_restarts_dead_codes_until_all_are_used():
    centres = 10 * randn(16, 2, seed=5)
    quantizer = EMAVectorQuantizer(16, 2, decay=0.9, restart_below=0.1)
    without = EMAVectorQuantizer(16, 2, decay=0.9, restart_below=0.0)
    for step in range(200):
        z = centres + 0.1 * randn(16, 2, seed=step)
        z = z.repeat(4, 1).T.reshape(1, 2, 1, 8, 8)
        train_ema(quantizer, [[z]])
        train_ema(without, [[z]])
    used = lambda q: len(q.encode(z).unique())
    assert used(quantizer) >= 15
    assert used(quantizer) > used(without)
    assert quantizer.weight.isfinite().all()


@pytest.mark.parametrize("make", [lambda: VectorQuantizer(8, 3), lambda: EMAVectorQuantizer(8, 3, 0.9, 0.1)])
@pytest.mark.parametrize("told", [True, False])
def test_a_bad_step_does_not_corrupt_the_codebook(make, told):
    """Whether the loop says that it skipped the step or just goes on to the next one."""
    quantizer = make()
    train_ema(quantizer, [[randn(1, 3, 1, 4, 4, seed=i)] for i in range(3)])
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    bad = randn(1, 3, 1, 4, 4)
    bad[0, 0, 0, 0, 0] = torch.nan
    quantizer(bad)
    if told:
        quantizer.after_step(alone, skipped=True)
        assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())
    train_ema(quantizer, [[randn(1, 3, 1, 4, 4, seed=9)]])
    assert all(v.isfinite().all() for v in quantizer.state_dict().values())


# --- fsq, lfq ---


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2,), (3, 4), (8, 8, 8, 5, 5, 5)])
def test_fsq_round_trip_reaches_every_code(levels):
    quantizer = FiniteScalarQuantizer(levels)
    assert quantizer.vocab == math.prod(levels)
    tokens = torch.arange(quantizer.vocab).reshape(1, 1, 1, -1)
    vectors = quantizer.lookup(tokens)
    assert vectors.shape == (1, len(levels), 1, 1, quantizer.vocab)
    assert vectors.abs().max() <= 1
    assert len(vectors.flatten(2).unique(dim=2)[0, 0]) == quantizer.vocab
    out = quantizer(3 * randn(2, len(levels), 2, 4, 4))
    torch.testing.assert_close(out.latents, quantizer.lookup(out.tokens))
    assert out.tokens.min() >= 0
    assert out.tokens.max() < quantizer.vocab


def test_fsq_equals_the_papers_code():
    """arXiv:2309.15505 appendix A.1, in fp64."""
    levels = torch.tensor([8.0, 5.0, 4.0], dtype=torch.float64)
    z = 2 * randn(2, 3, 2, 4, 4)
    rows = z.double().permute(0, 2, 3, 4, 1)
    half = (levels - 1) * (1 + 1e-3) / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0).double()
    bounded = torch.tanh(rows + torch.atanh(offset / half)) * half - offset
    expected = bounded.round() / (levels // 2)
    tokens = ((expected * (levels // 2) + levels // 2) * torch.tensor([1.0, 8.0, 40.0], dtype=torch.float64)).sum(-1)
    out = FiniteScalarQuantizer((8, 5, 4))(z)
    torch.testing.assert_close(out.latents.double(), expected.movedim(-1, 1), rtol=1e-6, atol=1e-6)
    assert torch.equal(out.tokens, tokens.long())


def test_fsq_gradient_is_that_of_the_bound():
    z = randn(1, 2, 1, 2, 2).requires_grad_()
    quantizer = FiniteScalarQuantizer((5, 5))
    [grad] = torch.autograd.grad(quantizer(z).latents.sum(), z)
    [smooth] = torch.autograd.grad((torch.tanh(z) * 2 * 1.001 / 2).sum(), z)
    torch.testing.assert_close(grad, smooth)


def test_lfq_round_trip_and_signs():
    quantizer = LookupFreeQuantizer(5)
    tokens = torch.arange(32).reshape(1, 1, 4, 8)
    vectors = quantizer.lookup(tokens)
    assert torch.equal(quantizer.encode(vectors), tokens)
    assert torch.equal(quantizer(0.3 * vectors).latents, vectors)
    assert torch.equal(vectors[0, :, 0, 0, 3], torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0]))


@pytest.mark.parametrize("bits", [3, 8])
def test_lfq_entropy_equals_that_over_all_codes(bits):
    quantizer = LookupFreeQuantizer(bits)
    z = randn(2, bits, 1, 3, 3)
    codes = quantizer.lookup(torch.arange(2**bits).reshape(1, 1, 1, -1))[0, :, 0, 0].T.double()
    rows = z.permute(0, 2, 3, 4, 1).reshape(-1, bits).double()
    log_p = F.log_softmax(-(rows[:, None] - codes[None]).square().sum(2), dim=1)
    mean = log_p.exp().mean(0)
    expected = -(log_p.exp() * log_p).sum(1).mean() + (mean * mean.log()).sum()
    torch.testing.assert_close(quantizer(z).entropy.double(), expected, rtol=1e-4, atol=1e-5)


def test_lfq_entropy_falls_as_codes_are_chosen_surely_and_evenly():
    quantizer = LookupFreeQuantizer(4)
    even = quantizer.lookup(torch.arange(16).reshape(1, 1, 4, 4))
    sure, unsure, alike = quantizer(5 * even).entropy, quantizer(0.1 * even).entropy, quantizer(5 * even.abs()).entropy
    assert sure.item() == pytest.approx(-4 * math.log(2), abs=1e-3)
    assert sure < unsure
    assert sure < alike
    assert quantizer(torch.full((1, 4, 1, 1, 1), 200.0)).entropy.isfinite()


def test_quantisers_are_fp32_under_autocast():
    z = randn(1, 4, 1, 8, 8)
    for quantizer in (VectorQuantizer(64, 4), FiniteScalarQuantizer((5, 5, 5, 5)), LookupFreeQuantizer(4)):
        expected = quantizer(z)
        with torch.autocast("cpu", torch.bfloat16):
            out = quantizer(z)
            assert torch.equal(quantizer.encode(z), expected.tokens)
        assert torch.equal(out.tokens, expected.tokens)
        assert out.latents.dtype == torch.float32
