"""What every plan is made with: calibration text, divergence, measurements kept, allocation."""
