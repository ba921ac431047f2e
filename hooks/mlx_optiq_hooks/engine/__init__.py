"""How stock commands are patched: patches as data, the gate, flags, the running session."""
