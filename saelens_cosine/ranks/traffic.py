"""What a training step moves between ranks, as it should be by its formula and as it is.

Of most steps, for each rank and B tokens, D inputs and k active features of 4-byte floats, on the fast path and with no dead features: what a rank hands
in is counted, whatever the ring does with it.

| what | collective | calls | bytes |
| --- | --- | --- | --- |
| reconstruction | all-reduce | 1 | 4 B D |
| gradient of `b_dec` through the encoder | all-reduce | 1 | 4 D |
| gradients of a shared exponent and scale | all-reduce | 2 | 8 |
| BatchTopK's cut: two ranks of the scores by four digits of 256 counters | all-reduce | 4 | 4 x 2 x 256 x 8 |
| BatchTopK's counts: above the floor, candidates, kept | all-reduce | 3 | 24 |
| BatchTopK's smallest selected score | all-reduce | 1 | 4 |
| TopK's cut: the k best of each token | all-gather | 1 | 4 B k |
| TopK's counts: found, above and at the cut | all-reduce, all-gather | 1 + 1 | 8 B + 16 B |
| another such count, where the last batch's floor is too high for this one | all-reduce | 0 or more | 8 each |
| TopK's mean of exponents of its own per feature, for the floor | all-reduce | 1 | 4 |
| features that may be dead next | all-reduce | 1 | 8 |
| norms of the gradients of P parameters, for clipping | all-reduce, all-gather | 1 + 1 | 4 P + 4 P |
| a signal to stop, in a run | all-reduce | 1 | 8 |

So the cut costs `O(1)` for BatchTopK and `O(B k)` for TopK. Activations are gathered once, as they leave the language model: 4 B D / n.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from saelens_cosine.ranks.whole import DIGIT_BITS

COUNTERS = 2**DIGIT_BITS
"""Of a digit."""


class Moved(NamedTuple):
    """
    What a collective has moved.

    Args:
        calls (int): How often it was called.
        bytes (int): What this rank handed in.
    """

    calls: int
    bytes: int

    def more(self, calls: int, bytes: int) -> Moved:
        """With others."""
        return Moved(self.calls + calls, self.bytes + bytes)


Traffic = dict[str, Moved]
"""By collective: `all_reduce`, `all_gather`."""


def formula(architecture: str, tokens: int, d_in: int, k: int, parameters: int) -> Traffic:
    """The table above for `..._batchtopk` and `..._topk` with an inner product, or a cosine with shared or own exponents.

    Raises:
        ValueError: another architecture, whose losses and selection ask other things of the whole.
    """
    score, _, selector = architecture.rpartition("_")
    if selector not in ("batchtopk", "topk") or score not in ("inner_product", "cosine", "per_feature_cosine"):
        raise ValueError(
            f"There is no formula for {architecture!r}, only for inner_product_, cosine_ and per_feature_cosine_ with batchtopk or topk."
        )
    reduced = [4 * tokens * d_in, 4 * d_in, 8, 4 * parameters]
    reduced += [4, 4] if score == "cosine" else []
    gathered = [4 * parameters]
    if selector == "batchtopk":
        reduced += [2 * COUNTERS * 8] * 4 + [8] * 3 + [4]
    else:
        reduced += [8 * tokens] + [4] * (score == "per_feature_cosine")
        gathered += [4 * tokens * k, 16 * tokens]
    found = {"all_reduce": reduced, "all_gather": gathered}
    return {name: Moved(len(parts), sum(parts)) for name, parts in found.items()}


class OfDTensors(TorchDispatchMode):
    """Counts the collectives that DTensors make on their own, such as those of clipping."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    @override
    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[Any], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it makes them of plain tensors, which come by here again
        if getattr(func, "namespace", "").endswith("c10d_functional") and "wait" not in func.__name__:
            name = "all_reduce" if "reduce" in func.__name__ else "all_gather"
            self.moved[name] += 1
            self.bytes[name] += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))
