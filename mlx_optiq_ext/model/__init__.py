"""What any model is and how it is run. Nothing in here knows of quantization."""
