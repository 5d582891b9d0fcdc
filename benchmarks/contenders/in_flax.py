"""Flax and optax."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from contenders import HIDDEN, RATE, WIDTH, Weights, Work
from contenders.in_jax import LAYERS, InJax, binarised, shuffled


class Flax(InJax):
    """Flax modules and optax's Adam, with a jitted step in a Python loop."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)

        class VAE(nn.Module):
            @nn.compact
            def __call__(self, x: Any, key: Any) -> Any:
                h = nn.relu(nn.Dense(HIDDEN, name="encoder_1")(x))
                features = nn.Dense(2 * work.latent, name="encoder_2")(h)
                mean, log_sigma = jnp.split(features, 2, -1)
                z = mean + jnp.exp(log_sigma) * jax.random.normal(key, mean.shape)
                h = nn.relu(nn.Dense(HIDDEN, name="decoder_1")(z))
                return nn.Dense(WIDTH, name="decoder_2")(h), mean, log_sigma

        vae, optimizer = VAE(), optax.adam(RATE)
        arrays = [jnp.asarray(array) for array in work.weights()]
        self.params: Any = {
            name: {"kernel": arrays[2 * i], "bias": arrays[2 * i + 1]} for i, name in enumerate(LAYERS)
        }
        self.state = optimizer.init(self.params)

        def loss(params: Any, x: Any, key: Any) -> Any:
            logits, mean, log_sigma = vae.apply({"params": params}, x, key)
            cross_entropy = optax.sigmoid_binary_cross_entropy(logits, x).sum()
            return cross_entropy + 0.5 * (jnp.exp(2 * log_sigma) + mean**2 - 1 - 2 * log_sigma).sum()

        def step(params: Any, state: Any, x: Any, key: Any) -> Any:
            value, gradients = jax.value_and_grad(loss)(params, x, key)
            updates, state = optimizer.update(gradients, state)
            return optax.apply_updates(params, updates), state, value

        @partial(jax.jit, donate_argnums=(0, 1))
        def step_in_memory(params: Any, state: Any, x: Any, key: Any, number: Any) -> Any:
            return step(params, state, x, jax.random.fold_in(key, number))

        @partial(jax.jit, donate_argnums=(0, 1))
        def step_on_rows(params: Any, state: Any, images: Any, rows: Any, key: Any, number: Any) -> Any:
            data, noise = jax.random.split(jax.random.fold_in(key, number))
            return step(params, state, binarised(data, images, rows), noise)

        self.step_in_memory, self.step_on_rows = step_in_memory, step_on_rows

    def steps(self, number: int) -> float:
        """Take steps on the batch in memory."""
        key = self.next_key()
        for i in range(number):
            self.params, self.state, loss = self.step_in_memory(self.params, self.state, self.x, key, i)
        return float(loss) / len(self.x)

    def epoch(self) -> float:
        """Take a step on each batch."""
        key = self.next_key()
        losses = []
        for i, rows in enumerate(np.asarray(shuffled(self.next_key(), self.images, self.work.batch))):
            self.params, self.state, loss = self.step_on_rows(
                self.params, self.state, self.images, rows, key, i
            )
            losses.append(loss)
        return float(jnp.stack(losses).mean()) / self.work.batch

    def weights(self) -> Weights:
        """Return the weights."""
        return [np.asarray(self.params[name][kind]) for name in LAYERS for kind in ("kernel", "bias")]
