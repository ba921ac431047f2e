"""Reading checkpoints of YOLO26, whichever package wrote them."""
