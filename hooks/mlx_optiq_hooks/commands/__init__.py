"""One file for each stock command: its options, its checks, and what runs instead of it."""
