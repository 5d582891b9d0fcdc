"""Epoch: the record of one pass over the data."""

from typing import NamedTuple


class Epoch(NamedTuple):
    """The result of one pass over the data. Losses and ELBOs are in nats per data point.

    Attributes:
        epoch: the number of the epoch, from 1.
        loss: the mean training loss; the loss of a batch is taken before its update.
        elbo: the plain ELBO after the pass, on the watched data: reconstruction - kl. If a site is outside
            the plate of the data (a latent that all data share), it is the ELBO of all data, divided by their
            number. It is NaN, with a warning, if the pair has no ELBO.
        reconstruction: the part E_q[log p(x | z)] of the ELBO.
        kl: the part E_q[log q(z | x) - log p(z)] of the ELBO.
        seconds: the wall-clock time of the pass, without the evaluation of the ELBO.
    """

    epoch: int
    loss: float
    elbo: float
    reconstruction: float
    kl: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch:3d}   loss {self.loss:9.3f}   ELBO {self.elbo:9.3f} = "
            f"{self.reconstruction:9.3f} - KL {self.kl:7.3f} nats per data point   {self.seconds:.1f} s"
        )
