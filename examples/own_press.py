"""Write a press of your own, and compare it with others: in divergence from the model, and at equal bytes.

Run: python examples/own_press.py
     python examples/own_press.py --model some/model --documents 6

A command takes the press by the name of its module. Run the command in the folder of this file:

    quantpress compare book.txt -q "Who is Ada?" -p "own_press:LoudValues(0.5) | TurboQuant(bits=4)"
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import ScorerPress

from quantpress import TurboQuant
from quantpress.evaluation import evaluate
from quantpress.presses.traits import describe


@dataclass
class LoudValues(ScorerPress):
    """Keeps the first tokens, the most recent ones, and of the others those with the longest values."""

    n_first: int = 4
    n_recent: int = 64

    def score(
        self, module: Any, hidden_states: Any, keys: Any, values: torch.Tensor, attentions: Any, kwargs: Any
    ) -> torch.Tensor:
        """Scores [B, Hkv, T] of the values [B, Hkv, T, D]; the tokens with the lowest are evicted."""
        scores = values.norm(dim=-1)
        scores[..., : self.n_first] = scores[..., -self.n_recent :] = torch.inf
        return scores


# `Compose` has to know how many of the first tokens this press always keeps, because TurboQuant relies on it.
describe(LoudValues, sink_tokens=lambda press: press.n_first)


def main() -> None:
    """Evaluate it beside presses of kvpress."""
    parser = argparse.ArgumentParser(description="Evaluate a press of one's own beside others.")
    parser.add_argument("--model", help="id or folder of a chat model; left out, the small default model")
    parser.add_argument("--documents", type=int, default=2, help="pieces of a book to score")
    parser.add_argument("--context", type=int, default=512, help="tokens of each that are read")
    options = parser.parse_args()
    found = evaluate(
        [LoudValues(0.5), [LoudValues(0.5), TurboQuant.preset("small")]],
        options.model,
        parts=["fidelity", "grid"],
        against=["SnapKV(0.5)", "Knorm(0.5)", "Random(0.5)"],
        documents=options.documents,
        context=options.context,
        continuation=65,
        grid_presses=["SnapKV", LoudValues],
        grid_bits=(16, 3),
        grid_budgets=(1 / 4,),
    )
    print(found)


if __name__ == "__main__":
    main()
