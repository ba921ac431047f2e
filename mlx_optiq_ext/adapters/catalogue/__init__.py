"""The adapters that a server offers: found, read, mounted when asked for, evicted when idle."""

from .catalogue import Catalogue
from .copies import AdapterConflictError, AdaptersBusyError, State, UnknownAdapterError
from .jobs import Jobs, RequestQueue
from .offers import read_offers
from .reading import Caps, Offer

__all__ = [
    "AdapterConflictError",
    "AdaptersBusyError",
    "Caps",
    "Catalogue",
    "Jobs",
    "Offer",
    "RequestQueue",
    "State",
    "UnknownAdapterError",
    "read_offers",
]
