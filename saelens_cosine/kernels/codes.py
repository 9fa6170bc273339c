"""Codes that are kept as their active entries and become dense for whoever asks.

SAELens passes codes and pre-activations between its methods as `[tokens, d_sae]` tensors. These two are such tensors to
everyone, by `__torch_function__`: what can be done with the entries is done with them, and everything else, a hook, an
evaluation, a loss of the user's, sees the dense tensor, with gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch.utils._pytree import tree_map
from typing_extensions import override

from saelens_cosine.kernels.autograd import EntryDecode
from saelens_cosine.kernels.entries import Entries, stable_order

_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "is_sparse", "is_cuda", "is_meta", "is_quantized")
} | {
    getattr(torch.Tensor, name)
    for name in ("size", "dim", "numel", "__len__", "is_floating_point", "is_complex", "stride", "element_size")
}


_ASSIGNMENTS = {
    "__setitem__",
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "and", "or", "xor")),
}


class DenseOnDemand(torch.Tensor):
    """A `[tokens, d_sae]` tensor that is made when something asks for it."""

    shortcuts: ClassVar[dict[Callable[..., Any], Callable[..., Any]]] = {}
    """What works without the dense tensor; a shortcut that answers NotImplemented leaves it to the dense one."""

    @staticmethod
    def __new__(cls: type[Any], *_: Any, shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)  # pyright: ignore

    def dense(self) -> torch.Tensor:
        """The tensor itself, differentiable."""
        raise NotImplementedError

    @override
    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
                return func(*args, **kwargs)
        name = func.__name__
        if args and isinstance(args[0], cls) and (name in _ASSIGNMENTS or (name[-1] == "_" and name[-2] != "_")):
            raise RuntimeError(
                f"{name} would change codes or scores that are not there as a dense tensor; change a copy, .to_dense() of "
                'codes, or train with kernels="reference".'
            )
        shortcut = cls.shortcuts.get(func)
        if shortcut is not None and args and isinstance(args[0], cls):
            result = shortcut(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*tree_map(_made_dense, args), **tree_map(_made_dense, kwargs))

    @override
    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*tree_map(_made_dense, args), **tree_map(_made_dense, kwargs or {}))


def _made_dense(value: Any) -> Any:
    return value.dense() if isinstance(value, DenseOnDemand) else value


def _plainly(shortcut: Callable[[Any], Any]) -> Callable[..., Any]:
    """A shortcut for a method that is called without arguments."""
    return lambda self, *args, **kwargs: NotImplemented if args or kwargs else shortcut(self)


class EntryCodes(DenseOnDemand):
    """Codes `[tokens, d_sae]` as their active entries and the entries' values `[N]`."""

    entries: Entries
    values: torch.Tensor  # pyright: ignore

    @staticmethod
    def __new__(cls: type[Any], entries: Entries, values: torch.Tensor) -> EntryCodes:
        return DenseOnDemand.__new__(
            cls, shape=(entries.n_tokens, entries.d_sae), dtype=values.dtype, device=values.device
        )

    def __init__(self, entries: Entries, values: torch.Tensor):
        self.entries = entries
        self.values = values  # pyright: ignore

    @override
    def dense(self) -> torch.Tensor:
        return self.entries.to_dense(self.values)

    def fired(self) -> torch.Tensor:
        """`[d_sae]` booleans: whether each feature has a code other than zero."""
        return self.entries.sum_by_feature((self.values != 0).to(torch.int32)) > 0

    def split_features(self, edges: Sequence[int]) -> EntryCodes:
        """The codes of features `edges[i] .. edges[i + 1] - 1` apart from the others: `[len(edges) - 1, tokens]` rows in one.

        The edges start at 0 and end at d_sae.
        """
        entries = self.entries
        part = torch.stack([entries.features >= edge for edge in edges[1:-1]]).sum(dim=0) if len(edges) > 2 else 0
        n_rows = (len(edges) - 1) * entries.n_tokens
        rows = entries.tokens + entries.n_tokens * part
        order = stable_order(rows, n_rows)
        moved = Entries(rows[order], entries.features[order], n_rows, entries.d_sae)
        return EntryCodes(moved, self.values[order])

    def with_values(self, values: torch.Tensor) -> EntryCodes:
        """Other values at the same places."""
        return EntryCodes(self.entries, values)

    def _sum(self, dim: Any = None, **options: Any) -> Any:
        if self.values.dtype == torch.bool or options or dim not in (None, 0, -2, 1, -1):
            return NotImplemented
        if dim is None:
            return self.values.sum()
        return self.entries.sum_by_feature(self.values) if dim in (0, -2) else self.entries.sum_by_token(self.values)

    def _matmul(self, other: torch.Tensor) -> Any:
        fits = other.ndim == 2 and other.shape[0] == self.entries.d_sae and other.dtype == self.values.dtype
        return EntryDecode.apply(self.values, other, self.entries) if fits else NotImplemented

    def _mul(self, other: Any) -> Any:
        if not isinstance(other, torch.Tensor):
            return NotImplemented
        if tuple(other.shape) == (self.entries.d_sae,):
            return self.with_values(self.values * other.index_select(0, self.entries.features))
        if tuple(other.shape) == (self.entries.n_tokens, 1):
            return self.with_values(self.values * other.squeeze(-1).index_select(0, self.entries.tokens))
        return NotImplemented

    def _to(self, dtype: Any, **options: Any) -> Any:
        known = isinstance(dtype, torch.dtype) and not options
        return self.with_values(self.values.to(dtype)) if known else NotImplemented

    shortcuts: ClassVar[dict[Callable[..., Any], Callable[..., Any]]] = {
        torch.Tensor.bool: _plainly(lambda self: self.with_values(self.values.bool())),
        torch.Tensor.float: _plainly(lambda self: self.with_values(self.values.float())),
        torch.Tensor.to: _to,
        torch.Tensor.detach: _plainly(lambda self: self.with_values(self.values.detach())),
        torch.Tensor.to_dense: _plainly(lambda self: self.dense()),
        torch.Tensor.requires_grad.__get__: lambda self, *_: self.values.requires_grad,  # pyright: ignore
        torch.Tensor.sum: _sum,
        torch.Tensor.matmul: _matmul,
        torch.Tensor.__matmul__: _matmul,
        torch.Tensor.mul: _mul,
        torch.Tensor.__mul__: _mul,
    }


class ScoresOnDemand(DenseOnDemand):
    """Pre-activations `[tokens, d_sae]` that nobody has computed yet, all of them or those of some features.

    Args:
        compute: makes `[tokens, len(columns)]` pre-activations of the given features, or of all for None.
        few: gives the k best positive pre-activations of each token among some features, `few(features, certain, k)`.
        parameters: what they depend on; once these have changed, the pre-activations of that step are gone.
        active: `[N]`, those of the active entries.
        shape, dtype, device: of the whole.
    """

    @staticmethod
    def __new__(
        cls: type[Any],
        compute: Callable[[torch.Tensor | None], torch.Tensor],
        few: Callable[[torch.Tensor, torch.Tensor, int], EntryCodes | None],
        parameters: Iterable[torch.Tensor],
        active: torch.Tensor,
        *,
        shape: Iterable[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> ScoresOnDemand:
        return DenseOnDemand.__new__(cls, shape=shape, dtype=dtype, device=device)

    def __init__(  # pyright: ignore[reportInconsistentConstructor]
        self,
        compute: Callable[[torch.Tensor | None], torch.Tensor],
        few: Callable[[torch.Tensor, torch.Tensor, int], EntryCodes | None],
        parameters: Iterable[torch.Tensor],
        active: torch.Tensor,
        **_: Any,
    ):
        self._compute, self._few = compute, few
        self.active = active
        self._versions = [(parameter, parameter._version) for parameter in parameters]

    @override
    def dense(self) -> torch.Tensor:
        return self.columns(None)

    def columns(self, features: torch.Tensor | None) -> torch.Tensor:
        """Pre-activations of the given features, `[tokens, len(features)]`, differentiable.

        Raises:
            RuntimeError: the weights have changed since.
        """
        self._check_weights()
        return self._compute(features)

    def few_positive(self, features: torch.Tensor, certain: torch.Tensor, k: int) -> EntryCodes | None:
        """The k highest positive pre-activations of each token among the given features, differentiable.

        Args:
            features: `[n]` int64, ascending.
            certain: `[n]` booleans, which of them count.
            k: at most so many of each token.

        Returns:
            Codes `[tokens, d_sae]`, or None where dense `columns` are faster: with many positive ones, on a GPU, in a part of a
            dictionary.

        Raises:
            RuntimeError: the weights have changed since.
        """
        self._check_weights()
        return self._few(features, certain, k)

    def _check_weights(self) -> None:
        if any(parameter._version != version for parameter, version in self._versions):
            raise RuntimeError(
                "This step's pre-activations were never computed and its weights have changed since (an optimizer step). "
                'Read hidden_pre before the step, or train with kernels="reference", which keeps it.'
            )


def scores_of(codes: torch.Tensor, hidden_pre: torch.Tensor) -> torch.Tensor:
    """Pre-activations of the active codes, in one row or at their places among zeros."""
    if isinstance(hidden_pre, ScoresOnDemand):
        return hidden_pre.active
    return torch.where(codes != 0, hidden_pre.detach(), 0)
