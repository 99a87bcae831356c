"""What training brings down.

Shapes: B windows, W tokens a window, V vocabulary.
"""

from torch import Tensor, nn


def next_token_loss(logits_BWV: Tensor, ids_BW: Tensor) -> Tensor:
    """Return the mean negative log-likelihood in nats of each token but the first, float32."""
    logits_TV = logits_BWV[:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(logits_TV, ids_BW[:, 1:].flatten())


def distillation_loss(student_BWV: Tensor, teacher_BWV: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) in nats of the next token, the mean over all tokens, float32."""
    student_TV = student_BWV.flatten(0, 1).float().log_softmax(-1)
    teacher_TV = teacher_BWV.flatten(0, 1).float().log_softmax(-1)
    return nn.functional.kl_div(student_TV, teacher_TV, log_target=True, reduction="batchmean")
