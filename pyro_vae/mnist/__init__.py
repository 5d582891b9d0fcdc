"""The four files of MNIST, xz-compressed; `pyro_vae.data.MNIST` reads them (see LICENSE.md)."""
