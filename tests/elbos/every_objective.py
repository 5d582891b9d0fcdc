"""The objectives of this package, by name: those that quadrature can check, and all with three particles."""

import pytest

import pyro_vae as pv

# name -> (objective, the alpha of its bound)
OBJECTIVES = {
    "STL": (pv.STL(), 1),
    "STL, three particles": (pv.STL(3), 1),
    "MeanField": (pv.MeanField(), 1),
    "MeanField, one by one": (pv.MeanField(3, vectorize_particles=False), 1),
    "FreeBits, none": (pv.FreeBits(0.0), 1),
    "IWAE": (pv.IWAE(2), 0),
    "IWAE, one by one": (pv.IWAE(2, vectorize_particles=False), 0),
    "Renyi 0.5": (pv.Renyi(0.5, 2), 0.5),
    "Renyi -1": (pv.Renyi(-1, 2), -1),
    "Renyi 1": (pv.Renyi(1, 2), 1),
    "DReG": (pv.DReG(2), 0),
    "DReG, one by one": (pv.DReG(2, vectorize_particles=False), 0),
}

EVERY = {
    "IWAE": pv.IWAE(3),
    "IWAE, one by one": pv.IWAE(3, vectorize_particles=False),
    "Renyi": pv.Renyi(0.5, 3),
    "STL": pv.STL(3),
    "DReG": pv.DReG(3),
    "DReG, one by one": pv.DReG(3, vectorize_particles=False),
    "MeanField": pv.MeanField(3),
    "FreeBits": pv.FreeBits(0.2, 3),
}

every = pytest.mark.parametrize("elbo", EVERY.values(), ids=EVERY)
