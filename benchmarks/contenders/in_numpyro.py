"""NumPyro."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from contenders import RATE, Weights, Work
from contenders.in_jax import LAYERS, InJax, binarised, shuffled


class NumPyro(InJax):
    """NumPyro's SVI: the steps are one jitted loop, an epoch is one jitted scan."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        initial = dict(zip([f"{n}_{k}" for n in LAYERS for k in "wb"], work.weights(), strict=True))

        def linear(name: str, h: Any) -> Any:
            w, b = (numpyro.param(f"{name}_{kind}", initial[f"{name}_{kind}"]) for kind in "wb")
            return h @ w + b

        def model(x: Any) -> None:
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Normal(jnp.zeros(work.latent), 1).to_event(1))
                logits = linear("decoder_2", jax.nn.relu(linear("decoder_1", z)))
                numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

        def guide(x: Any) -> None:
            features = linear("encoder_2", jax.nn.relu(linear("encoder_1", x)))
            mean, log_sigma = jnp.split(features, 2, -1)
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Normal(mean, jnp.exp(log_sigma)).to_event(1))

        elbo = numpyro.infer.Trace_ELBO(num_particles=work.particles)
        svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(RATE), elbo)
        self.svi = svi
        self.state = svi.init(jax.random.key(work.seed), self.x)

        @jax.jit
        def loop(state: Any, x: Any, number: Any) -> Any:
            return jax.lax.fori_loop(0, number, lambda _, carry: svi.update(carry[0], x), (state, 0.0))

        @jax.jit
        def epoch(state: Any, images: Any, key: Any) -> Any:
            key, order = jax.random.split(key)
            rows = shuffled(order, images, work.batch)

            def body(state: Any, inputs: Any) -> Any:
                key, rows = inputs
                return svi.update(state, binarised(key, images, rows))

            return jax.lax.scan(body, state, (jax.random.split(key, len(rows)), rows))

        self.loop, self.scan = loop, epoch

    def steps(self, number: int) -> float:
        """Take steps on the batch in memory."""
        self.state, loss = self.loop(self.state, self.x, number)
        return float(loss) / len(self.x)

    def epoch(self) -> float:
        """Scan over the batches."""
        self.state, losses = self.scan(self.state, self.images, self.next_key())
        return float(losses.mean()) / self.work.batch

    def weights(self) -> Weights:
        """Return the weights."""
        params = self.svi.get_params(self.state)
        return [np.asarray(params[f"{name}_{kind}"]) for name in LAYERS for kind in "wb"]
