"""The parts of train_detector.py: an anchor-free detector of about 160,000 parameters and the data, losses and figures around it."""
