"""What a model is worth: perplexity on a text, and accuracy on tasks."""

from yopo.evaluation.scores import Score, TaskReport, TaskScore
from yopo.evaluation.tasks import evaluate
from yopo.evaluation.texts import read_text
from yopo.evaluation.windows import perplexity

__all__ = ["Score", "TaskReport", "TaskScore", "evaluate", "perplexity", "read_text"]
