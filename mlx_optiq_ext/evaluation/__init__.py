"""Evaluation: KL divergence, perplexity, GSM8K, AI2D and word error rate, against baselines."""

from .models import Subject, subject
from .report import Report
from .tasks import TASKS, Settings

__all__ = ["TASKS", "Report", "Settings", "Subject", "subject"]
