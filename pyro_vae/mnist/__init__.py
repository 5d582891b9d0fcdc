"""The four files of MNIST, xz-compressed; `pyro_vae.data_sets.MNIST` reads them (see LICENSE.md)."""
