"""Half-precision models: a step of 3e-5 still points the right way."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from probe import SearchOutcome, critical_sharpness
from probe.errors import ConfigError

ETA = 3e-5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _wide_layer() -> tuple[nn.Linear, Tensor]:
    """bf16 weights of std 0.02 and a direction with |delta| = 1 in every element (Adam's)."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(256, 256, generator=generator) * 0.02)
    signs = torch.randint(0, 2, (256, 256), generator=generator).float() * 2 - 1
    return layer, signs


def _realised_step(layer: nn.Linear, delta: Tensor, half_precision: str) -> Tensor:
    """theta - (what the forward pass sees at ETA), read through the layer on the identity."""
    seen: list[Tensor] = []
    theta = layer.weight.detach().float().clone()

    def loss_fn() -> float:
        weight = layer(torch.eye(256, dtype=torch.bfloat16)).T.float()
        seen.append(theta - weight)
        return float(len(seen))  # any loss: the first trial at eta_init is what counts

    critical_sharpness(
        layer,
        loss_fn,
        direction={"weight": delta},
        eta_init=ETA,
        half_precision=half_precision,
        max_forward_passes=3,
    )
    assert not seen[0].any()  # eta = 0
    return seen[1]


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_the_bf16_trap() -> None:
    """The trap as measured: cast last, 70 % of weights do not move, cosine about 0.55.

    With fp32 twins every weight moves and the step is the wanted one.
    """
    layer, delta = _wide_layer()
    cast = _realised_step(layer, delta, "cast")
    assert 0.6 < float((cast == 0).float().mean()) < 0.8
    assert _cosine(cast, delta) < 0.65
    upcast = _realised_step(layer, delta, "upcast")
    assert not (upcast == 0).any()
    # theta < 0.1 rounds by 4e-9 in fp32, against a step of 3e-5.
    assert _cosine(upcast, delta) > 0.999_999
    assert torch.allclose(upcast, ETA * delta, rtol=0, atol=1e-8)


def test_accumulating_in_bf16_is_what_casting_last_avoids() -> None:
    """In "cast" mode moves do not add up their roundings: each starts from theta."""
    layer, delta = _wide_layer()
    first = _realised_step(layer, delta, "cast")
    assert torch.equal(first, _realised_step(layer, delta, "cast"))


class TinyLanguageModel(nn.Module):
    """Tokens in, mean nats out; tied head, LSTM, half-precision buffer, a hard-coded cast."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.mixer = nn.LSTM(16, 16, batch_first=True)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.full((16,), 0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.mixer(self.embedding(tokens) * self.scale)
        hidden = self.norm(hidden.flatten(0, 1)).to(self.scale.dtype).bfloat16()
        return nn.functional.cross_entropy(self.head(hidden).float(), tokens.flatten())


def _language_model(dtype: torch.dtype) -> tuple[TinyLanguageModel, Tensor]:
    torch.manual_seed(2)
    model = TinyLanguageModel().to(torch.bfloat16).to(dtype)  # the same bf16-exact weights
    tokens = torch.randint(0, 32, (8, 12), generator=torch.Generator().manual_seed(1))
    return model, tokens


def test_a_bf16_model_is_measured_as_its_fp32_copy() -> None:
    """Upcast, the bf16 model and an fp32 copy of it give the same trials to the bit."""
    found = []
    direction: dict[str, Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, tokens = _language_model(dtype)
        if dtype is torch.float32:  # the direction and the casts of the fp32 copy
            model.head.register_forward_pre_hook(lambda _, args: tuple(a.float() for a in args))
            model(tokens).backward()
            direction = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append(critical_sharpness(model, lambda m=model, t=tokens: m(t), direction=direction))
    assert found[0].outcome is SearchOutcome.CONVERGED
    assert found[0] == found[1]


def test_bf16_optimizer_end_to_end() -> None:
    model, tokens = _language_model(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(tokens).backward()
    found = critical_sharpness(model, lambda: model(tokens), optimizer=optimizer)
    assert found.outcome is SearchOutcome.CONVERGED
    assert found.eta_lower < found.eta_upper
    # The slope from bf16 gradients (8 bits) is that of the fp32 losses near 0.
    eta, loss = min(found.trials)
    assert found.slope is not None
    assert found.slope < (loss - found.loss_at_zero) / eta


def test_mixed_models_move_every_parameter() -> None:
    """fp32 norms beside bf16 weights: in place the ones, by twins the others."""
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4))
    direction = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen: list[dict[str, Tensor]] = []

    def loss_fn() -> float:
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return float(len(seen))

    critical_sharpness(model, loss_fn, direction=direction, eta_init=ETA, max_forward_passes=3)
    for name, parameter in seen[1].items():
        assert parameter.dtype is torch.float32
        assert torch.equal(parameter, before[name].float() - ETA * torch.ones_like(parameter))
    for name, parameter in model.named_parameters():
        assert parameter.dtype is before[name].dtype
        assert torch.equal(parameter, before[name])


def test_frozen_half_precision_with_fp32_adapters_is_left_in_half() -> None:
    """Nothing that moves is half precision, so nothing is cast."""
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    direction = {n: torch.ones_like(p) for n, p in model[1].named_parameters(prefix="1")}
    dtypes = set()

    def loss_fn() -> float:
        dtypes.add(model[0].weight.dtype)
        return float(model[1].weight.sum())

    critical_sharpness(model, loss_fn, direction=direction, max_forward_passes=3)
    assert dtypes == {torch.bfloat16}


def test_loss_at_zero_of_another_precision_is_refused() -> None:
    model, tokens = _language_model(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = model(tokens)
    loss.backward()
    with pytest.raises(ConfigError, match="half-precision weights"):
        critical_sharpness(model, lambda: model(tokens), optimizer=optimizer, loss_at_zero=loss)
    found = critical_sharpness(
        model,
        lambda: model(tokens),
        optimizer=optimizer,
        loss_at_zero=loss,
        half_precision="cast",
    )
    assert found.loss_at_zero == loss.item()


def test_an_error_at_fp32_twins_says_so() -> None:
    weight = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)

    def loss_fn() -> Tensor:
        return (torch.ones(1, 2, dtype=torch.bfloat16) @ weight.weight).sum()

    with pytest.raises(RuntimeError) as caught:
        critical_sharpness(weight, loss_fn, direction={"weight": torch.ones(2, 2)})
    assert "half_precision='cast'" in caught.value.__notes__[0]
