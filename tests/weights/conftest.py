from toy_fixtures import loaded, own_cache, text, toy

__all__ = ["loaded", "own_cache", "text", "toy"]
