"""Evaluation: KL divergence, perplexity, GSM8K, AI2D and word error rate, against baselines.

The tasks of ``mlx_lm.evaluate --optiq-task`` as functions::

    from pathlib import Path
    from mlx_optiq_ext import evaluation

    model = evaluation.subject("Qwen/Qwen3-0.6B")
    settings = evaluation.Settings(data=Path("text.txt"), context=128, limit=4)
    print(evaluation.TASKS["perplexity"](model, [], settings).markdown())
"""

from .models import Subject, subject
from .report import Report
from .settings import Settings
from .tasks import TASKS

__all__ = ["TASKS", "Report", "Settings", "Subject", "subject"]
