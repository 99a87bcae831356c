"""How far a pruned model's predictions are from the dense one's, without cutting anything.

Shapes: F rows, K kept rows, M draws, T tokens, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from yopo.adapters import Ffn
from yopo.errors import UnsupportedModelError
from yopo.moments import Moments
from yopo.restore import restore_contract
from yopo.surgery import interrupts_held
from yopo.writing import can_write, write_tokens

_SEQUENCES, _LENGTH = 8, 256
_NUMBERS = 2**28
"""Log-probabilities of the dense model that are kept: a gigabyte at most."""


class Divergence:
    """Earn -log of the divergence between what the dense and the pruned model predict.

    The divergence is KL(dense ‖ pruned) in nats of the next token, averaged over text that the
    dense model writes, other text than its evidence. Rows are not cut: their columns of the
    contract matrices are zero while the model reads, and put back afterwards.

    Args:
        model: The dense model.
        ffns: Its FFNs.
        moments: The hidden units of each FFN by name, to restore contract matrices by; None leaves
            the columns of kept rows as they are.
        seed: Seed of the text.

    Raises:
        UnsupportedModelError: If the model cannot write text, or predicts no tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        ffns: Sequence[Ffn],
        moments: Mapping[str, Moments] | None,
        *,
        seed: int,
    ) -> None:
        """Let the model write a text, and keep what it predicts of each next token."""
        if not can_write(model):
            raise _no_predictions(model)
        self._model, self._ffns, self._moments = model, ffns, moments
        config: Any = model.config
        vocabulary = int(config.get_text_config().vocab_size)
        count = max(1, min(_SEQUENCES, _NUMBERS // (vocabulary * _LENGTH)))
        self._inputs = write_tokens(model, sequences=count, length=_LENGTH, seed=seed + 1)
        self._dense = [log_p_TV.cpu() for log_p_TV in self._predictions()]

    def __call__(self, kept: Mapping[str, Tensor]) -> Tensor:
        """Return the reward `(M,)` of each draw of kept rows `(M, K)` by FFN, float64."""
        draws = len(next(iter(kept.values())))
        rewards = [
            self._reward({name: kept_MK[draw] for name, kept_MK in kept.items()})
            for draw in range(draws)
        ]
        return torch.tensor(rewards, dtype=torch.float64, device="cpu")

    def _reward(self, kept: Mapping[str, Tensor]) -> float:
        with _contract_put_back(self._ffns):
            for ffn in self._ffns:
                self._prune(ffn, kept[ffn.name])
            total, count = 0.0, 0
            for known_TV, pruned_TV in zip(self._dense, self._predictions(), strict=True):
                dense_TV = known_TV.to(pruned_TV.device)
                total += float((dense_TV.exp() * (dense_TV - pruned_TV)).sum())
                count += len(dense_TV)
        return -math.log(max(total / count, 1e-12))

    def _prune(self, ffn: Ffn, kept_K: Tensor) -> None:
        """Make the contract matrix of `ffn` what it would be, with zeros for dropped rows."""
        weight_FD, bias_D = ffn.contract_weight(), ffn.contract_bias()
        kept_K = kept_K.to(weight_FD.device)
        kept_KD = weight_FD[kept_K]
        if self._moments is not None and len(kept_K) < ffn.rows:
            moments = self._moments[ffn.name]
            restored = restore_contract(
                moments, weight_FD, bias_D, kept_K, dtype=weight_FD.dtype, name=ffn.name
            )
            kept_KD = restored.contract_KD
            if bias_D is not None and restored.bias_D is not None:
                bias_D.copy_(restored.bias_D)
        weight_FD.zero_()
        weight_FD[kept_K] = kept_KD

    def _predictions(self) -> Iterator[Tensor]:
        """Yield log-probabilities `(T, V)` of the next token, one sequence after another."""
        device = next(self._model.parameters()).device
        training = self._model.training
        try:
            self._model.eval()
            for row in range(len(next(iter(self._inputs.values())))):
                inputs = {key: ids[row : row + 1].to(device) for key, ids in self._inputs.items()}
                with torch.no_grad():
                    output = self._model(**inputs, use_cache=False)
                if not isinstance(getattr(output, "logits", None), Tensor):
                    raise _no_predictions(self._model)
                yield output.logits.flatten(0, -2).float().log_softmax(dim=-1)
        finally:
            self._model.train(training)


def _no_predictions(model: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} predicts no tokens, so `reward='divergence'` cannot compare "
        "predictions. Use the model with its language-model head, or `reward='output'`."
    )


@contextmanager
def _contract_put_back(ffns: Sequence[Ffn]) -> Iterator[None]:
    """Put the contract matrices of `ffns` back, and their biases, whatever happens to them."""
    views = [view for ffn in ffns for view in (ffn.contract_weight(), ffn.contract_bias())]
    dense = [(view, view.clone()) for view in views if view is not None]
    try:
        with torch.no_grad():
            yield
    finally:
        with interrupts_held(), torch.no_grad():
            for view, copy in dense:
                view.copy_(copy)
