"""Which keys later queries are likely to attend to, from what is known about a model's queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from quantpress.errors import InvalidInputError


@dataclass(frozen=True, eq=False)
class QueryMoments:
    """Mean and variance of the queries of each query head, after the rotary embedding.

    Args:
        mean: E[q_j], [Hkv, G, D] float32, G query heads for each KV head.
        variance: E[(q_j - E[q_j])^2], [Hkv, G, D] float32.

    Raises:
        InvalidInputError: the parts are not both [Hkv, G, D].
    """

    mean: Tensor
    variance: Tensor

    def __post_init__(self) -> None:
        if self.mean.dim() != 3 or self.mean.shape != self.variance.shape:
            raise InvalidInputError(
                f"moments of queries are {tuple(self.mean.shape)} and {tuple(self.variance.shape)}; give "
                "[Hkv, G, D] both"
            )

    def scaled(self, scaling: float) -> QueryMoments:
        """The moments of queries times `scaling`, whose products with keys are scores."""
        return QueryMoments(self.mean * scaling, self.variance * scaling**2)

    def expected_scores(self, keys: Tensor) -> Tensor:
        """log E[exp(q.k)], as if queries were normally distributed with independent channels.

            E[q].k + sum_j Var[q_j] k_j^2 / 2

        Args:
            keys: [..., Hkv, T, D] float32, without the mean key: a softmax ignores what all keys share.

        Returns:
            [..., Hkv, G, T] float32.
        """
        return self.mean @ keys.mT + self.variance / 2 @ keys.square().mT

    def likeliest(self, keys: Tensor) -> Tensor:
        """The key of each page with the largest expected share of the page's attention.

        Args:
            keys: [B, Hkv, P, T, D] float32, without the mean key.

        Returns:
            [B, Hkv, P] int64: which of the T keys, by the mean over query heads of a softmax over the page.
        """
        shares = self.expected_scores(keys.transpose(1, 2)).softmax(-1).mean(-2)  # [B, P, Hkv, T]
        return shares.argmax(-1).transpose(1, 2)

    def map(self, fn: Callable[[Tensor], Tensor]) -> QueryMoments:
        """New moments with `fn` applied to both parts, for instance to move them to another device."""
        return QueryMoments(fn(self.mean), fn(self.variance))
