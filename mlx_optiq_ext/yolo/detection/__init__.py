"""Evaluates detections: average precision, comparison with the original, pictures."""
