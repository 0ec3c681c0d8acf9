"""Records on disk, decoded, augmented and batched: numpy on the host, no model in sight."""
