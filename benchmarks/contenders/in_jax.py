"""Common code of the contenders in JAX."""

from typing import Any

import jax
import jax.numpy as jnp

from contenders import Contender, Work

LAYERS = ["encoder_1", "encoder_2", "decoder_1", "decoder_2"]


class InJax(Contender):
    """Base of the contenders in JAX: random keys, and images as floats on the device."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.x = jnp.asarray(work.observed())
        self.key = jax.random.key(work.seed)
        self._images: Any = None

    @property
    def images(self) -> Any:
        """The images as floats. They are made in the first epoch."""
        if self._images is None:
            self._images = jnp.asarray(self.work.pixels(), jnp.float32) / 255
        return self._images

    def next_key(self) -> Any:
        """Return a new random key."""
        self.key, key = jax.random.split(self.key)
        return key


def shuffled(key: Any, images: Any, batch: int) -> Any:
    """Return the rows of each batch of an epoch, without a smaller last batch, as is usual in JAX."""
    number = len(images) // batch
    return jax.random.permutation(key, len(images))[: number * batch].reshape(number, batch)


def binarised(key: Any, images: Any, rows: Any) -> Any:
    """Gather the rows and draw binary pixels."""
    return jax.random.bernoulli(key, images[rows]).astype(jnp.float32)
