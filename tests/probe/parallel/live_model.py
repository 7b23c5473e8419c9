"""A small language model, its data, and its training on one process: the truth of the live tests.

One step takes one micro-batch per rank. The reference runs them one after the other, in the
forward dtype, from fp32 masters, and adds the gradients as the ranks' reduction would.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from probe import critical_sharpness
from probe.directions import mapping_direction, optimizer_direction
from probe.perturb import Ray

VOCAB, HIDDEN, LENGTH = 211, 20, 12  # uneven over 2 and over 3 ranks
ETAS = [0.0, 1e-4, 1e-2, 1e-1]
SEARCHES = ["bisect", "interpolate"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 31)
        self.down = nn.Linear(31, HIDDEN, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        past = (
            x + functional.pad(x, (0, 0, 1, 0))[:, :-1]
        )  # the token before, in place of attention
        return x + self.dropout(self.down(functional.gelu(self.up(self.norm(past)))))


class Model(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.few = nn.Parameter(torch.zeros(1, HIDDEN))  # fewer rows than ranks
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.few
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def new_model(*, tied: bool = False) -> Model:
    torch.manual_seed(7)
    model = Model(tied=tied)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: matrices with decay, the rest without and at half the learning rate."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for _, p in named if p.ndim == 2], "lr": 1e-2, "weight_decay": 0.1},
        {"params": [p for _, p in named if p.ndim != 2], "lr": 5e-3, "weight_decay": 0.0},
    ]


def new_optimizer(model: nn.Module, kind: str = "AdamW") -> torch.optim.Optimizer:
    if kind == "SGD":
        return torch.optim.SGD(groups_of(model), lr=1e-2, momentum=0.9, nesterov=True)
    return getattr(torch.optim, kind)(groups_of(model), lr=1e-2)


def batch_of(step: int, micro: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + micro)
    return torch.randint(VOCAB, (2, LENGTH), generator=generator)


def loss_sum(logits: Tensor, ids: Tensor) -> Tensor:
    return functional.cross_entropy(
        logits[:, :-1].float().reshape(-1, VOCAB), ids[:, 1:].reshape(-1), reduction="sum"
    )


COUNT = 2 * (LENGTH - 1)


def dropout_seed(micro: int) -> None:
    """The masks of a micro-batch, whichever process runs it."""
    torch.manual_seed(50 + micro)


def random_direction(model: nn.Module, shapes: dict[str, Any] | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    shapes = shapes or {name: p.shape for name, p in model.named_parameters()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Single:
    """The run of one process with masters in fp32 and the stock optimizer."""

    def __init__(self, case: dict[str, Any], num_micro: int) -> None:
        self.case, self.num_micro = case, num_micro
        self.dtype = getattr(torch, case["dtype"])
        self.model = new_model(tied=case.get("tied", False))
        if case.get("rounded"):  # DeepSpeed makes its masters from the rounded weights
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.copy_(parameter.to(self.dtype))
        self.optimizer = new_optimizer(self.model, case.get("optimizer", "AdamW"))

    def logits(self, ids: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return functional_call(self.model, weights, (ids,))

    def cast(self) -> dict[str, Tensor]:
        return {n: p.detach().to(self.dtype) for n, p in self.model.named_parameters()}

    def loss(self, step: int) -> tuple[float, int]:
        total = 0.0
        for micro in range(self.num_micro):
            dropout_seed(micro)
            ids = batch_of(step, micro)
            total += float(loss_sum(self.logits(ids, self.cast()), ids))
        return total, COUNT * self.num_micro

    def backward(self, step: int) -> None:
        found: dict[str, Tensor] = {}
        for micro in range(self.num_micro):
            weights = {n: w.requires_grad_() for n, w in self.cast().items()}
            dropout_seed(micro)
            ids = batch_of(step, micro)
            loss = loss_sum(self.logits(ids, weights), ids) / COUNT
            (loss * self.case.get("scale", 1.0)).backward()
            for name, weight in weights.items():
                grad = weight.grad.to(getattr(torch, self.case.get("reduce", "float32")))
                found[name] = found[name] + grad if name in found else grad
        for name, parameter in self.model.named_parameters():
            grad = (found[name] / self.num_micro).float()
            parameter.grad = grad / self.case.get("scale", 1.0)
        self.gradient = {n: p.grad.clone() for n, p in self.model.named_parameters()}
        if clip := self.case.get("clip"):
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)

    def train(self, step: int) -> None:
        self.backward(step)
        self.optimizer.step()

    def along(self, step: int, update: Any) -> list[float]:
        ray = Ray.through([p.data for p in update.parameters], update.delta)
        losses = []
        for eta in ETAS:
            ray.move(eta)
            total, count = self.loss(step)
            losses.append(total / count)
        ray.restore()
        return losses

    def truth(self, step: int) -> dict[str, Any]:
        """After the backward pass of this step."""

        def measure(**options: Any) -> Any:
            return critical_sharpness(self.model, lambda: self.loss(step), eta_init=1e-3, **options)

        direction = random_direction(self.model)
        update = optimizer_direction(self.model, self.optimizer)
        products = [
            float((delta.double() * self.gradient[name].double()).sum())  # before any clipping
            for name, delta in zip(update.names, update.delta, strict=True)
        ]
        return {
            "sweep": self.along(step, update),
            "direction_sweep": self.along(step, mapping_direction(self.model, direction)),
            "searches": {
                s: fields(measure(optimizer=self.optimizer, slope=None, search=s)) for s in SEARCHES
            },
            "direction_search": fields(measure(direction=direction)),
            "slope": -sum(products),
        }


def fields(found: Any) -> list[Any]:
    return [
        found.outcome.value,
        found.eta_lower,
        found.eta_upper,
        found.loss_at_zero,
        *found.trials,
    ]
