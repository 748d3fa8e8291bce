"""Operators of which torch's tracers or kernels do something unexpected: bit-equal to eager at any budget."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions, nn

from fxhybrid.capture.step import StepCall
from fxhybrid.pipeline import prepare
from fxhybrid.profiling.op_profiler import Profile
from tests.compare import tensors_of, tighten, twins

N = 16


class Head(nn.Module):
    """A linear layer, a norm over its columns, and any function of what it gives."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(N, N)
        self.layers = nn.ModuleList(layers)
        self.function = function

    def forward(self, x: Tensor, *args: Any) -> Any:
        return self.function(self.linear(x), *self.layers, *args)


def total(output: Any, *, every: bool = True) -> Tensor:
    """A scalar of all outputs, or of the first alone."""
    tensors = [t for t in tensors_of(output) if t.requires_grad]
    return torch.stack([t.square().mean() for t in (tensors if every else tensors[:1])]).sum()


def check(model: nn.Module, *args: Any, every: bool = True) -> None:
    """A step with all memory and one with the least, each bit-equal to eager."""
    pair = twins(model)

    def step(m: nn.Module) -> Any:
        m.zero_grad()
        output = m(*args)
        total(output, every=every).backward()
        return output

    pair.same(step)
    assert pair.hybrid.report().signatures[0].capture_check.startswith("bit-equal")
    tighten(pair.hybrid)
    pair.same(step)
    assert len(pair.hybrid.plans) == 1


def rows(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, N)), generator=torch.Generator().manual_seed(0))


def symmetric(h: Tensor) -> Tensor:
    return h.T @ h + torch.eye(N)


OVERLAID: dict[str, Callable[[Tensor], Tensor]] = {
    "last columns": lambda h: h[:, -3:],
    "every second column": lambda h: h[:, ::2],
    "transposed": lambda h: h.t()[:3],
    "expanded": lambda h: h[:1].expand(4, N),
    "windows": lambda h: h.unfold(1, 4, 2),
    "bytes that overlap": lambda h: h.as_strided((4, 4), (1, 1)),
    "nothing": lambda h: h[:0],
}


@pytest.mark.parametrize("every", [True, False], ids=["with gradient", "without gradient"])
@pytest.mark.parametrize("name", OVERLAID)
def test_outputs_with_strides_of_their_own(name: str, every: bool) -> None:
    check(Head(lambda h: (h.square().mean(), OVERLAID[name](h))), rows(), every=every)


PREDICATES: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda h: h.max(),
    "min": lambda h: h.min(),
    "median": lambda h: h.median(),
    "nan_to_num": lambda h: torch.nan_to_num(h).sum(),
    "cumprod": lambda h: h.cumprod(1).sum(),
    "scale by the largest": lambda h: (h / h.abs().max()).square().sum(),
    "scatter_reduce": lambda h: h.scatter_reduce(1, torch.zeros(4, N, dtype=torch.long), h, "prod").sum(),
}


@pytest.mark.parametrize("name", PREDICATES)
def test_several_predicates_of_one_tensor(name: str) -> None:
    check(Head(PREDICATES[name]), rows())


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "valid": lambda: nn.Conv2d(4, 4, 3, padding="valid"),
    "same": lambda: nn.Conv2d(4, 4, 3, padding="same"),
    "same, dilated": lambda: nn.Conv2d(4, 4, 3, padding="same", dilation=2),
}
ONE_NUMBER = ({"stride": 2}, {"padding": 1}, {"dilation": 2}, {"stride": (2, 1), "padding": "valid"})


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_with_named_padding(name: str) -> None:
    check(nn.Sequential(nn.Conv2d(3, 4, 1), CONVOLUTIONS[name]()), rows(2, 3, 8, 8))


@pytest.mark.parametrize("arguments", ONE_NUMBER, ids=str)
def test_convolutions_with_one_number_for_two_dimensions(arguments: dict[str, Any]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.first(x), self.second.weight, **arguments)

    check(Net(), rows(2, 3, 9, 8))


DECOMPOSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "inv": lambda h: torch.linalg.inv(symmetric(h)),
    "solve": lambda h: torch.linalg.solve(symmetric(h), h.T),
    "cholesky": lambda h: torch.linalg.cholesky(symmetric(h)),
    "lu_factor": lambda h: torch.linalg.lu_factor(symmetric(h))[0],
    "det": lambda h: torch.linalg.det(symmetric(h) / N),
    "slogdet": lambda h: torch.linalg.slogdet(symmetric(h))[1],
    "eigh": lambda h: torch.linalg.eigh(symmetric(h))[0],
    "two of them": lambda h: torch.linalg.cholesky(symmetric(h)) @ torch.linalg.inv(symmetric(h)),
}


@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_linear_algebra(name: str) -> None:
    check(Head(DECOMPOSITIONS[name]), rows())


def test_linear_algebra_still_raises() -> None:
    """The check for a singular matrix runs in the planned graph too."""
    pair = twins(Head(lambda h, scale: torch.linalg.inv(h.T @ h * scale)))
    pair.hybrid(rows(N, N), torch.ones(()))
    with pytest.raises(torch.linalg.LinAlgError):
        pair.hybrid(rows(N, N), torch.zeros(()))


UNUSED: dict[str, Callable[[Tensor], Any]] = {
    "dropout": lambda h: F.dropout(h, 0.5),
    "rand": lambda h: torch.rand(3),
    "rand_like": torch.rand_like,
    "in place": lambda h: torch.empty(3).normal_(),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "multinomial": lambda h: torch.multinomial(h.detach().softmax(-1), 1),
}


@pytest.mark.parametrize("name", UNUSED)
def test_unused_random_numbers_are_drawn(name: str) -> None:
    """A dropout behind an unused random operator masks what it masks in eager."""
    check(Head(lambda h: (UNUSED[name](h), F.dropout(h, 0.5))[1]), rows())


DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "rsample": lambda h: distributions.Normal(h, h.exp()).rsample(),
    "kl_divergence": lambda h: distributions.kl_divergence(distributions.Normal(h, h.exp()), NORMAL),
    "log_prob": lambda h: distributions.Categorical(logits=h).log_prob(torch.zeros(4)),
    "entropy": lambda h: distributions.Bernoulli(logits=h).entropy(),
    "gamma": lambda h: distributions.Beta(h.exp(), h.exp()).rsample(),
    "multivariate": lambda h: distributions.MultivariateNormal(h, torch.eye(N)).rsample(),
}
NORMAL = distributions.Normal(0.0, 1.0)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions(name: str) -> None:
    """Whether or not torch.compile ran before, and without a lasting change of their defaults."""
    before = distributions.Distribution._validate_args
    distributions.Distribution.set_default_validate_args(True)
    try:
        check(Head(DISTRIBUTIONS[name]), rows())
        assert distributions.Distribution._validate_args is True
    finally:
        distributions.Distribution.set_default_validate_args(before)


logger = logging.getLogger("tests.operators")
adapter = logging.LoggerAdapter(logger, {})
MESSAGES: dict[str, Callable[[Tensor], Any]] = {
    "logger.warning": lambda h: logger.warning("shape %s", h.shape),
    "logger.info": lambda h: logger.info(f"sum {h.sum()}"),
    "logger.log": lambda h: logger.log(logging.ERROR, "message"),
    "isEnabledFor": lambda h: logger.isEnabledFor(logging.INFO) and logger.info("message"),
    "warning_once": lambda h: logger.warning_once("message"),  # type: ignore[attr-defined]
    "adapter": lambda h: adapter.warning("message"),
    "logging.warning": lambda h: logging.warning("message"),
    "warnings.warn": lambda h: warnings.warn("message", UserWarning, stacklevel=2),
    "print": lambda h: print("message", h.shape),
}


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.filterwarnings("ignore:message")
def test_messages_in_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    once = lambda self, *args: self.warning(*args)  # noqa: E731  (as Transformers adds it to all loggers)
    monkeypatch.setattr(logging.Logger, "warning_once", once, raising=False)
    check(Head(lambda h: (MESSAGES[name](h), h)[1]), rows())


NORMS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "BatchNorm1d": (partial(nn.BatchNorm1d, N), 3),
    "BatchNorm2d": (partial(nn.BatchNorm2d, N), 4),
    "BatchNorm3d": (partial(nn.BatchNorm3d, N), 5),
    "InstanceNorm1d": (partial(nn.InstanceNorm1d, N), 3),
    "GroupNorm": (partial(nn.GroupNorm, 4, N), 4),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("after", ["reshape", "flatten"])
def test_norms_of_transposed_inputs(name: str, after: str) -> None:
    """Kernels give contiguous results there, which ``reshape`` copies and does not view."""
    make, n_dims = NORMS[name]

    def function(h: Tensor, norm: nn.Module) -> Tensor:
        back = norm(h.transpose(1, -1)).transpose(1, -1)
        return back.reshape(-1, N) if after == "reshape" else back.flatten(1)

    check(Head(function, make()), rows(6, *range(2, n_dims), N))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layer_norm_of_a_transposed_input(dtype: torch.dtype) -> None:
    def function(h: Tensor, norm: nn.Module) -> Tensor:
        return norm(h.to(dtype).transpose(1, 2)).transpose(1, 2).reshape(-1, N)

    check(Head(function, nn.LayerNorm(4, dtype=dtype)), rows(6, 4, N))


LOW_PRECISION: dict[str, Callable[[], nn.Module]] = {
    "GroupNorm": partial(nn.GroupNorm, 4, N),
    "BatchNorm2d": partial(nn.BatchNorm2d, N),
    "InstanceNorm2d": partial(nn.InstanceNorm2d, N, affine=True),
    "LayerNorm": partial(nn.LayerNorm, (N, 8, 8)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOW_PRECISION)
def test_float32_norms_of_low_precision_inputs(name: str, dtype: torch.dtype) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, N, 1), LOW_PRECISION[name]()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.convolution(x).to(dtype)).float()

    check(Net(), rows(2, 3, 8, 8))


@pytest.mark.parametrize("transform", [torch.fft.rfft2, torch.fft.fft], ids=lambda f: f.__name__)
def test_sizes_do_not_depend_on_earlier_captures(transform: Callable[[Tensor], Tensor]) -> None:
    """A result smaller than its storage counts with its storage, at the second planning as at the first."""
    model = Head(lambda h: torch.fft.irfft2(transform(h)[:, :, :3]).square())
    sizes = [
        [t.size_bytes for t in twins(model, example_inputs=(rows(2, 8, N),)).hybrid.planning_problem.tensors]
        for _ in range(2)
    ]
    assert sizes[0] == sizes[1]


PICKY: dict[str, Callable[[Tensor], Tensor]] = {
    "binary_cross_entropy": lambda h: F.binary_cross_entropy(h.sigmoid(), torch.full_like(h, 0.3)),
    "one_hot": lambda h: F.one_hot(h.argmax(-1), N) * h,
    "bernoulli": lambda h: torch.bernoulli(h.sigmoid()) * h,
    "masked_scatter": lambda h: h.masked_scatter(torch.eye(4, N, dtype=torch.bool), h.square()),
    "masked_scatter of a row": lambda h: h.masked_scatter((torch.arange(4) > 1)[:, None].expand_as(h), h[:2].square()),
    "cross_entropy of one": lambda h: F.cross_entropy(h[0], torch.tensor(3)),
    "nll_loss of an image": lambda h: F.nll_loss(h.reshape(1, 4, 4, 4).log_softmax(1), torch.ones(1, 4, 4).long()),
    "embedding_bag": lambda h: F.embedding_bag(torch.arange(8) % 4, h, torch.tensor([0, 3])),
    "fractional_max_pool2d": lambda h: F.fractional_max_pool2d(h.reshape(1, 1, 8, 8), 2, output_size=3),
    "lu_solve": lambda h: torch.linalg.lu_solve(*torch.linalg.lu_factor(symmetric(h)), h.T),
    "gumbel_softmax": lambda h: F.gumbel_softmax(h, hard=True),
    "binomial": lambda h: torch.binomial(torch.full_like(h, 5.0), h.detach().sigmoid()) * h,
}


@pytest.mark.parametrize("name", PICKY)
def test_operators_that_check_their_values(name: str) -> None:
    """They are measured on synthetic values that they take, none of them estimated."""
    model = Head(PICKY[name])
    check(model, rows())
    assert not captured_profile(model, rows()).estimated


def test_an_operator_that_takes_no_synthetic_values_is_estimated() -> None:
    with torch.library._scoped_library("tests", "FRAGMENT"):

        @torch.library.custom_op("tests::picky", mutates_args=())
        def picky(x: Tensor) -> Tensor:
            if x.min() > 0:
                raise ValueError("a negative number is missing")
            return x.square()

        picky.register_fake(torch.empty_like)
        picky.register_autograd(lambda ctx, g: 2 * g)
        model = Head(lambda h: picky(h) + h)
        check(model, rows())
        profile = captured_profile(model, rows())
    (name,) = profile.estimated
    assert "picky" in name
    assert "1 of them estimated" in str(profile)
    # 4 x 16 floats come in, as many go out
    assert profile.costs[name].alloc_peak_bytes == 2 * 4 * 4 * N


CONSTANT_GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": torch.sign,
    "sgn": torch.sgn,
    "angle": torch.angle,
    "copysign": lambda h: torch.copysign(torch.ones(N), h),
    "two of them": lambda h: h.ceil() + torch.sgn(h.square()),
}


@pytest.mark.parametrize("name", CONSTANT_GRADIENTS)
def test_gradients_that_are_zeros(name: str) -> None:
    check(Head(CONSTANT_GRADIENTS[name]), rows())


@pytest.mark.parametrize("compression", ["lossless", "auto"])
def test_gradients_that_are_not_finite_in_eager(compression: str) -> None:
    """NaN equals NaN; no codec is offered by an error that is none."""
    model = Head(lambda h: (F.gelu(h) @ torch.ones(N, N)).square().sum() * float("nan"))
    pair = twins(model, compression=compression, example_inputs=(rows(512, N),))
    assert "eager itself is not finite" in pair.hybrid.report().signatures[0].capture_check
    pair.hybrid(rows(512, N)).backward()
    assert all(p.grad is not None and p.grad.isnan().all() for p in pair.hybrid.parameters())


def captured_profile(model: nn.Module, *args: Any) -> Profile:
    """The profile of a model's step."""
    session = twins(model).hybrid._fxhybrid_session
    return prepare(session.step, StepCall(args, {}, ()), session.options).profile
