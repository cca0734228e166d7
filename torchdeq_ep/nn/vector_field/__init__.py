"""Vector-field networks of the papers as maps for torchdeq: fully connected in any wiring, and convolutional."""
