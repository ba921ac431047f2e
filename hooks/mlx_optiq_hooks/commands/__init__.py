"""One file a stock command: its options, what is refused, what runs instead."""
