"""X: how large the inputs of a matrix are on a text.

Shapes: N sequences, W tokens a sequence.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from yopo.errors import UnsupportedModelError
from yopo.symbolic.matrices import Block, Matrix, matrices_of
from yopo.symbolic.passes import batches_of
from yopo.watching import Watch, eager_experts, without_head
from yopo.writing import with_progress


def read_activations(
    model: nn.Module, blocks: Sequence[Block], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return X of each matrix by name, on the CPU, where the model is run as it is.

    Args:
        model: The model that holds `blocks`.
        blocks: Its layers.
        inputs: Keyword arguments of the model `(N, W)`, batch first.

    Raises:
        UnsupportedModelError: If inputs of matrices are NaN or infinite.
    """
    rows = len(next(iter(inputs.values())))
    device = next(model.parameters()).device
    body = without_head(model, [block.name for block in blocks])
    training = model.training
    try:
        model.eval()
        with eager_experts(model), torch.no_grad(), watch_norms(matrices_of(blocks), rows) as norms:
            for batch in with_progress(batches_of(inputs), "read"):
                body(**{key: ids.to(device) for key, ids in batch.items()}, use_cache=False)
    finally:
        model.train(training)
    return {name: norm.cpu() for name, norm in norms.items()}


@contextmanager
def watch_norms(matrices: Sequence[Matrix], sequences: int) -> Iterator[dict[str, Tensor]]:
    """Give X of each matrix by name, which is there after what is run inside has been run.

    Raises:
        UnsupportedModelError: If inputs are NaN or infinite.
    """
    norms = {
        matrix.name: torch.zeros(
            matrix.weight.shape[1], device=matrix.parameter.device, dtype=torch.float32
        )
        for matrix in matrices
    }
    with Watch(
        (matrix.weight, matrix.expert, partial(_add_norms, norms[matrix.name]))
        for matrix in matrices
    ):
        yield norms
    for name, norm in norms.items():
        if not torch.isfinite(norm.div_(sequences)).all():
            raise UnsupportedModelError(
                f"the inputs of `{name}` are NaN or infinite on this text. Load the model in a "
                "wider `dtype`."
            )


def _add_norms(total: Tensor, inputs: Tensor) -> None:
    total += inputs.detach().reshape(-1, inputs.shape[-1]).float().square().sum(dim=0)
