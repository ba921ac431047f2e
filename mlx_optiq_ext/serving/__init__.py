"""What a server asks of its clients: keys, limits, and parameters that it survives.

Nothing here knows mlx-lm's server; a guard works on headers::

    from email.message import Message

    from mlx_optiq_ext import serving

    guard = serving.Guard(keys=serving.Keys.read(["secret"]))
    headers = Message()
    headers["Authorization"] = "Bearer wrong"
    try:
        guard.check_key("/v1/models", headers)
    except serving.Refusal as refusal:
        print(refusal.status, refusal.message)
"""

from .answers import Answers, Waiting, at_end, once
from .audit import described, record
from .body import check_text, read_object
from .bounds import check_bounds
from .connection import Connection, Slots, drain, gone, turn_away
from .guard import COMPLETIONS, HEALTH, MODELS, Guard, Limits, is_loopback, known_origins, warning
from .keys import Keys
from .logprobs import finite
from .metrics import METRICS, Metrics, Row
from .refusal import Refusal, without_folders
from .sampling import check, check_prompt, vocabulary_of

__all__ = [
    "COMPLETIONS",
    "HEALTH",
    "METRICS",
    "MODELS",
    "Answers",
    "Connection",
    "Guard",
    "Keys",
    "Limits",
    "Metrics",
    "Refusal",
    "Row",
    "Slots",
    "Waiting",
    "at_end",
    "check",
    "check_bounds",
    "check_prompt",
    "check_text",
    "described",
    "drain",
    "finite",
    "gone",
    "is_loopback",
    "known_origins",
    "once",
    "read_object",
    "record",
    "turn_away",
    "vocabulary_of",
    "warning",
    "without_folders",
]
