"""The reconstruction objective: its formula in the seed's units, its randomness, and its hooks."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mutoscope.autoencoders.conv import ConvAutoencoder, ConvAutoencoderModel
from mutoscope.autoencoders.presets import preset
from mutoscope.objectives.reconstruction import Reconstruction
from mutoscope.randomness import Draw
from mutoscope.types import Batch, Cond, ModelIO

SMALL = ConvAutoencoder(encoder_channels=(8,), decoder_channels=(8, 8))
VQ = replace(SMALL, bottleneck="vq", num_codes=16)
EMA_VQ = replace(SMALL, bottleneck="ema_vq", num_codes=16)
KL = replace(SMALL, bottleneck="kl")


def build(config: ConvAutoencoder) -> ConvAutoencoderModel:
    torch.manual_seed(0)
    return config.build(ModelIO(channels=3, grid=(4, 16, 16)))


def batch(samples=(0, 1), seed: int = 0) -> Batch:
    video = torch.stack(
        [torch.rand(3, 4, 16, 16, generator=torch.Generator().manual_seed(100 * seed + n)) * 2 - 1 for n in samples]
    )
    return Batch(ids=[f"c{n}" for n in samples], samples=list(samples), cond=Cond(), video=video)


def draw(samples=(0, 1)) -> Draw:
    return Draw(0, "train", list(samples))


def alone(value: torch.Tensor) -> torch.Tensor:
    return value


def test_reconstruction_is_in_the_seeds_units():
    model, data = build(SMALL), batch()
    loss = Reconstruction().loss(model, data, draw())
    expected = F.mse_loss(model.decoder(model.encoder(data.video / 2)), data.video / 2)  # pixels in [-0.5, 0.5]
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.parts["reconstruction"], expected.detach())
    torch.testing.assert_close(loss.per_sample.mean(), loss.total.detach())


def test_each_weight_does_what_it_says():
    """In the seed's README command none of them did anything."""
    data = batch()
    for config, field, part in (
        (KL, "kl_loss_weight", "kl"),
        (VQ, "commitment_cost", "commitment"),
        (VQ, "low_utilization_cost", "low_utilization"),
        (replace(SMALL, bottleneck="lfq"), "entropy_weight", "entropy"),
    ):
        model = build(config)
        low, high = (Reconstruction(**{field: w}).loss(model, data, draw()) for w in (0.5, 2.5))
        torch.testing.assert_close(high.total - low.total, 2 * high.parts[part], rtol=1e-4, atol=1e-6)
        assert high.parts[part] != 0


def test_vq_total_is_the_seeds():
    model, data = build(VQ), batch()
    loss = Reconstruction(commitment_cost=0.25, low_utilization_cost=0.1).loss(model, data, draw())
    p = loss.parts
    expected = p["reconstruction"] + 1.25 * p["commitment"] + 0.1 * p["low_utilization"]
    torch.testing.assert_close(loss.total.detach(), expected)


def test_a_sample_is_the_same_in_any_company_and_the_global_generator_is_left_alone():
    model = build(KL)
    objective = Reconstruction()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    together = objective.loss(model, batch((3, 4, 5)), draw((3, 4, 5)))
    assert torch.equal(torch.get_rng_state(), before)
    for i, n in enumerate((3, 4, 5)):
        alone_loss = objective.loss(model, batch((n,)), draw((n,)))
        torch.testing.assert_close(alone_loss.per_sample[0], together.per_sample[i], rtol=1e-5, atol=1e-6)
    other = objective.loss(model, batch((3, 4, 5)), Draw(1, "train", [3, 4, 5]))
    assert other.total != together.total


def test_validation_is_deterministic_and_without_noise():
    model = build(KL).eval()
    objective = Reconstruction()
    first, second = (objective.validation_loss(model, batch(), Draw(seed, "x", [0, 1])) for seed in (0, 1))
    assert torch.equal(first.total, second.total)
    assert first.parts["psnr"].item() == pytest.approx(-10 * first.parts["reconstruction"].log10().item(), abs=0.05)


def test_the_model_is_called_only_as_a_module():
    """So that the hooks of DDP run: a wrapper without `encode` or `decode` will do."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    wrapped = Wrapper(build(VQ))
    Reconstruction(low_utilization_cost=0.1).loss(wrapped, batch(), draw()).total.backward()
    assert wrapped.calls == 1
    assert all(p.grad is not None for p in wrapped.parameters())


def steps(model, objective, count, start=0):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss = None
    for step in range(start, start + count):
        for micro in range(2):
            loss = objective.loss(model, batch(seed=2 * step + micro), draw((2 * step + micro, 99)))
            (loss.total / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(model, alone)
    return loss


def test_usage_and_perplexity_are_over_the_epoch():
    model, objective = build(VQ), Reconstruction()
    model.train()
    loss = steps(model, objective, 4)
    assert model.quantizer.counts.sum() == 4 * 2 * 2 * 16  # steps × micro-batches × clips × positions
    values = objective.after_epoch(model, 0, alone)
    assert values["epoch_codebook_usage"] == pytest.approx(loss.parts["codebook_usage"].item())
    assert 1 <= values["epoch_perplexity"] <= 16
    assert values["epoch_perplexity"] == pytest.approx(loss.parts["perplexity"].item(), rel=0.1)
    assert model.quantizer.counts.sum() == 0
    assert "perplexity" not in objective.validation_loss(model.eval(), batch(), draw()).parts


def test_reinit_happens_every_so_many_epochs():
    for every, expected in ((0, []), (1, [0, 1, 2, 3]), (2, [1, 3])):
        objective = Reconstruction(reinit_every_n_epochs=every)
        model = build(VQ)
        happened = []
        for epoch in range(4):
            model.quantizer.counts[0] = 5
            before = model.quantizer.weight.detach().clone()
            objective.after_epoch(model, epoch, alone)
            if not torch.equal(before, model.quantizer.weight):
                happened.append(epoch)
        assert happened == expected


def test_a_skipped_step_leaves_no_trace_in_the_codebook():
    model, objective = build(EMA_VQ), Reconstruction()
    model.train()
    steps(model, objective, 3)
    before = {k: v.clone() for k, v in model.quantizer.state_dict().items()}
    objective.loss(model, batch(seed=50), draw())
    objective.after_step(model, alone, skipped=True)
    assert all(torch.equal(v, before[k]) for k, v in model.quantizer.state_dict().items())


@pytest.mark.parametrize("config", [VQ, EMA_VQ])
def test_training_from_a_state_dict_goes_on_bit_for_bit(config):
    """In the middle of an epoch, with the codebook's statistics."""
    objective = Reconstruction()
    model = build(config).train()
    steps(model, objective, 3)
    resumed = build(replace(config)).train()
    resumed.load_state_dict(model.state_dict())
    steps(model, objective, 3, start=3)
    steps(resumed, objective, 3, start=3)
    for (name, a), b in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_training_lowers_the_loss_for_every_bottleneck():
    for bottleneck, more in (
        ("none", {}), ("kl", {}), ("vq", {"num_codes": 32}), ("kl_vq", {"num_codes": 32}),
        ("ema_vq", {"num_codes": 32}), ("fsq", {"fsq_levels": (5, 5, 5, 5)}), ("lfq", {}),
    ):  # fmt: skip
        model = build(replace(SMALL, bottleneck=bottleneck, **more)).train()
        objective = Reconstruction(kl_loss_weight=0.01)
        data = replace(batch(), video=batch().video.mean((2, 3, 4), keepdim=True).expand(2, 3, 4, 16, 16) * 10)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        first = last = None
        for _ in range(30):
            loss = objective.loss(model, data, draw())
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            objective.after_step(model, alone)
            last = loss.parts["reconstruction"].item()
            first = first if first is not None else last
        assert last < 0.7 * first, bottleneck


def test_costs_that_would_do_nothing_are_errors():
    for field in ("low_utilization_cost", "reinit_every_n_epochs"):
        for config in (KL, EMA_VQ):
            with pytest.raises(ValueError, match=f"objective.{field}=1 needs a codebook"):
                Reconstruction(**{field: 1}).validation_loss(build(config), batch(), draw())
    with pytest.raises(ValueError, match="kl_loss_weight=-1"):
        Reconstruction(kl_loss_weight=-1)


def test_it_wants_pixels_and_an_autoencoder():
    tokens = Batch(ids=["a"], samples=[0], cond=Cond(), tokens=torch.zeros(1, 1, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="learns from pixels"):
        Reconstruction().loss(build(VQ), tokens, draw((0,)))
    with pytest.raises(ValueError, match="not a Linear"):
        Reconstruction().loss(nn.Linear(1, 1), batch(), draw())


def test_full_precision_losses_under_autocast():
    model = build(VQ)
    with torch.autocast("cpu", torch.bfloat16):
        loss = Reconstruction(low_utilization_cost=0.1).loss(model, batch(), draw())
    loss.total.backward()
    assert loss.total.dtype == torch.float32
    full = Reconstruction(low_utilization_cost=0.1).loss(model, batch(), draw())
    torch.testing.assert_close(loss.total, full.total, rtol=0.05, atol=0)


def test_preset_of_the_readme_trains_a_step():
    model = preset("s8_b").build(ModelIO(channels=3, grid=(4, 16, 16))).train()
    loss = Reconstruction(low_utilization_cost=0.1).loss(model, batch(), draw())
    loss.total.backward()
    assert model.quantizer.weight.grad.abs().sum(1).gt(0).all()  # every code moves, used or not
