"""A loop of gradient steps that can be stopped and continued."""

from pyro_vae.training.checkpoint import Checkpoint as Checkpoint
from pyro_vae.training.epoch import Epoch as Epoch
from pyro_vae.training.files import write_file as write_file
from pyro_vae.training.fit import fit as fit
