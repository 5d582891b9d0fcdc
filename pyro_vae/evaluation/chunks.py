"""chunks: a large batch as smaller ones, and the tensors that all data share."""

from collections.abc import Collection, Iterator
from itertools import combinations

from torch import Tensor

from pyro_vae.evaluation.checks import check_factors, check_whole, holds_posteriors
from pyro_vae.programs import Pair
from pyro_vae.programs.batches import check_no_arrays
from pyro_vae.programs.observations import check_observed
from pyro_vae.programs.pair import leaves, map_leaves

_TRIED = 8  # tensors of N rows beside the first; more of them are all cut


def chunks(pair: Pair, rows: int) -> Iterator[Pair]:
    """Split the batch of a pair into batches of at most this number of data points, if it can be split.

    The first argument holds the N data points. Other tensors of N rows, also in tuples, lists and dicts, are
    cut like it. If the pair runs on a part of the data with the whole tensor, then all data share it, and it
    is not cut.

    Raises:
        ValueError: if the first argument is not a tensor with data.
    """
    args = pair.args
    if not args or not isinstance(args[0], Tensor) or not args[0].dim() or not len(args[0]):
        check_no_arrays(args)
        given = ", ".join(type(value).__name__ for value in args) or "()"
        if args and isinstance(args[0], Tensor):
            given = f"a tensor of shape {tuple(args[0].shape)}"
        raise ValueError(
            "batch: expected data, a tensor (N, ...) with N > 0 or a tuple that begins with one, got "
            f"{given}. To fix: pass a batch as model and guide take it."
        )
    total = len(args[0])
    if total <= rows or holds_posteriors(pair):
        yield pair
        return
    others = [i for i, leaf in enumerate(leaves(args)) if i and _has_rows(leaf, total)]
    shared = _shared(pair, rows, others)
    for start in range(0, total, rows):
        yield _part(pair, start, start + rows, shared)


def checked_chunks(pair: Pair, rows: int) -> list[Pair]:
    """Return the chunks of a batch, after a check of all, as :func:`check_whole` and for factors.

    Raises:
        ValueError: naming the site or the plate, what was expected, what was given and how to fix it.
    """
    parts = list(chunks(pair, rows))
    for part in parts:
        check_factors(check_whole(part)[0])
    return parts


def _shared(pair: Pair, rows: int, others: list[int]) -> Collection[int]:
    """Return which tensors of N rows all data share: those that the pair takes whole with a part of x."""
    if len(others) <= _TRIED:
        for count in range(len(others), 0, -1):
            for whole in combinations(others, count):
                if _runs(_part(pair, 0, rows, whole)):
                    return whole
    return ()


def _runs(pair: Pair) -> bool:
    try:
        with pair.trial(), pair.isolated(validate=True):
            check_observed(pair.trace().model)
    except Exception:  # a program may do anything with data that do not fit
        return False
    return True


def _part(pair: Pair, start: int, stop: int, shared: Collection[int]) -> Pair:
    """Return the pair on some rows of its batch."""
    total = len(pair.args[0])
    position = iter(range(len(leaves(pair.args))))

    def cut(leaf: object) -> object:
        whole = next(position) in shared or not _has_rows(leaf, total)
        return leaf if whole else leaf[start:stop]  # type: ignore[index]

    return pair.on(map_leaves(cut, pair.args))


def _has_rows(leaf: object, total: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == total
