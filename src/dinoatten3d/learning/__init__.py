"""Features -> Run: the model, its loss, its folds and its training."""
