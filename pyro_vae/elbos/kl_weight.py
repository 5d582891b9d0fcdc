"""The KL weight: a number that scales the latent sites of model and guide alike."""

import functools
from contextlib import ExitStack
from typing import Any, Self

from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.arguments import given, is_finite, require
from pyro_vae.programs.one_thread import one_thread


def scale_latents(beta: float | Tensor) -> Messenger:
    r"""Weight the KL by beta: scale the log probability of every latent site, and of no observed site.

    The objective becomes :math:`E_q[\log p(x | z)] - \beta KL(q(z | x) \| p(z))` (beta-VAE, warm-up,
    cyclical weights). It has to be around both model and guide. A context does this::

        with scale_latents(0.5):
            svi.step(x)

    It also wraps a program: ``scale_latents(0.5)(model)`` with ``scale_latents(0.5)(guide)``. For a weight
    that changes while :func:`~pyro_vae.fit` runs, give a tensor and change it in place
    (``beta.fill_(0.7)``). A weight of 0 leaves only the reconstruction. Nested weights multiply.

    An enumerated site is latent too. If it is summed out of the model together with an observed site, the
    sum has two scales. ``TraceEnum_ELBO`` refuses this.

    Evaluation ignores weights: :func:`~pyro_vae.elbo_terms`, :func:`~pyro_vae.log_evidence`, and the ELBO
    that :func:`~pyro_vae.fit` reports.

    Args:
        beta: a finite number of 0 or more, or a tensor ``()`` that holds one.

    Returns:
        A Pyro handler, which is a context manager and also wraps programs.

    Raises:
        ValueError: if beta is anything else; from a run, if it has become negative or not finite, or if a
            handler outside this one conditions on a weighted site.

    References:
        Higgins et al. 2017 (beta-VAE); Bowman et al. 2015, arXiv 1511.06349 (warm-up).
    """
    return KLWeight(beta)


class KLWeight(Messenger):
    """The handler that :func:`scale_latents` makes."""

    def __init__(self, beta: float | Tensor) -> None:
        super().__init__()
        self.beta = beta
        self._scaled: Any = None
        self.number()

    def number(self) -> float:
        """Return the weight as it is now. On a GPU this waits for a tensor.

        Raises:
            ValueError: if it is not a finite number of 0 or more.
        """
        beta: Any = self.beta
        if isinstance(beta, Tensor):
            one = beta.shape == () and not (beta.is_meta or beta.is_complex())
            beta = float(beta) if one else beta
        expected = "a finite number that is not negative, or a tensor () that holds one"
        valid = is_finite(beta) and beta >= 0
        require(valid, "scale_latents", expected, given(beta), "give a weight such as 0.5")
        return float(beta)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(one_thread)  # Pyro would weight the latents of other threads, too
            super().__enter__()
            stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            one_thread.__exit__()

    def _pyro_sample(self, msg: Any) -> None:
        latent = not (msg["is_observed"] or site_is_subsample(msg))
        self._scaled = msg if latent else None
        if latent:
            # A step of SVI reads a tensor once, before it runs the pair, and not at each site.
            if not isinstance(self.beta, Tensor) or is_validation_enabled():
                self.number()
            msg["scale"] = msg["scale"] * self.beta

    def _pyro_post_sample(self, msg: Any) -> None:
        scaled, self._scaled = self._scaled, None  # not kept: its tensors cannot be copied
        if msg is scaled and msg["is_observed"]:
            raise ValueError(
                f"Site '{msg['name']}': expected it to stay latent, as scale_latents took it for latent, but "
                "a handler outside of scale_latents observes it. To fix: put scale_latents outermost: "
                "scale_latents(beta)(condition(model, ...))."
            )


def active_weights(*programs: Any) -> list[KLWeight]:
    """Return the weights around this point of the program, outermost first, and those around programs."""
    found = [handler for handler in _PYRO_STACK if isinstance(handler, KLWeight)]
    return found + [weight for program in programs for weight in _weights_around(program)]


def _weights_around(program: Any) -> list[KLWeight]:
    """Return the weights in ``scale_latents(beta)(model)``, a partial of the handler and the model."""
    if isinstance(program, KLWeight):
        return [program]
    if not isinstance(program, functools.partial):
        return []
    return [weight for part in (program.func, *program.args) for weight in _weights_around(part)]
