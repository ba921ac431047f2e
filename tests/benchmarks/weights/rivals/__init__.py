"""What the weight benchmarks run beside this package, each in a process of its own."""
