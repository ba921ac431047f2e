"""From a model and a KV budget to a plan for its caches."""
