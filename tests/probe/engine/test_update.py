"""Moments and directions against torch.optim itself, run over the same batches."""

import math
from types import SimpleNamespace

import pytest
import torch

from probe.directions.blocks import inner_product
from probe.errors import CheckpointError, DirectionError
from probe.loss import CausalLoss
from probe.moments import CheckpointMoments, NoMoments, WarmupMoments, choose_moments
from probe.parallel.single import SingleModel
from probe.spec import AdamW, Sgd
from probe.update import UpdateRule, clip_scale, slope_along, weight_decay_of

CPU = torch.device("cpu")


class Saved:
    """A checkpoint's optimizer state, straight from a torch optimizer."""

    has_moments = True

    def __init__(self, model, optimizer):
        self.state = {n: optimizer.state[p] for n, p in model.named_parameters()}

    def read(self, name, kind, lo=0, hi=None):
        return self.state[name][kind].flatten()[lo:hi].clone()

    def hyper(self, name):
        return {"step": float(self.state[name]["step"])}


def torch_adamw(model, spec, lr):
    groups = [
        {"params": [p], "weight_decay": weight_decay_of(n, spec)}
        for n, p in model.named_parameters()
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=spec.betas, eps=spec.eps)


def mean_gradient(model, loss, batch):
    grads = model.gradient(lambda: loss.backward(batch))
    for grad in grads:
        grad.div_(batch.num_targets)
    return grads


def reference_step(model, optimizer, dense_loss, batch, clip=None):
    optimizer.zero_grad()
    dense_loss(model, dict(model.named_parameters()), batch).backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


@pytest.fixture
def setting(tiny_model, token_batch):
    model = tiny_model()
    ours = SingleModel(model, model, CPU)
    loss = CausalLoss(model, micro_batch_sequences=2)
    batches = [token_batch(3, seed=seed, ragged=True) for seed in range(5)]
    return SimpleNamespace(model=model, ours=ours, loss=loss, batches=batches)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_warmup_moments_equal_torch_adamw_at_lr_zero(setting, tiny_model, dense_loss, clip):
    spec = AdamW(clip_grad_norm=clip, weight_decay=0.1, betas=(0.8, 0.95))
    twin = tiny_model()
    optimizer = torch_adamw(twin, spec, lr=0.0)
    moments = WarmupMoments(setting.ours.shards, spec.betas, why="test")
    rule = UpdateRule(setting.ours, spec, moments)
    for batch in setting.batches[:4]:
        rule.absorb(mean_gradient(setting.ours, setting.loss, batch))
        reference_step(twin, optimizer, dense_loss, batch, clip)

    for index, (name, parameter) in enumerate(twin.named_parameters()):
        state = optimizer.state[parameter]
        exp_avg, exp_avg_sq = moments.before(index)
        assert moments.step_after(index) == int(state["step"]) + 1 == 5
        for found, expected in ((exp_avg, state["exp_avg"]), (exp_avg_sq, state["exp_avg_sq"])):
            scale = expected.abs().max().item()  # fp32 gradients agree to about 1e-6 of it
            torch.testing.assert_close(
                found, expected.flatten(), rtol=1e-3, atol=1e-5 * scale, msg=lambda m, n=name: n + m
            )


@pytest.mark.parametrize("clip", [None, 0.05])
def test_direction_from_saved_moments_is_the_next_real_step(
    setting, tiny_model, token_batch, dense_loss, clip
):
    spec = AdamW(clip_grad_norm=clip, weight_decay=0.1, eps=1e-6)
    lr = 1e-3
    twin = tiny_model()
    optimizer = torch_adamw(twin, spec, lr=lr)
    for batch in setting.batches[:3]:
        reference_step(twin, optimizer, dense_loss, batch, clip)
    ours = SingleModel(tiny_model(), twin, CPU)
    moments = choose_moments(spec, Saved(twin, optimizer), ours.shards, label="step 3")
    assert isinstance(moments, CheckpointMoments)
    assert moments.detail == "Read from the checkpoint, saved at optimizer step 3."
    # The saved state is a view into a live optimizer: keep it from moving under the step below.
    frozen = {n: {k: v.clone() for k, v in s.items()} for n, s in moments._checkpoint.state.items()}
    moments._checkpoint.state = frozen
    before = [p.detach().double().flatten() for p in twin.parameters()]
    loss = CausalLoss(ours.model, micro_batch_sequences=2)
    rule = UpdateRule(ours, spec, moments)
    repeats = [rule.direction(mean_gradient(ours, loss, setting.batches[3])) for _ in range(2)]
    reference_step(twin, optimizer, dense_loss, setting.batches[3], clip)

    for start, parameter, delta in zip(before, twin.parameters(), repeats[0][0], strict=True):
        moved = (start - parameter.detach().double().flatten()) / lr
        # theta near 1 in fp32, divided by lr 1e-3: 6e-8 / 1e-3.
        torch.testing.assert_close(delta.double(), moved, rtol=1e-3, atol=3e-4)
    # Repeats are independent draws: the same batch gives the same direction again.
    assert all(torch.equal(a, b) for a, b in zip(repeats[0][0], repeats[1][0], strict=True))


def test_warmup_moments_go_on_over_the_repeats(setting):
    spec = AdamW()
    moments = WarmupMoments(setting.ours.shards, spec.betas, why="test")
    rule = UpdateRule(setting.ours, spec, moments)
    grads = mean_gradient(setting.ours, setting.loss, setting.batches[0])
    kept = [grad.clone() for grad in grads]
    rule.direction(grads)
    assert grads == [None] * len(grads)  # given up shard by shard, so that memory does not double
    assert moments.step_after(0) == 2
    torch.testing.assert_close(moments.before(3)[0], 0.1 * kept[3], rtol=1e-6, atol=0)


def test_first_adamw_step_is_the_sign_of_the_gradient_plus_decay(setting):
    spec = AdamW(eps=1e-30, weight_decay=0.5, no_decay=["*norm*"])
    rule = UpdateRule(
        setting.ours, spec, WarmupMoments(setting.ours.shards, spec.betas, why="test")
    )
    grads = mean_gradient(setting.ours, setting.loss, setting.batches[0])
    signs = [grad.sign() for grad in grads]
    delta, _ = rule.direction(grads)
    for shard, sign, step in zip(setting.ours.shards, signs, delta, strict=True):
        decay = 0.0 if "norm" in shard.name else 0.5
        seen = sign != 0
        expected = sign + decay * shard.base
        torch.testing.assert_close(step[seen], expected[seen], rtol=2e-5, atol=2e-6)


def test_slope_is_taken_with_the_unclipped_gradient(setting):
    grads = mean_gradient(setting.ours, setting.loss, setting.batches[0])
    kept = [grad.clone() for grad in grads]
    squared = sum(inner_product(grad, grad) for grad in kept)
    limit = 0.1 * math.sqrt(squared)
    rule = UpdateRule(setting.ours, Sgd(name="sgd", clip_grad_norm=limit), NoMoments())
    delta, slope = rule.direction(grads)
    assert slope == pytest.approx(-0.1 * squared, rel=1e-4)
    assert slope == pytest.approx(slope_along(setting.ours, delta, kept), rel=1e-12)
    assert math.sqrt(sum(inner_product(d, d) for d in delta)) == pytest.approx(limit, rel=1e-4)


def test_slope_is_the_derivative_of_the_loss_along_the_ray(tiny_model, token_batch):
    model = tiny_model(dtype=torch.float64)
    ours = SingleModel(model, model, CPU)
    loss = CausalLoss(model, micro_batch_sequences=2)
    batch = token_batch(3, ragged=True)
    moments = WarmupMoments(ours.shards, (0.9, 0.95), why="test")
    delta, slope = UpdateRule(ours, AdamW(), moments).direction(mean_gradient(ours, loss, batch))

    def loss_at(eta):
        for shard, step in zip(ours.shards, delta, strict=True):
            shard.live.copy_(shard.base - eta * step)
        return loss.mean(batch)

    h = 1e-4  # norms run in fp32: 1e-7 / 1e-4 of noise, h^2 of truncation
    assert slope == pytest.approx((loss_at(h) - loss_at(-h)) / (2 * h), rel=1e-3)


def test_moments_checkpoint_without_optimizer_state_is_refused(setting):
    bare = SimpleNamespace(has_moments=False)
    with pytest.raises(CheckpointError) as caught:
        choose_moments(AdamW(moments="checkpoint"), bare, setting.ours.shards, label="step 1000")
    assert str(caught.value) == (
        "adamw direction needs exp_avg_sq for 'model.embed_tokens.weight'; checkpoint step 1000 "
        "has none. Use optimizer.moments: warmup, or a checkpoint saved with optimizer state."
    )
    auto = choose_moments(AdamW(), bare, setting.ours.shards, label="step 1000")
    assert isinstance(auto, WarmupMoments)
    assert "no optimizer state" in auto.detail


def test_warmup_can_be_asked_for_where_moments_are_saved(setting):
    saved = SimpleNamespace(has_moments=True)
    found = choose_moments(AdamW(moments="warmup"), saved, setting.ours.shards, label="x")
    assert found.source == "warmup"
    assert "asked for" in found.detail


def test_a_gradient_that_is_not_finite_is_an_error(setting):
    grads = mean_gradient(setting.ours, setting.loss, setting.batches[0])
    grads[2][5] = math.nan
    name = setting.ours.shards[2].name
    with pytest.raises(DirectionError, match=name.replace(".", r"\.")):
        clip_scale(setting.ours, grads, None)


def test_a_parameter_without_gradient_stays_where_it_is(setting):
    grads = mean_gradient(setting.ours, setting.loss, setting.batches[0])
    grads[1] = None
    moments = WarmupMoments(setting.ours.shards, (0.9, 0.95), why="test")
    delta, _ = UpdateRule(setting.ours, AdamW(), moments).direction(grads)
    assert not delta[1].any()  # torch.optim skips it too, decay included
    assert moments.step_after(1) == 1


def test_half_precision_keeps_an_fp32_base_and_fp32_gradients(tiny_model, token_batch):
    stored = tiny_model()
    half = tiny_model(dtype=torch.bfloat16)
    ours = SingleModel(half, stored, CPU)
    for shard, (name, parameter) in zip(ours.shards, stored.named_parameters(), strict=True):
        assert shard.name == name
        assert shard.base.dtype == torch.float32
        assert torch.equal(shard.base, parameter.flatten())  # nothing was rounded to bf16
        assert torch.equal(shard.live, parameter.flatten().bfloat16())
    loss = CausalLoss(half, micro_batch_sequences=1)
    batches = [token_batch(1, seed=seed) for seed in range(8)]
    single = [ours.gradient(lambda b=b: loss.backward(b)) for b in batches]
    together = ours.gradient(lambda: [loss.backward(b) for b in batches])
    assert all(p.grad is None for p in half.parameters())
    for index, total in enumerate(together):
        assert total.dtype == torch.float32
        # Added up in fp32: exactly the fp32 sum of the bf16 parts, in order.
        expected = single[0][index]
        for part in single[1:]:
            expected = expected + part[index]
        assert torch.equal(total, expected)


def test_a_small_step_on_bf16_weights_points_the_right_way(tiny_model):
    """std 0.02, |delta| = 1, eta 3e-5: the trap in which 70 % of the weights do not move."""
    torch.manual_seed(0)
    stored = tiny_model(initializer_range=0.02)
    ours = SingleModel(tiny_model(dtype=torch.bfloat16), stored, CPU)
    shard = next(s for s in ours.shards if "mlp" in s.name)
    step = torch.randn_like(shard.base).sign()
    base = shard.base.double()
    wanted = -3e-5 * step.double()
    from_base = (shard.base - 3e-5 * step).double() - base
    from_bf16 = (shard.live - (3e-5 * step).bfloat16()).double() - shard.live.double()
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(from_base, wanted, dim=0) > 0.9999
    assert cosine(from_bf16, wanted, dim=0) < 0.7


def test_loading_the_next_checkpoint_in_place(tiny_model, token_batch):
    first, second = tiny_model(seed=0), tiny_model(seed=1)
    ours = SingleModel(first, first, CPU)
    ours.load(second)
    batch = token_batch(2)
    assert CausalLoss(first, micro_batch_sequences=1).mean(batch) == CausalLoss(
        second, micro_batch_sequences=1
    ).mean(batch)
    with pytest.raises(CheckpointError, match="share one architecture"):
        ours.load(tiny_model(intermediate_size=40))
