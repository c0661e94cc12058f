"""For anybody's models: what is wrong with a training or a checkpoint, and how it is mended."""
