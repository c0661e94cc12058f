"""The small GPT and its text: from words to a trained model, its losses and its checkpoints."""
