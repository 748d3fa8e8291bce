"""Operators that look at values, draw random numbers or write messages: bit-equal to eager at any budget."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributions

from tests.compare import twins
from tests.operator_parts import Head, N, captured_profile, check, rows, symmetric

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
