"""PairCache: results about pairs, each kept while its pair exists."""

from collections.abc import Hashable, Mapping
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, ref

from pyro_vae.programs.pair import Pair, Program

T = TypeVar("T")

_MOST = 1000  # results of one pair; if every step has a new key, the oldest results are dropped


class PairCache(Generic[T]):
    """Results about pairs, found again by the pair and a key.

    It holds model and guide weakly: their results are freed with them, and no result may hold them. A copy of
    the cache, or a pickled one, is empty, since it belongs to copies of the modules.

    Attributes:
        num_added: the number of results added so far.
    """

    def __init__(self) -> None:
        self._by_model: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Hashable, T]]]
        self._by_model = WeakKeyDictionary()
        self.num_added = 0

    def add(self, pair: Pair, key: Hashable, result: T) -> None:
        """Keep a result about a pair."""
        results = self._results(pair)
        results[key] = result
        if len(results) > _MOST:
            del results[next(iter(results))]
        self.num_added += 1

    def results(self, pair: Pair) -> Mapping[Hashable, T]:
        """Return the results about a pair, by their keys."""
        return self._results(pair)

    def _results(self, pair: Pair) -> dict[Hashable, T]:
        model, guide = _owner(pair.model), _owner(pair.guide)
        if model is None or guide is None:
            return {}  # no object can hold the result, so it is computed again each time
        by_guide = self._by_model.setdefault(model, WeakKeyDictionary())
        return by_guide.setdefault(guide, {})

    def __deepcopy__(self, memo: Any) -> "PairCache[T]":
        return PairCache()

    def __reduce__(self) -> Any:
        return PairCache, ()


def _owner(program: Program) -> Any:
    """Return an object that exists as long as a program; None if no part can be referenced weakly."""
    owner = getattr(program, "__self__", program)  # a bound method is a new object at every access
    try:
        ref(owner)
        hash(owner)
    except TypeError:
        return None
    return owner
