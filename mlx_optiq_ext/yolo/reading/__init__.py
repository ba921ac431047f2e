"""Reads YOLO26 checkpoints of Ultralytics and yolo-mlx."""
