"""Generation: the likelihood of every observed site, given latents from the prior or from the guide."""

from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer import infer_discrete

from pyro_vae.elbos.checks import check_param_statements
from pyro_vae.evaluation.checks import check_whole
from pyro_vae.programs import Batch, Pair, Program, as_args, no_guide
from pyro_vae.programs.names import name_apart
from pyro_vae.programs.plates import find_layout
from pyro_vae.programs.traces import latent_sites, observed_sites, refuse_unobserved, sample_sites


def generate(model: Program, batch: Batch) -> dict[str, TorchDistribution]:
    """Draw latents from the prior and return the likelihood of every observed site.

    ``generate(model, x)["x"].sample()`` are new images, ``.mean`` their expectations given z.

    Args:
        model: any model; its observations are ignored.
        batch: the model's arguments, which say how many to generate.

    Returns:
        Site name -> p(x | z), z ~ p(z).

    Raises:
        ValueError: if the model observes nothing, or has a ``pyro.param`` statement outside a module.
    """
    pair = Pair(model, no_guide, as_args(batch))
    name_apart(pair.modules)
    with pair.evaluating(), pair.isolated(validate=False):
        trace = pair.wrapped(model=poutine.uncondition(model)).trace_model()
        check_param_statements(pair, trace)
    likelihoods = {
        name: site["fn"]
        for name, site in sample_sites(trace)
        if site["infer"].get("was_observed") and not isinstance(site["fn"], Unit)
    }
    if not likelihoods:
        refuse_unobserved(trace)
    return likelihoods


def reconstruct(model: Program, guide: Program, batch: Batch) -> dict[str, TorchDistribution]:
    """Draw latents from the guide and return the likelihood of every observed site.

    ``reconstruct(model, guide, x)["x"].mean`` is E[x' | z] with z ~ q(z | x). A site k that the model
    enumerates and the guide leaves out is drawn from p(k | x, z).

    Args:
        model: any model.
        guide: its guide.
        batch: their arguments.

    Returns:
        Site name -> p(x' | z), z ~ q(z | x).

    Raises:
        ValueError: if the batch does not fit, or an autoguide holds the posteriors of other data.
    """
    pair = Pair(model, guide, as_args(batch))
    with pair.evaluating():
        check_whole(pair)
        with pair.isolated(validate=False):
            layout = find_layout(pair, particles=False)
            model_trace, guide_trace = pair.trace()
            if layout.sums_out:
                z = {name: site["value"] for name, site in latent_sites(guide_trace).items()}
                drawn = infer_discrete(poutine.condition(model, data=z), -1 - layout.max_plate_nesting)
                model_trace = pair.wrapped(model=drawn).trace_model()
    drawn_by_guide = latent_sites(guide_trace)
    observed = observed_sites(model_trace).items()
    return {name: site["fn"] for name, site in observed if name not in drawn_by_guide}
